"""A prompt that stands in a batch once gives the log-probabilities and gradients of one that stands there each time."""

import dataclasses
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from burnish.model.adapters import AdapterSpec, adapter_parameters, add_adapter
from burnish.model.checkpoint import load_model
from burnish.model.decoder import Decoder
from burnish.ops.attention import attention, packed_layout
from burnish.types import Batch
from tests.tiny import Groups, tiny_batch, tiny_folder, tiny_shared_batch

ARCHITECTURES: dict[str, dict[str, int]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"sliding_window": 4},
    "Qwen3ForCausalLM": {},
    "Gemma2ForCausalLM": {},
    "Gemma3ForCausalLM": {},
    "Olmo2ForCausalLM": {},
    "Phi3ForCausalLM": {},
    "SmolLM3ForCausalLM": {},
}
"""Grouped heads; windows; norms of heads; soft caps; two ropes; norms over all heads; fused weights; layers without."""

GROUPS: Groups = [(9, (4, 7)), (1, (6, 2, 3)), (12, (1, 2)), (3, (8,)), (2, (14, 14))]


def test_the_two_batches_hold_the_same_tokens() -> None:
    whole, shared, _ = tiny_shared_batch(GROUPS)
    assert len(shared.tokens) == len(whole.tokens) - sum(length for _, length in shared.prefixes) < len(whole.tokens)
    assert torch.equal(whole.targets[whole.scored], shared.targets[shared.scored])
    for number, (start, length) in enumerate(shared.prefixes):
        own = shared.tokens[shared.starts[number] : shared.starts[number + 1]]
        read = torch.cat([shared.tokens[start : start + length], own])
        assert torch.equal(read, whole.tokens[whole.starts[number] : whole.starts[number + 1]])


groups = st.lists(st.tuples(st.integers(1, 20), st.lists(st.integers(1, 20), min_size=1, max_size=4)), min_size=1)


@settings(max_examples=50, deadline=None)
@given(groups, st.sampled_from([None, 1, 3, 8]), st.sampled_from([None, 1.5]))
def test_attention_with_shared_prompts_is_attention(groups: Groups, window: int | None, softcap: float | None) -> None:
    whole, shared, source = tiny_shared_batch(groups)
    generator = torch.Generator().manual_seed(1)
    found: list[list[Tensor]] = []
    given = [torch.randn(len(shared.tokens), heads, 6, generator=generator).double() for heads in (4, 2, 2)]
    for batch in (shared, whole):
        q, k, v = (x.clone().requires_grad_() for x in given)
        laid = (q, k, v) if batch is shared else (q[source], k[source], v[source])
        out = attention(*laid, packed_layout(batch, padded=True), 0.7, window, softcap)
        scored = out[batch.scored]
        found.append([scored, *torch.autograd.grad(scored.sin().sum(), (q, k, v))])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [None, 3])
def test_the_kernel_is_asked_for_the_definition(monkeypatch, window) -> None:
    """What the variable-length kernel is handed, by a stand-in that aligns the last query with the last key."""

    def kernel(q, k, v, starts_q, starts_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
        assert starts_q.dtype == starts_k.dtype == torch.int32
        assert max_q >= starts_q.diff().max()
        assert max_k >= starts_k.diff().max()
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        parts: list[Tensor] = []
        for (first, end), (first_key, end_key) in zip(
            pairwise(starts_q.tolist()), pairwise(starts_k.tolist()), strict=True
        ):
            back = (torch.arange(end - first)[:, None] + end_key - first_key - end + first) - torch.arange(
                end_key - first_key
            )
            seen = (back >= 0) & (back <= (window_size[0] if window_size[0] >= 0 else len(k)))
            scores = scale * torch.einsum("qhc,khc->hqk", q[first:end], k[first_key:end_key])
            chances = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            parts.append(torch.einsum("hqk,khc->qhc", chances, v[first_key:end_key]))
        return torch.cat(parts)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    whole, shared, source = tiny_shared_batch(GROUPS)
    q, k, v = (torch.randn(len(shared.tokens), heads, 6, dtype=torch.float64) for heads in (4, 2, 2))
    ours = attention(q, k, v, packed_layout(shared, padded=False), 0.7, window)
    expected = attention(q[source], k[source], v[source], packed_layout(whole, padded=True), 0.7, window)
    torch.testing.assert_close(ours[shared.scored], expected[whole.scored], rtol=1e-12, atol=1e-12)


def test_a_batch_without_prefixes_is_laid_out_as_ever() -> None:
    batch = tiny_batch([5, 9, 2])
    for prefixes in ((), ((0, 0),) * 3):
        layout = packed_layout(dataclasses.replace(batch, prefixes=prefixes), padded=True)
        assert layout.keys is None
        assert layout.rows is not None
        assert layout.rows.key_place is None


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> Decoder:
    with tempfile.TemporaryDirectory() as folder:
        decoder = load_model(tiny_folder(Path(folder), request.param, **ARCHITECTURES[request.param]), "full")
    add_adapter(decoder, "policy", AdapterSpec("lora", 4), torch.Generator().manual_seed(0))
    for parameter in adapter_parameters(decoder, "policy").values():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    return decoder


def gradients(model: Decoder, batch: Batch, adapter: str | None) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    log_probs = model.log_probs(batch, adapter)
    (log_probs * batch.weights).sum().backward()
    return log_probs[batch.scored], {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapter", [None, "policy"])
def test_log_probs_and_gradients_are_equal(monkeypatch, model: Decoder, adapter, checkpointing) -> None:
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # norms and rotations go through fp32
    monkeypatch.setattr(model, "dtype", torch.float64)
    monkeypatch.setattr(model, "checkpointing", checkpointing)
    whole, shared, _ = tiny_shared_batch(GROUPS)
    expected, expected_gradients = gradients(model, whole, adapter)
    ours, our_gradients = gradients(model, shared, adapter)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    assert our_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-6, atol=1e-6)  # parameters are in fp32


def test_in_single_precision_too(model: Decoder) -> None:
    whole, shared, _ = tiny_shared_batch(GROUPS)
    expected, expected_gradients = gradients(model, whole, "policy")
    ours, our_gradients = gradients(model, shared, "policy")
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-3, atol=1e-4)


def test_a_sequence_sees_of_others_its_prefix_alone(model: Decoder) -> None:
    _, batch, _ = tiny_shared_batch([(5, (4, 6)), (3, (2, 7))])
    changed = batch.tokens.clone()
    changed[5:9], changed[15:] = 7, 8  # what the first sequence says after the prompt, and the second group
    with torch.no_grad():
        before, after = model.logits(batch), model.logits(dataclasses.replace(batch, tokens=changed))
        touched = model.logits(dataclasses.replace(batch, tokens=changed.index_fill(0, torch.tensor([2]), 9)))
    assert torch.equal(before[9:15], after[9:15])
    assert not torch.equal(before[5:9], after[5:9])
    assert not torch.equal(after[9], touched[9])
