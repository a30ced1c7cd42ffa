"""Our own attention over ragged batches on Hopper: against float64, beside FlashAttention 2, and in a CUDA graph."""

import functools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from burnish.ops.attention import Layout, attention, attention_backward, attention_forward, packed_layout
from burnish.ops.blocks import Blocks, forward_by_blocks
from burnish.types import Batch
from tests.tiny import Groups, tiny_batch, tiny_shared_batch


def on_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not on_hopper(), reason="needs a Hopper GPU"),
    pytest.mark.filterwarnings("default"),
]
LENGTHS = [300, 1, 77, 128, 2, 129]
GROUPS: Groups = [(100, (40, 70, 3)), (7, (200, 1)), (129, (129, 128)), (300, (64, 64, 1, 64)), (1, (2, 2))]


class Heads(NamedTuple):
    queries: int
    keys: int
    width: int


LLAMA, LLAMA3 = Heads(32, 32, 128), Heads(32, 8, 128)


def given_for(total: int, heads: Heads, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """q, k and v as columns of one buffer, and the gradient of the output."""
    generator = torch.Generator("cuda").manual_seed(total)
    shape = total, heads.queries + 2 * heads.keys, heads.width
    buffer = torch.randn(shape, generator=generator, device="cuda", dtype=dtype)
    dout = torch.randn(total, heads.queries, heads.width, generator=generator, device="cuda", dtype=dtype)
    q, k, v = buffer.split((heads.queries, heads.keys, heads.keys), dim=1)
    return (q, k, v), dout


def both_passes(
    given: tuple[Tensor, Tensor, Tensor], dout: Tensor, layout: Layout, window: int | None = None
) -> list[Tensor]:
    out, saved = attention_forward(*given, layout, 0.1, window)
    return [out, *attention_backward(dout, given, out, saved, layout, 0.1, window)]


def by_autograd(
    given: tuple[Tensor, Tensor, Tensor], dout: Tensor, batch: Batch, window: int | None, dtype: torch.dtype
) -> list[Tensor]:
    q, k, v = (x.to("cpu", dtype).requires_grad_() for x in given)
    out = attention(q, k, v, packed_layout(batch, padded=True), 0.1, window)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout.to("cpu", dtype))]


def check(batch: Batch, heads: Heads, window: int | None, dtype: torch.dtype) -> None:
    layout = packed_layout(batch.to("cuda"), padded=False)
    assert layout.blocks is not None
    given, dout = given_for(len(batch.tokens), heads, dtype)
    found = both_passes(given, dout, layout, window)
    plain, exact = (by_autograd(given, dout, batch, window, each) for each in (dtype, torch.float64))
    for name, ours, theirs, true in zip(("out", "dq", "dk", "dv"), found, plain, exact, strict=True):
        assert ours.is_contiguous()
        assert (ours.cpu().double() - true).norm() <= 2 * (theirs.double() - true).norm(), name


@pytest.mark.parametrize(
    ("heads", "window", "dtype"),
    [
        (Heads(4, 4, 64), None, torch.bfloat16),
        (Heads(3, 1, 80), None, torch.bfloat16),
        (Heads(4, 2, 96), None, torch.bfloat16),
        (Heads(4, 4, 128), None, torch.bfloat16),
        (Heads(4, 4, 128), 50, torch.bfloat16),
        (Heads(4, 1, 128), None, torch.float16),
        (Heads(2, 1, 256), None, torch.bfloat16),
    ],
)
def test_ragged_sequences_err_at_most_twice_as_much_as_plain_attention(heads, window, dtype) -> None:
    check(tiny_batch(LENGTHS), heads, window, dtype)


@pytest.mark.parametrize("window", [None, 150])
def test_prompts_are_read_where_they_stand(window: int | None) -> None:
    check(tiny_shared_batch(GROUPS)[1], Heads(4, 2, 128), window, torch.bfloat16)


@pytest.mark.parametrize("shared", [False, True])
def test_real_shapes_have_the_same_bits_every_time_and_the_libraries_numbers(shared: bool) -> None:
    batch = shared_batch() if shared else tiny_batch([2048, 1500, 3000, 17, 1627])
    layout = packed_layout(batch.to("cuda"), padded=False)
    given, dout = given_for(len(batch.tokens), LLAMA3, torch.bfloat16)
    found, again = (both_passes(given, dout, layout) for _ in range(2))
    theirs = both_passes(given, dout, layout._replace(blocks=None))
    for one, other, library in zip(found, again, theirs, strict=True):
        assert torch.equal(one, other)
        assert (one.float() - library.float()).norm() <= 0.02 * library.float().norm()


def test_places_beyond_32_bits() -> None:
    """The last rows of a buffer of more than 2^31 numbers."""
    total, row, heads = 140_000, 128 * 128, 3
    buffer = torch.zeros(total, row, device="cuda", dtype=torch.bfloat16)
    buffer[:, -heads * 128 :] = torch.randn(total, heads * 128, device="cuda", dtype=torch.bfloat16)
    q, k, v = buffer.unflatten(1, (-1, 128))[:, -heads:].split(1, dim=1)
    starts = torch.arange(0, total + 1, 100, dtype=torch.int32, device="cuda")
    out, _ = forward_by_blocks(q, k, v, Blocks(starts, total), 0.1, None)
    last = slice(total - 100, total)
    alone, _ = forward_by_blocks(q[last], k[last], v[last], Blocks(starts[:2], 100), 0.1, None)
    assert torch.equal(out[last], alone)


def test_a_recorded_pass_reads_new_blocks() -> None:
    batches = [tiny_batch(lengths).to("cuda") for lengths in ([500, 12, 300, 212], [100, 400, 24, 500])]
    layouts = [packed_layout(batch, padded=False) for batch in batches]
    given, dout = given_for(1024, Heads(4, 4, 128), torch.bfloat16)
    expected = both_passes(given, dout, layouts[1])
    buffers, new = layouts[0].blocks, layouts[1].blocks
    assert buffers is not None
    assert new is not None
    both_passes(given, dout, layouts[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = both_passes(given, dout, layouts[0])
    buffers.refill(new)
    graph.replay()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@functools.cache
def shared_batch() -> Batch:
    """4 prompts of 1,024 tokens with 4 answers of 256 each: 8,192 tokens."""
    return tiny_shared_batch([(1024, (256,) * 4)] * 4)[1]
