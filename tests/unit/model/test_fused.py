"""The blocks run by hand against the same blocks under autograd."""

from pathlib import Path

import pytest
import torch

from burnish.model.adapters import AdapterSpec, adapter_parameters, add_adapter
from burnish.model.checkpoint import load_model
from burnish.model.decoder import Decoder
from burnish.model.shelf import NAMES, Plan
from burnish.types import Batch
from tests.tiny import randomize, tiny_batch, tiny_folder, tiny_shared_batch

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


@pytest.fixture(params=["LlamaForCausalLM", "Qwen2ForCausalLM"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "model", request.param, **SHAPE)


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # norms, rotations and log-probs go through fp32


def prepared(folder: Path, storage: str, targets: str | tuple[str, ...] = "all-linear", rank: int = 3) -> Decoder:
    model = load_model(folder, storage)
    randomize(model)
    if storage != "full":
        add_adapter(model, "a", AdapterSpec(rank=rank, alpha=2.0 * rank, targets=targets), torch.Generator().manual_seed(0))
        for parameter in adapter_parameters(model, "a").values():
            torch.nn.init.normal_(parameter, std=0.3)
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
def test_shared_prompts(folder: Path) -> None:
    model = prepared(folder, "fp32")
    model.dtype = torch.float64
    _, shared, _ = tiny_shared_batch(((5, (3, 4)), (7, (2, 6, 3))))
    compare(model, shared, "a", PLANS["mixed"])
