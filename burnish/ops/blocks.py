"""The blocks of ragged sequences that an attention kernel works through, made on the device without waiting for it.

Blocks of queries and of keys are rows of one sequence each, listed by falling work, so that none with much of it starts
last. A prompt that stands in the batch once is read where it stands: a block of queries names it, and a block of keys
names its visits, which are rows of the sequences that read it from elsewhere. There are as many blocks as sequences of
these many tokens can have at most; those beyond are empty, and so the sizes of all tables are known on the host.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from burnish.types import Batch

BLOCK_ROWS, VISIT_ROWS = 128, 64
"""The most rows of a block, which programs may share, and of a visit, which one program meets at a time."""


class Tables(NamedTuple):
    """What a kernel goes by, in int32. A prefix begins where some sequence does, and is a part of it."""

    queries: Int[Tensor, "blocks 6"]
    """First row, end and start of its sequence, first row of its prefix, length of that; nothing: first and end 0.

    Last in each table: what to add to a row for the place of its sum. Sequences' sums start at multiples of 16 bytes.
    """
    keys: Int[Tensor, "blocks 5"]
    """First row, end of its sequence, its first visit, the end of them."""
    visits: Int[Tensor, "visits 5"]
    """First row, end of its sequence, what to add to a row to count rows as its prefix does, the end of that."""
    num_sums: int
    """Places for the sums of rows that each head has."""
    rows: int
    """The most rows of a block."""
    visit_rows: int
    """The most rows of a visit."""


@dataclass(slots=True, eq=False)
class Blocks:
    """All blocks of a batch, listed when they are first asked for: many batches go another way.

    Not a tuple: compiled code would look into it and be made anew for every batch.
    """

    starts: Int[Tensor, " S+1"]
    num_tokens: int
    prefixes: Int[Tensor, "S 2"] | None = None
    """First row and length of what each sequence reads before its own tokens; None: nothing at all."""
    _tables: Tables | None = None

    def tables(self) -> Tables:
        """The blocks of sequences that start here, and end with the last token."""
        if self._tables is None:
            self._tables = _listed(self.starts, self.num_tokens, self.prefixes)
        return self._tables

    def refill(self, other: "Blocks") -> None:
        """List the blocks of another batch of as many tokens and sequences in the same memory, if they are listed."""
        if self._tables is not None:
            for ours, theirs in zip(self._tables[:3], other.tables()[:3], strict=True):
                ours.copy_(theirs)


class _Readers(NamedTuple):
    """The sequences with a prefix, by the sequence it stands in, those that read most of it first."""

    order: Tensor
    """Their numbers; sequences without a prefix come last."""
    key: Tensor
    """What they are sorted by."""
    visits: Tensor
    """How many visits the first 0, 1, 2, ... of them make."""
    tokens: Tensor
    """How many tokens those have."""


def blocks_of(batch: Batch) -> Blocks:
    """Those of a batch; only its sizes are read on the host."""
    prefixes = None
    if any(length for _, length in batch.prefixes):
        prefixes = torch.tensor(batch.prefixes, dtype=batch.starts.dtype).to(batch.starts.device, non_blocking=True)
    return Blocks(batch.starts, len(batch.tokens), prefixes)


def padded(blocks: Blocks, starts: Int[Tensor, " S+1"], num_tokens: int) -> Blocks:
    """The same for a batch padded with sequences that read nothing but themselves; starts are those of all."""
    prefixes = blocks.prefixes
    if prefixes is not None:
        prefixes = F.pad(prefixes, (0, 0, 0, len(starts) - 1 - len(prefixes)))
    return Blocks(starts, num_tokens, prefixes)


def takes_blocks(width: int) -> bool:
    """Whether the kernels take heads so wide: tensor maps want rows of whole 16 bytes.

    Between 128 and 256 heads are filled up to 256, which FlashAttention 2 does not: at 192 it is faster.
    """
    return (64 <= width <= 128 or width == 256) and width % 8 == 0


def forward_by_blocks(
    q_THC: Float[Tensor, "T H C"],
    k_TGC: Float[Tensor, "T G C"],
    v_TGC: Float[Tensor, "T G C"],
    blocks: Blocks,
    scale: float,
    window: int | None,
) -> tuple[Float[Tensor, "T H C"], tuple[Tensor, ...]]:
    """Attention by our own kernels, and the log-sum-exp of each row, in base 2."""
    from burnish.kernels.attention import forward

    out, sums = forward(q_THC, k_TGC, v_TGC, blocks.tables(), scale, window or 0, blocks.prefixes is not None)
    return out, (sums,)


def backward_by_blocks(
    dout_THC: Float[Tensor, "T H C"],
    given: tuple[Float[Tensor, "T H C"], Float[Tensor, "T G C"], Float[Tensor, "T G C"]],
    out_THC: Float[Tensor, "T H C"],
    sums: Float[Tensor, "H sums"],
    blocks: Blocks,
    scale: float,
    window: int | None,
) -> tuple[Float[Tensor, "T H C"], Float[Tensor, "T G C"], Float[Tensor, "T G C"]]:
    """The gradients of q, k and v, the `given`. What many read of a shared prompt is summed in one order."""
    from burnish.kernels.attention import backward

    return backward(dout_THC, given, out_THC, sums, blocks.tables(), scale, window or 0, blocks.prefixes is not None)


def _listed(starts: Tensor, num_tokens: int, prefixes: Tensor | None) -> Tables:
    number, first, exists = _divided(starts.diff(), BLOCK_ROWS, num_tokens)
    start, end, summed = starts[number], starts[number + 1], _summed(starts)[number]
    first = torch.where(exists, start + first, 0)
    end = torch.where(exists, end, 0)
    none = torch.zeros_like(first)
    if prefixes is None:
        work_of_queries, work_of_keys = first - start, end - first
        queries, keys = [first, end, start, none, none, summed], [first, end, none, none, summed]
        visits = none.new_zeros(1, 5).int()
    else:
        readers = _readers(starts, num_tokens, prefixes)
        place = number * (num_tokens + 1)
        # Of those that read this sequence's beginning: the ones that read on to this block.
        begin, stop = (torch.searchsorted(readers.key, x) for x in (place, place + num_tokens - first))
        stop = torch.where(exists, stop, begin)
        prefix_start, length = prefixes[number].unbind(1)
        work_of_queries = first - start + length
        work_of_keys = end - first + readers.tokens[stop] - readers.tokens[begin]
        queries = [first, end, start, prefix_start, length, summed]
        keys = [first, end, readers.visits[begin], readers.visits[stop], summed]
        visits = _visits(starts, num_tokens, prefixes, readers)
    queries = _sorted(queries, torch.where(exists, work_of_queries, -1))
    keys = _sorted(keys, torch.where(exists, work_of_keys, -1))
    num_sums = ((num_tokens + 3) // 4 + len(starts) - 1) * 4
    return Tables(queries, keys, visits, num_sums, BLOCK_ROWS, VISIT_ROWS)


def _summed(starts: Tensor) -> Tensor:
    first = starts[:-1]
    return ((first + 3) // 4 + torch.arange(len(first), device=first.device)) * 4 - first


def _divided(lengths: Tensor, rows: int, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each block of so many rows: the number of its sequence, its first row in that, and whether it exists."""
    most = (num_tokens + len(lengths) * (rows - 1)) // rows
    counts = (lengths + rows - 1) // rows
    ends = counts.cumsum(0)
    block = torch.arange(most, device=lengths.device)
    exists = block < ends[-1]
    number = torch.searchsorted(ends, block, right=True).clamp(max=len(lengths) - 1)
    return number, (block - ends[number] + counts[number]) * rows, exists


def _readers(starts: Tensor, num_tokens: int, prefixes: Tensor) -> _Readers:
    first, length = prefixes.T.contiguous()
    owner = torch.searchsorted(starts, first, right=True) - 1
    owner = torch.where(length > 0, owner, len(starts) - 1)
    key, order = (owner * (num_tokens + 1) + num_tokens - first - length).sort(stable=True)
    tokens = torch.where(length > 0, starts.diff(), 0)[order]
    visits = (tokens + VISIT_ROWS - 1) // VISIT_ROWS
    return _Readers(order, key, *(F.pad(x.cumsum(0), (1, 0)) for x in (visits, tokens)))


def _visits(starts: Tensor, num_tokens: int, prefixes: Tensor, readers: _Readers) -> Tensor:
    number, row, exists = _divided(readers.tokens.diff(), VISIT_ROWS, num_tokens)
    number = readers.order[number]
    start, (first, length) = starts[number], prefixes[number].unbind(1)
    columns = (start + row, starts[number + 1], first + length - start, first + length, _summed(starts)[number])
    return torch.stack([torch.where(exists, x, 0) for x in columns], dim=1).int()


def _sorted(columns: list[Tensor], work: Tensor) -> Tensor:
    return torch.stack(columns, dim=1)[work.argsort(descending=True, stable=True)].int()
