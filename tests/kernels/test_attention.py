"""Attention over ragged sequences in Triton's interpreter, in small blocks: against float64, memory full of NaN."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from burnish.kernels import attention as kernels  # after Triton is known to be there
from burnish.kernels.attention import Launch
from burnish.ops import blocks as tables
from burnish.ops.attention import attention, packed_layout
from burnish.ops.blocks import Blocks, backward_by_blocks, blocks_of, forward_by_blocks, padded
from burnish.types import Batch
from tests.kernels.casts import right_casts
from tests.tiny import Groups, tiny_batch, tiny_shared_batch

__all__ = ["right_casts"]
pytestmark = pytest.mark.usefixtures("right_casts")
LENGTHS = [17, 1, 66, 2]
GROUPS: Groups = [(37, (30, 7)), (9, (25, 1, 33)), (16, (16, 2, 3, 18)), (3, (8,))]
NAMES = ("out", "dq", "dk", "dv")


class Heads(NamedTuple):
    queries: int
    keys: int
    width: int


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds NaN, so that a row no kernel writes shows."""
    empty = torch.empty

    def poison(*size: Any, **options: Any) -> Tensor:
        return empty(*size, **options).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", poison)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 32 rows and visits of 16; a program has half a block of keys."""
    monkeypatch.setattr(tables, "BLOCK_ROWS", 32)
    monkeypatch.setattr(tables, "VISIT_ROWS", 16)
    launches = {"FORWARD": Launch(32, 16, 1, 4), "QUERIES": Launch(32, 32, 1, 4), "KEYS": Launch(16, 16, 1, 4)}
    for name, launch in launches.items():
        monkeypatch.setattr(kernels, name, {64: launch})


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores are made one block ahead, and blocks are of other sizes."""
    monkeypatch.setattr(kernels, "FORWARD", {64: Launch(32, 32, 1, 4, True)})
    monkeypatch.setattr(kernels, "QUERIES", {64: Launch(32, 16, 1, 4, True)})
    monkeypatch.setattr(kernels, "KEYS", {64: Launch(32, 16, 1, 4)})


def given_for(total: int, heads: Heads, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """q, k and v as columns of one buffer, and the gradient of the output."""
    generator = torch.Generator().manual_seed(total)
    buffer = torch.randn(total, heads.queries + 2 * heads.keys, heads.width, generator=generator).to(dtype)
    dout = torch.randn(total, heads.queries, heads.width, generator=generator).to(dtype)
    q, k, v = buffer.split((heads.queries, heads.keys, heads.keys), dim=1)
    return (q, k, v), dout


def by_kernels(
    given: tuple[Tensor, Tensor, Tensor], dout: Tensor, blocks: Blocks, scale: float, window: int | None
) -> list[Tensor]:
    out, (sums,) = forward_by_blocks(*given, blocks, scale, window)
    return [out, *backward_by_blocks(dout, given, out, sums, blocks, scale, window)]


def by_autograd(
    given: tuple[Tensor, Tensor, Tensor], dout: Tensor, batch: Batch, scale: float, window: int | None
) -> list[Tensor]:
    q, k, v = (x.detach().requires_grad_() for x in given)
    out = attention(q, k, v, packed_layout(batch, padded=True), scale, window)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


def assert_within_twice(
    found: list[Tensor], given: tuple[Tensor, Tensor, Tensor], dout: Tensor, batch: Batch, window: int | None
) -> None:
    wide = tuple(x.double() for x in given)
    exact = by_autograd((wide[0], wide[1], wide[2]), dout.double(), batch, 0.3, window)
    plain = by_autograd(given, dout, batch, 0.3, window)
    for name, ours, theirs, true in zip(NAMES, found, plain, exact, strict=True):
        assert ours.is_contiguous()
        assert ours.dtype == theirs.dtype
        assert (ours.double() - true).norm() <= 2 * (theirs.double() - true).norm() + 1e-6 * true.norm(), name


@pytest.mark.parametrize(
    ("heads", "dtype", "window"),
    [
        (Heads(2, 2, 16), torch.float16, None),
        (Heads(1, 1, 16), torch.float32, 20),
        (Heads(3, 1, 24), torch.float16, 3),
    ],
)
def test_ragged_sequences_err_at_most_twice_as_much_as_plain_attention(heads, window, dtype) -> None:
    batch = tiny_batch(LENGTHS)
    given, dout = given_for(sum(LENGTHS), heads, dtype)
    found = by_kernels(given, dout, blocks_of(batch), 0.3, window)
    assert_within_twice(found, given, dout, batch, window)


@pytest.mark.parametrize(
    ("heads", "dtype", "window"),
    [
        (Heads(2, 1, 8), torch.float16, None),
        (Heads(1, 1, 16), torch.float32, 20),
        (Heads(1, 1, 16), torch.float16, 3),
    ],
)
def test_prompts_are_read_where_they_stand(heads, window, dtype) -> None:
    _, batch, _ = tiny_shared_batch(GROUPS)
    given, dout = given_for(len(batch.tokens), heads, dtype)
    found = by_kernels(given, dout, blocks_of(batch), 0.3, window)
    assert_within_twice(found, given, dout, batch, window)


@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize(("shared", "window"), [(False, None), (True, 20)])
def test_scores_made_ahead_are_the_same(shared: bool, window) -> None:
    batch = tiny_shared_batch(GROUPS)[1] if shared else tiny_batch(LENGTHS)
    given, dout = given_for(len(batch.tokens), Heads(1, 1, 16), torch.float16)
    found = by_kernels(given, dout, blocks_of(batch), 0.3, window)
    assert_within_twice(found, given, dout, batch, window)


def test_a_long_sequence_of_odd_length_alone() -> None:
    batch = tiny_batch([129])
    given, dout = given_for(129, Heads(1, 1, 64), torch.float16)
    assert_within_twice(by_kernels(given, dout, blocks_of(batch), 0.3, None), given, dout, batch, None)


def test_sequences_of_no_tokens_change_nothing() -> None:
    lengths = [33, 5]
    batch = tiny_batch(lengths)
    given, dout = given_for(38, Heads(2, 1, 16), torch.float16)
    starts = torch.tensor([0, 0, 33, 33, 33, 38, 38, 38], dtype=torch.int32)
    expected = by_kernels(given, dout, blocks_of(batch), 0.3, None)
    for ours, theirs in zip(by_kernels(given, dout, Blocks(starts, 38), 0.3, None), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_padded_batch_has_the_bits_of_the_batch_every_time() -> None:
    _, batch, _ = tiny_shared_batch(GROUPS)
    total, more = len(batch.tokens), 21
    given, dout = given_for(total, Heads(1, 1, 16), torch.float16)
    blocks = blocks_of(batch)
    expected = by_kernels(given, dout, blocks, 0.3, 20)
    starts = torch.cat((batch.starts, torch.tensor([total + more] * 3, dtype=torch.int32)))
    larger, dout_larger = given_for(total + more, Heads(1, 1, 16), torch.float16)
    for ours, theirs in zip((*larger, dout_larger), (*given, dout), strict=True):
        ours[:total] = theirs
    for _ in range(2):
        found = by_kernels(larger, dout_larger, padded(blocks, starts, total + more), 0.3, 20)
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours[:total], theirs)


def test_heads_are_gone_over_in_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    """A section of every size gives the same bits."""
    batch = tiny_batch([20, 12])
    given, dout = given_for(32, Heads(8, 4, 16), torch.float16)
    results: list[list[Tensor]] = []
    for section in (1, 2 * 2 * 32 * 16 * 2, 2**24):  # one key-value head, two, all
        monkeypatch.setattr(kernels, "SECTION", section)
        results.append(by_kernels(given, dout, blocks_of(batch), 0.3, None))
    for found in results[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, results[0], strict=True))


def rows_of(first: int, end: int) -> range:
    return range(first, min(first + 32, end))


def read_by(blocks: Blocks) -> Iterator[tuple[int, list[int]]]:
    """What each row reads, from the blocks of queries."""
    for first, end, start, prefix_start, prefix, _ in blocks.tables().queries.tolist():
        for row in rows_of(first, end):
            yield row, [*range(prefix_start, prefix_start + prefix), *range(start, row + 1)]


def readers_of(blocks: Blocks) -> Iterator[tuple[int, list[int]]]:
    """What rows read each row, from the blocks of keys."""
    visits = blocks.tables().visits.tolist()
    for first, end, first_visit, last_visit, _ in blocks.tables().keys.tolist():
        for row in rows_of(first, end):
            readers = list(range(row, end))
            for at, until, _, limit, _ in visits[first_visit:last_visit]:
                readers += [reader for reader in range(at, min(at + 16, until)) if row < limit]
            yield row, readers


def test_blocks_of_queries_and_of_keys_tell_the_same_story() -> None:
    _, batch, source = tiny_shared_batch(GROUPS)
    whole, total = tiny_shared_batch(GROUPS)[0], len(batch.tokens)
    blocks = blocks_of(batch)
    reads = dict(read_by(blocks))
    assert sorted(reads) == list(range(total))
    for place, row in enumerate(source.tolist()):  # a sequence of the whole batch, by rows of the shared one
        start = int(whole.starts[whole.sequence[place]])
        assert reads[row] == source[start : place + 1].tolist()
    pairs = {(row, key) for row, keys in reads.items() for key in keys}
    assert {(reader, row) for row, readers in readers_of(blocks) for reader in readers} == pairs


def test_blocks_with_most_work_come_first() -> None:
    blocks = blocks_of(tiny_batch([40, 100, 3]))
    lengths = [first + 32 - start for first, end, start, _, _, _ in blocks.tables().queries.tolist() if end]
    assert lengths == sorted(lengths, reverse=True)
    lengths = [end - first for first, end, _, _, _ in blocks.tables().keys.tolist()]
    assert lengths == sorted(lengths, reverse=True)
    _, shared, _ = tiny_shared_batch([(5, (5,)), (3, (2, 30, 30))])
    assert blocks_of(shared).tables().keys[0].tolist()[:2] == [10, 15]  # 5 rows of its own, and 60 that visit


def test_sizes_of_tables_depend_on_sizes_alone() -> None:
    shapes = {
        tuple(table.shape for table in Blocks(torch.tensor(starts, dtype=torch.int32), 100).tables()[:3])
        for starts in ([0, 100, 100, 100], [0, 1, 2, 100], [0, 33, 66, 100])
    }
    assert len(shapes) == 1


def test_no_tokens_give_nothing() -> None:
    given, dout = given_for(0, Heads(2, 1, 16), torch.float16)
    blocks = Blocks(torch.tensor([0, 0], dtype=torch.int32), 0)
    assert [len(x) for x in by_kernels(given, dout, blocks, 0.3, None)] == [0] * 4
