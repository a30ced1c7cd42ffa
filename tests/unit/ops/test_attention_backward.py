"""Attention without autograd: what it computes itself, and what it asks of the libraries' kernels, by stand-ins."""

import itertools

import pytest
import torch
import torch.nn.attention.varlen  # it registers operators by name when first imported: before any stand-in
from torch import Tensor
from torch.nn import functional as F

from burnish.ops import attention as ops
from burnish.ops.attention import Layout, attention, attention_backward, attention_forward, packed_layout
from tests.tiny import Groups, tiny_batch, tiny_shared_batch

GROUPS: Groups = [(9, (4, 7)), (1, (6, 2, 3)), (3, (8,))]


def slices(total: int, heads: int = 4, groups: int = 2, width: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as columns of one buffer."""
    generator = torch.Generator().manual_seed(0)
    buffer = torch.randn(total, heads + 2 * groups, width, generator=generator, dtype=torch.float64)
    q, k, v = buffer.split((heads, groups, groups), dim=1)
    return q, k, v


def by_autograd(given: tuple[Tensor, ...], layout: Layout, dout: Tensor, *options: object) -> tuple[Tensor, ...]:
    """The output, and the gradients of q, k and v."""
    q, k, v = (x.detach().requires_grad_() for x in given)
    out = attention(q, k, v, layout, *options)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)


def both_passes(given: tuple[Tensor, Tensor, Tensor], layout: Layout, dout: Tensor, *options: object) -> list[Tensor]:
    out, saved = attention_forward(*given, layout, *options)
    return [out, *attention_backward(dout, given, out, saved, layout, *options)]


def assert_all_close(found: list[Tensor], expected: tuple[Tensor, ...]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert not ours.requires_grad
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("options", [(0.5,), (0.5, 3), (0.5, 2, 1.5)])
def test_padded_rows_have_the_gradients_of_autograd(options) -> None:
    given, dout = slices(14), torch.randn(14, 4, 6, dtype=torch.float64)
    layout = packed_layout(tiny_batch([7, 2, 4, 1]), padded=True)
    assert_all_close(both_passes(given, layout, dout, *options), by_autograd(given, layout, dout, *options))


def of_sequence(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """Attention of one sequence [L, H, C]; its last query reads up to its last key."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    back = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
    seen = (back >= 0) & (back < (len(k) if window is None else window))
    scores = torch.einsum("qhc,khc->hqk", q, k) * scale
    return torch.einsum("hqk,khc->qhc", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


def flash(q, k, v, starts, key_starts, longest, longest_key, scale, window) -> Tensor:
    """What FlashAttention computes, with the bounds it insists on."""
    assert starts.dtype == key_starts.dtype == torch.int32
    assert longest >= int(starts.diff().max())
    assert longest_key >= int(key_starts.diff().max())
    parts = [
        of_sequence(q[a:b], k[c:d], v[c:d], scale, window)
        for (a, b), (c, d) in zip(itertools.pairwise(starts), itertools.pairwise(key_starts), strict=True)
    ]
    return torch.cat(parts)


def reach(is_causal: bool, left: int, right: int) -> int | None:
    """The window, from what FlashAttention is told: keys before the position itself, -1 for all of them."""
    assert right == 0
    assert is_causal == (left == -1)
    return None if left == -1 else left + 1


@pytest.fixture
def flash_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention's two operators by definition: the kernels need a GPU."""

    def forward(q, k, v, *bounds, dropout_p, is_causal, return_debug_mask, scale, window_size_left, window_size_right):
        assert dropout_p == 0
        out = flash(q, k, v, *bounds, scale, reach(is_causal, window_size_left, window_size_right))
        return out, torch.zeros(q.shape[1], len(q)), None, None, None

    def backward(dout, q, k, v, out, lse, *rest, scale, window_size_left, window_size_right):
        *bounds, dropout_p, is_causal, _, _ = rest
        assert dropout_p == 0
        assert lse.shape == (q.shape[1], len(q))
        window = reach(is_causal, window_size_left, window_size_right)
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            again = flash(*leaves, *bounds, scale, window)
        torch.testing.assert_close(out, again.detach())
        return torch.autograd.grad(again, leaves, dout)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)


@pytest.mark.usefixtures("flash_stand_in")
@pytest.mark.parametrize("window", [None, 3])
def test_ragged_batches_go_to_flash_attention(window) -> None:
    lengths = [5, 1, 7]
    given, dout = slices(13), torch.randn(13, 4, 6, dtype=torch.float64)
    expected = by_autograd(given, packed_layout(tiny_batch(lengths), padded=True), dout, 0.7, window)
    layout = packed_layout(tiny_batch(lengths), padded=False)
    assert_all_close(both_passes(given, layout, dout, 0.7, window), expected)


@pytest.mark.usefixtures("flash_stand_in")
@pytest.mark.parametrize("window", [None, 4])
def test_what_readers_of_a_prefix_want_of_it_adds_up(window) -> None:
    _, shared, _ = tiny_shared_batch(GROUPS)
    total = len(shared.tokens)
    given, dout = slices(total), torch.randn(total, 4, 6, dtype=torch.float64)
    expected = by_autograd(given, packed_layout(shared, padded=True), dout, 0.7, window)
    layout = packed_layout(shared, padded=False)
    assert_all_close(both_passes(given, layout, dout, 0.7, window), expected)


@pytest.fixture
def cudnn_stand_in(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """cuDNN's two operators by PyTorch's own attention; which of them were called."""
    called: list[str] = []

    def run(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)

    def forward(q, k, v, attn_bias, *, compute_log_sumexp, is_causal, scale):
        called.append("forward")
        assert attn_bias is None
        assert compute_log_sumexp
        assert is_causal
        return run(q, k, v, scale), torch.zeros(*q.shape[:3], 1), *(None for _ in range(7))

    def backward(dout, q, k, v, out, lse, *rest, scale):
        called.append("backward")
        assert rest[2:] == (None, None, None, q.shape[2], q.shape[2], 0.0, True)
        assert lse.shape == (*q.shape[:3], 1)
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            again = run(*leaves, scale)
        torch.testing.assert_close(out, again.detach())
        return torch.autograd.grad(again, leaves, dout)

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", forward)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention_backward", backward)
    monkeypatch.setattr(ops, "_has_hopper_kernels", lambda device: True)
    return called


@pytest.mark.parametrize("window", [None, 64])
def test_sequences_of_one_length_go_to_cudnn(cudnn_stand_in: list[str], window) -> None:
    lengths = [64, 64, 64]
    given = slices(192)
    dout = torch.randn(4, 192, 6, dtype=torch.float64).transpose(0, 1)  # strides that no plan must see
    expected = by_autograd(given, packed_layout(tiny_batch(lengths), padded=True), dout, 0.7)
    layout = packed_layout(tiny_batch(lengths), padded=False)
    assert_all_close(both_passes(given, layout, dout, 0.7, window), expected)
    assert cudnn_stand_in == ["forward", "backward"]


def test_a_layout_knows_whether_its_sequences_are_of_one_length() -> None:
    def even(lengths: list[int]) -> bool:
        return packed_layout(tiny_batch(lengths), padded=False).even

    assert even([64, 64])
    assert even([128])
    assert not even([64, 128])
    assert not even([60, 60])  # each length is a plan, and plans are slow to make
    _, shared, _ = tiny_shared_batch([(32, (32, 32))])
    assert not packed_layout(shared, padded=False).even


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("window", [None, 32])
def test_the_operators_of_this_pytorch_take_what_they_are_given(monkeypatch, even: bool, window) -> None:
    """Shapes only: on the meta device the operators check their arguments and compute nothing."""
    monkeypatch.setattr(ops, "_has_hopper_kernels", lambda device: True)
    buffer = torch.empty(128, 8, 16, device="meta", dtype=torch.bfloat16)
    q, k, v = buffer.split((4, 2, 2), dim=1)
    layout = packed_layout(tiny_batch([64, 64] if even else [100, 28]).to("meta"), padded=False)
    found = both_passes((q, k, v), layout, torch.empty_like(q), 0.25, window)
    assert [x.shape for x in found] == [x.shape for x in (q, q, k, v)]
    assert all(x.is_contiguous() for x in found)
