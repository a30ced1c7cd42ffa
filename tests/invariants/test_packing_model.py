"""Packing and micro-batching must not change what a model says or learns."""

import itertools
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.model.adapters import AdapterSpec, adapter_parameters, add_adapter
from burnish.model.checkpoint import load_model
from burnish.model.decoder import Decoder
from burnish.types import Batch
from tests.tiny import tiny_batch, tiny_folder

ARCHITECTURES = ["LlamaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Olmo2ForCausalLM"]
"""Full attention, soft caps, windows with two ropes, norms over all heads."""


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> Decoder:
    with tempfile.TemporaryDirectory() as folder:
        return load_model(tiny_folder(Path(folder), request.param), "full")


def split(batch: Batch) -> list[Batch]:
    """Each sequence as a batch of its own."""
    starts, alone = batch.starts.tolist(), []
    for start, end in itertools.pairwise(starts):
        one = tiny_batch([end - start])
        fields = {name: getattr(one, name) for name in Batch.__slots__}
        alone.append(Batch(**{**fields, "tokens": batch.tokens[start:end], "targets": batch.targets[start:end]}))
    return alone


def loss_and_gradient(
    model: Decoder, batches: list[Batch], adapter: str | None = None
) -> tuple[float, dict[str, torch.Tensor]]:
    """The summed loss over one global count, as the learner divides it, and its gradient."""
    model.zero_grad()
    total = sum(batch.total_weight for batch in batches)
    loss = 0.0
    for batch in batches:
        part = -(model.log_probs(batch, adapter) * batch.weights).sum() / total
        part.backward()
        loss += part.item()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@settings(max_examples=8, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=9).filter(lambda given: max(given) > 1))
def test_packed_is_one_at_a_time(model: Decoder, lengths: list[int]) -> None:
    batch = tiny_batch(lengths, seed=len(lengths))
    packed_loss, packed = loss_and_gradient(model, [batch])
    alone_loss, alone = loss_and_gradient(model, split(batch))
    assert packed_loss == pytest.approx(alone_loss, rel=1e-5)
    assert_equal_gradients(packed, alone)


def test_a_sequence_cannot_see_its_neighbours(model: Decoder) -> None:
    batch = tiny_batch((6, 9, 5))
    changed = batch.tokens.clone()
    changed[:6], changed[15:] = 7, 8
    fields = {name: getattr(batch, name) for name in Batch.__slots__}
    with torch.no_grad():
        before, after = model.logits(batch), model.logits(Batch(**{**fields, "tokens": changed}))
    assert torch.equal(before[6:15], after[6:15])
    assert not torch.equal(before[:6], after[:6])


def test_a_position_cannot_see_what_follows_it(model: Decoder) -> None:
    batch = tiny_batch((12,))
    changed = batch.tokens.clone()
    changed[8:] = 9
    fields = {name: getattr(batch, name) for name in Batch.__slots__}
    with torch.no_grad():
        before, after = model.logits(batch), model.logits(Batch(**{**fields, "tokens": changed}))
    assert torch.equal(before[:8], after[:8])
    assert not torch.equal(before[8:], after[8:])


@pytest.mark.parametrize("storage", ["bf16", "nf4"])
def test_packed_is_one_at_a_time_for_an_adapter_on_a_frozen_base(tmp_path: Path, storage: str) -> None:
    model = load_model(tiny_folder(tmp_path), storage)
    add_adapter(model, "policy", AdapterSpec(rank=3), torch.Generator().manual_seed(0))
    for parameter in adapter_parameters(model, "policy").values():
        torch.nn.init.normal_(parameter, std=0.3)
    batch = tiny_batch((11, 4, 30, 7, 2))
    packed_loss, packed = loss_and_gradient(model, [batch], "policy")
    alone_loss, alone = loss_and_gradient(model, split(batch), "policy")
    assert packed_loss == pytest.approx(alone_loss, rel=1e-5)
    assert len(packed) == 2 * 7 * 2  # A and B of the seven layers of both blocks, and nothing of the base
    assert_equal_gradients(packed, alone)
