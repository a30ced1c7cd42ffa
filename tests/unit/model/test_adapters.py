"""Which layers an adapter goes to, with which rank, and what its names may be."""

import pytest
import torch
from torch import nn

from burnish.model.adapters import (
    IA3,
    AdapterSpec,
    DoRA,
    LoRA,
    adapter_layers,
    adapter_names,
    adapter_parameters,
    add_adapter,
    copy_adapter,
    select_targets,
)
from burnish.model.linear import Linear
from burnish.model.storage import STORAGES

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
PATHS = [f"model.layers.{i}.self_attn.{name}" for i in range(12) for name in ATTENTION]
PATHS += [f"model.layers.{i}.mlp.{name}" for i in range(12) for name in ("gate_proj", "down_proj")]
PATHS += ["lm_head"]


def layers(*names: str, outputs: int = 6, inputs: int = 10) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.Module()
    for name in names:
        weight = torch.randn(outputs, inputs, generator=generator)
        model.add_module(name, Linear(STORAGES["fp32"].encode(weight)))
    return model


@pytest.mark.parametrize(
    ("spec", "count"),
    [
        (AdapterSpec(), 72),
        (AdapterSpec("dora"), 72),
        (AdapterSpec("ia3"), 36),
        (AdapterSpec("ia3", targets="all-linear"), 72),
        (AdapterSpec(targets="all-linear"), 72),
        (AdapterSpec(targets=("q_proj",)), 12),
        (AdapterSpec(targets=("self_attn.q_proj", "down_proj")), 24),
        (AdapterSpec(targets=("layers.1.mlp.down_proj",)), 1),
        (AdapterSpec(targets=("lm_head",)), 1),
        (AdapterSpec(targets=r".*\.1\d?\..*_proj"), 18),
    ],
)
def test_targets_select_layers(spec: AdapterSpec, count: int) -> None:
    chosen = select_targets(PATHS, spec)
    assert len(chosen) == count
    assert [path for path in PATHS if path in chosen] == chosen


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (AdapterSpec(targets=("q_proj", "vproj")), "'vproj' matches no layer; did you mean 'v_proj'?"),
        (AdapterSpec(targets=("proj",)), "'proj' matches no layer; did you mean"),
        (
            AdapterSpec(targets=("layers.12.mlp.down_proj",)),
            "'layers.12.mlp.down_proj' matches no layer; did you mean 'model.layers.",
        ),
        (AdapterSpec(targets="q_proj"), r"no layer's whole name matches 'q_proj'; .* write \[q_proj\]"),
        (AdapterSpec(targets="x("), "'x\\(' is not a regular expression"),
        (AdapterSpec(targets=()), "adapter.targets is empty"),
        (AdapterSpec(rank_pattern={"q_porj": 4}), "rank_pattern: 'q_porj' matches no target; did you mean 'q_proj'?"),
        (
            AdapterSpec(alpha_pattern={"zzz": 4}),
            "alpha_pattern: 'zzz' matches no target; the layers are q_proj, k_proj",
        ),
    ],
)
def test_what_matches_nothing_is_named_with_the_nearest(spec: AdapterSpec, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        select_targets(PATHS, spec)


def test_a_rank_may_differ_by_layer_and_the_first_pattern_counts() -> None:
    spec = AdapterSpec(rank=8, alpha=16, rank_pattern={r"layers\.1\.self_attn\.q_proj": 2, "q_proj": 4})
    assert spec.rank_of("model.layers.1.self_attn.q_proj") == 2
    assert spec.rank_of("model.layers.11.self_attn.q_proj") == 4
    assert spec.rank_of("model.layers.1.self_attn.k_proj") == 8


@pytest.mark.parametrize(("rslora", "scale"), [(False, 12 / 4), (True, 12 / 2)])
def test_the_scale_is_alpha_over_rank_or_over_its_root(rslora: bool, scale: float) -> None:
    model = layers("q_proj")
    add_adapter(model, "policy", AdapterSpec(rank=4, alpha=12, rslora=rslora))
    adapter = adapter_layers(model, "policy")["q_proj"]
    assert isinstance(adapter, LoRA)
    nn.init.ones_(adapter.B)
    x = torch.randn(3, 10)
    expected = model.q_proj(x) + scale * (x @ adapter.A.T).sum(dim=1, keepdim=True)
    torch.testing.assert_close(model.q_proj(x, "policy"), expected)


def test_doras_rows_have_the_length_of_their_magnitude() -> None:
    model = layers("q_proj")
    add_adapter(model, "policy", AdapterSpec("dora", rank=2, alpha=3.0))
    adapter = adapter_layers(model, "policy")["q_proj"]
    assert isinstance(adapter, DoRA)
    torch.testing.assert_close(adapter.magnitude, model.q_proj.stored.weight.norm(dim=1))
    nn.init.normal_(adapter.lora.B)
    adapter.magnitude.data = torch.linspace(1, 2, 6)
    effective = model.q_proj(torch.eye(10), "policy").T
    torch.testing.assert_close(effective.norm(dim=1), adapter.magnitude)
    updated = model.q_proj.stored.weight + 1.5 * adapter.lora.B @ adapter.lora.A
    torch.testing.assert_close(effective / adapter.magnitude[:, None], updated / updated.norm(dim=1, keepdim=True))


def test_ia3_scales_outputs_bias_included_and_the_inputs_of_the_last_mlp_layer() -> None:
    model = layers("k_proj", "v_proj", "down_proj")
    model.k_proj.bias = nn.Parameter(torch.ones(6))
    model.down_proj.bias = nn.Parameter(torch.ones(6))
    add_adapter(model, "policy", AdapterSpec("ia3"))
    parts = adapter_layers(model, "policy")
    for adapter in parts.values():
        assert isinstance(adapter, IA3)
        adapter.factors.data = torch.linspace(0.5, 2, len(adapter.factors))
    x = torch.randn(3, 10)
    torch.testing.assert_close(model.k_proj(x, "policy"), model.k_proj(x) * torch.linspace(0.5, 2, 6))
    torch.testing.assert_close(model.down_proj(x, "policy"), model.down_proj(x * torch.linspace(0.5, 2, 10)))


def test_the_generator_decides_the_factors_and_the_global_state_is_left_alone() -> None:
    first, second, third = layers("q_proj"), layers("q_proj"), layers("q_proj")
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for model, seed in ((first, 1), (second, 1), (third, 2)):
        add_adapter(model, "policy", AdapterSpec(rank=4), torch.Generator().manual_seed(seed))
    assert torch.equal(torch.get_rng_state(), state)
    a, b, c = (adapter_layers(model, "policy")["q_proj"].A for model in (first, second, third))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert 0.8 * 10**-0.5 < a.abs().max() <= 10**-0.5


def test_dropout_acts_in_training_only_and_follows_the_global_random_state() -> None:
    model = layers("q_proj")
    add_adapter(model, "policy", AdapterSpec(rank=4, dropout=0.5))
    nn.init.ones_(adapter_layers(model, "policy")["q_proj"].B)
    x = torch.randn(3, 10)
    calls = []
    for _ in range(2):
        torch.manual_seed(0)
        calls.append(model.q_proj(x, "policy"))
    assert torch.equal(calls[0], calls[1])
    assert not torch.equal(calls[0], model.q_proj(x, "policy"))
    model.eval()
    assert torch.equal(model.q_proj(x, "policy"), model.q_proj(x, "policy"))


def test_parameters_carry_their_names_in_the_model() -> None:
    model = layers("q_proj", "k_proj")
    add_adapter(model, "policy", AdapterSpec(rank=4))
    named = dict(model.named_parameters())
    own = adapter_parameters(model, "policy")
    assert set(own) == {f"{layer}.adapters.policy.{factor}" for layer in ("q_proj", "k_proj") for factor in "AB"}
    assert all(named[name] is parameter for name, parameter in own.items())


def test_a_copy_is_trainable_and_apart() -> None:
    model = layers("q_proj")
    add_adapter(model, "sft", AdapterSpec(rank=4))
    for parameter in adapter_parameters(model, "sft").values():
        parameter.requires_grad_(False)
    copy_adapter(model, "sft", "policy")
    assert adapter_names(model) == ["policy", "sft"]
    assert all(parameter.requires_grad for parameter in adapter_parameters(model, "policy").values())
    assert not any(parameter.requires_grad for parameter in adapter_parameters(model, "sft").values())


@pytest.mark.parametrize("name", ["", "a.b", "values", "forward"])
def test_a_name_that_pytorch_could_not_hold_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot name an adapter"):
        add_adapter(layers("q_proj"), name, AdapterSpec())


def test_a_taken_name_an_unknown_kind_and_a_rank_of_zero_are_refused() -> None:
    model = layers("q_proj")
    add_adapter(model, "policy", AdapterSpec(rank=4))
    with pytest.raises(ValueError, match="already has an adapter 'policy'"):
        add_adapter(model, "policy", AdapterSpec(rank=4))
    with pytest.raises(ValueError, match=r"adapter\.kind=vera is not known; known are lora, dora, ia3"):
        add_adapter(model, "other", AdapterSpec("vera"))
    with pytest.raises(ValueError, match="at least 1"):
        add_adapter(model, "other", AdapterSpec(rank_pattern={"q_proj": 0}))
    with pytest.raises(ValueError, match=r"adapter\.rank=16 is more than a layer of 6 x 10 can use"):
        add_adapter(model, "other", AdapterSpec(rank=16))


def test_dora_merges_a_row_of_zeros_to_zeros() -> None:
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    linear = Linear(STORAGES["fp32"].encode(weight))
    model = nn.ModuleDict({"q_proj": linear})
    add_adapter(model, "policy", AdapterSpec("dora", rank=2))
    merged = linear.adapters["policy"].merge(weight)
    assert torch.isfinite(merged).all()
    assert not merged[3].any()
