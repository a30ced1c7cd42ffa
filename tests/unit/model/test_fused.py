"""The blocks run by hand against the same blocks under autograd."""

import dataclasses
from pathlib import Path

import pytest
import torch

from burnish.model import tiles
from burnish.model.adapters import AdapterSpec, adapter_parameters, add_adapter, remove_adapter
from burnish.model.checkpoint import load_model
from burnish.model.decoder import Decoder
from burnish.model.shelf import NAMES, Plan
from burnish.types import Batch
from tests.tiny import tiny_batch, tiny_folder, tiny_shared_batch

LENGTHS = (11, 4, 19, 7)
SHAPE = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 3}
ALL = frozenset(NAMES)
PLANS = {
    "keep": Plan((ALL,) * 3, (frozenset(),) * 3),
    "least": Plan((frozenset({"x"}),) * 3, (frozenset(),) * 3),
    "host": Plan((frozenset(),) * 3, (frozenset({"x", "x_mid", "attention"}),) * 3),
    "mixed": Plan(
        (ALL, frozenset({"x", "qkv"}), frozenset({"attention"})),
        (frozenset(), frozenset({"gate_up"}), frozenset({"x"})),
    ),
}


@pytest.fixture(params=["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "SmolLM3ForCausalLM"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    more = {"no_rope_layers": [0, 1, 1]} if request.param == "SmolLM3ForCausalLM" else {}
    return tiny_folder(tmp_path / "model", request.param, **SHAPE, **more)


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # norms, rotations and log-probs go through fp32


def prepared(folder: Path, storage: str, targets: str | tuple[str, ...] = "all-linear", rank: int = 3) -> Decoder:
    model = load_model(folder, storage)
    if storage != "full":
        generator = torch.Generator().manual_seed(0)
        add_adapter(model, "a", AdapterSpec(rank=rank, alpha=2.0 * rank, targets=targets), generator)
        for parameter in adapter_parameters(model, "a").values():
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def gradients(model: Decoder, batch: Batch, adapter: str | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    hidden = model.hidden(batch, adapter)
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1), dtype=hidden.dtype)
    (hidden * weights).sum().backward()
    return hidden.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare(model: Decoder, batch: Batch, adapter: str | None, plan: Plan) -> None:
    hidden, expected = gradients(model, batch, adapter)
    assert model.fuse_blocks()
    model.plan = plan
    ours, found = gradients(model, batch, adapter)
    torch.testing.assert_close(ours, hidden, rtol=1e-9, atol=1e-9)
    assert found.keys() == expected.keys()
    assert len(found) > 5
    for name, gradient in expected.items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6 * gradient.abs().max(), msg=name)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("storage", ["full", "fp32", "nf4"])
def test_hidden_states_and_gradients_are_those_of_autograd(folder: Path, storage: str, plan: str) -> None:
    model = prepared(folder, storage)
    model.dtype = torch.float64
    compare(model, tiny_batch(LENGTHS), None if storage == "full" else "a", PLANS[plan])


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("plan", ["least", "mixed"])
@pytest.mark.parametrize("storage", ["full", "nf4"])
def test_mlps_tile_by_tile(folder: Path, storage: str, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "ROWS", 4)
    batch = tiny_batch(LENGTHS)
    assert len(tiles.tiles_of(len(batch.tokens), 6)) > 2
    model = prepared(folder, storage)
    model.dtype = torch.float64
    compare(model, batch, None if storage == "full" else "a", dataclasses.replace(PLANS[plan], tile=6))
    with torch.no_grad():
        once = model.hidden(batch)
        model.plan = PLANS[plan]
        torch.testing.assert_close(model.hidden(batch), once, rtol=1e-9, atol=1e-9)


def test_tiles_are_whole_and_nearly_alike() -> None:
    assert tiles.tiles_of(100, None) == tiles.tiles_of(100, 100) == [None]
    assert tiles.tiles_of(8192, 2048) == [slice(i, i + 2048) for i in range(0, 8192, 2048)]
    assert tiles.tiles_of(300, 200) == [slice(0, 256), slice(256, 300)]
    assert tiles.tiles_of(3074, 2048) == [slice(0, 1664), slice(1664, 3074)]


def test_what_is_computed_again_is_the_same_to_the_last_bit(folder: Path) -> None:
    model, batch = prepared(folder, "nf4"), tiny_batch(LENGTHS)
    assert model.fuse_blocks()
    hidden, expected = gradients(model, batch, "a")
    for plan in PLANS.values():
        model.plan = plan
        ours, found = gradients(model, batch, "a")
        assert torch.equal(ours, hidden)
        assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("o_proj",), ("down_proj", "up_proj"), ("gate_proj",)])
def test_adapters_on_some_layers_only(folder: Path, targets: tuple[str, ...]) -> None:
    model = prepared(folder, "fp32", targets, rank=20)
    model.dtype = torch.float64
    compare(model, tiny_batch(LENGTHS), "a", PLANS["mixed"])


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("targets", ["all-linear", ("qkv_proj",), ("gate_up_proj", "o_proj")])
@pytest.mark.parametrize("storage", ["full", "fp32", "nf4"])
def test_one_layer_that_gives_several_parts(tmp_path: Path, storage: str, targets: str | tuple[str, ...]) -> None:
    folder = tiny_folder(tmp_path / "model", "Phi3ForCausalLM", **SHAPE)
    model = prepared(folder, storage, targets, rank=5)
    model.dtype = torch.float64
    compare(model, tiny_batch(LENGTHS), None if storage == "full" else "a", PLANS["mixed"])


@pytest.mark.usefixtures("double")
def test_shared_prompts(folder: Path) -> None:
    model = prepared(folder, "fp32")
    model.dtype = torch.float64
    _, shared, _ = tiny_shared_batch(((5, (3, 4)), (7, (2, 6, 3))))
    compare(model, shared, "a", PLANS["mixed"])


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("plan", ["keep", "least"])
def test_gradient_of_the_stream_by_finite_differences(tmp_path: Path, plan: str) -> None:
    model = prepared(tiny_folder(tmp_path / "model", **SHAPE), "nf4")
    model.dtype = torch.float64
    assert model.fuse_blocks()
    batch = tiny_batch((3, 2))
    given, fused = model._packed(batch), model.fused
    x = model.model.embed_tokens(batch.tokens, torch.float64).detach().requires_grad_()
    assert fused is not None
    random = torch.Generator().manual_seed(0)
    along, weights = (torch.randn(x.shape, generator=random, dtype=torch.float64) for _ in range(2))

    def value(x: torch.Tensor) -> torch.Tensor:
        return (fused(x, given, "a", PLANS[plan]) * weights).sum()

    total = value(x)
    total.backward(retain_graph=True)
    assert x.grad is not None
    step = 1e-6
    with torch.no_grad():
        slope = (value(x + step * along) - value(x - step * along)) / (2 * step)
    torch.testing.assert_close((x.grad * along).sum(), slope, rtol=1e-6, atol=1e-8)
    with pytest.raises(RuntimeError, match="second backward pass"):
        total.backward()


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_inside_a_compiled_function(folder: Path) -> None:
    model, batch = prepared(folder, "nf4"), tiny_batch(LENGTHS)
    assert model.fuse_blocks()
    _, expected = gradients(model, batch, "a")
    plain = model.hidden
    model.hidden = torch.compile(plain, backend="aot_eager")  # type: ignore[method-assign]
    _, found = gradients(model, batch, "a")
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_factors_that_changed_are_multiplied_with(folder: Path) -> None:
    model, batch = prepared(folder, "bf16"), tiny_batch(LENGTHS)
    assert model.fuse_blocks()
    before = model.hidden(batch, "a")
    for parameter in adapter_parameters(model, "a").values():
        with torch.no_grad():
            parameter.mul_(1.5)
    after = model.hidden(batch, "a")
    model.fused = None
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, model.hidden(batch, "a"), rtol=1e-4, atol=1e-4)


def test_dropout_and_other_adapters_go_the_plain_way(folder: Path) -> None:
    model = load_model(folder, "fp32")
    add_adapter(model, "wet", AdapterSpec(dropout=0.5), torch.Generator())
    add_adapter(model, "dora", AdapterSpec(kind="dora"), torch.Generator())
    assert model.fuse_blocks()
    assert model.fused is not None
    assert not model.fused.takes("wet", training=True)
    assert model.fused.takes("wet", training=False)
    assert not model.fused.takes("dora", training=False)
    assert model.fused.takes(None, training=True)


def test_weights_held_decoded_are_the_same_and_can_be_let_go(folder: Path) -> None:
    model, batch = prepared(folder, "nf4"), tiny_batch(LENGTHS)
    assert model.fuse_blocks()
    assert model.fused is not None
    hidden, expected = gradients(model, batch, "a")
    model.fused.hold_decoded(2)
    for _ in range(2):
        again, found = gradients(model, batch, "a")
        assert torch.equal(again, hidden)
        assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    held = [bool(part.qkv._held) for part in model.fused.trunk.parts]
    model.new_cache(1, 8)
    assert held == [True, True, False]
    assert not any(part.qkv._held for part in model.fused.trunk.parts)


@pytest.mark.parametrize("architecture", ["Gemma2ForCausalLM", "Olmo2ForCausalLM"])
def test_families_with_other_blocks_are_left_to_autograd(tmp_path: Path, architecture: str) -> None:
    model = load_model(tiny_folder(tmp_path / "model", architecture, **SHAPE, head_dim=16), "fp32")
    assert not model.fuse_blocks()
    assert model.fused is None


def test_an_adapter_that_changes_between_the_halves_is_refused(folder: Path) -> None:
    model, batch = prepared(folder, "bf16"), tiny_batch(LENGTHS)
    assert model.fuse_blocks()
    loss = model.hidden(batch, "a").sum()
    with torch.no_grad():
        next(iter(adapter_parameters(model, "a").values())).mul_(2)
    model.prepare("a")
    with pytest.raises(RuntimeError, match="the adapter has changed"):
        loss.backward()


def test_copies_made_in_inference_mode_serve_training(folder: Path) -> None:
    model, batch = prepared(folder, "bf16"), tiny_batch(LENGTHS)
    assert model.fuse_blocks()
    with torch.inference_mode():
        model.hidden(batch, "a")
    with torch.no_grad():
        next(iter(adapter_parameters(model, "a").values())).mul_(2)
    _, found = gradients(model, batch, "a")
    assert len(found) > 5


def test_a_removed_adapter_leaves_no_copies(folder: Path) -> None:
    model, batch = prepared(folder, "bf16"), tiny_batch(LENGTHS)
    assert model.fuse_blocks()
    model.hidden(batch, "a")
    assert model.fused is not None
    assert model.fused._factors
    remove_adapter(model, "a")
    model.hidden(batch, "a")
    assert not model.fused._factors
