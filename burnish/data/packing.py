"""Sequences into packs of a token budget, and packs into batches. Only `collate` imports torch."""

from collections.abc import Sequence as Listed
from typing import TYPE_CHECKING

import numpy
from numpy.typing import NDArray

from burnish.types import Sequence

if TYPE_CHECKING:
    from burnish.types import Batch


def pack(lengths: "Listed[int] | NDArray[numpy.int64]", budget: int) -> list[list[int]]:
    """Groups of indices whose lengths add up to at most `budget` each: best fit, longest first, over all of them.

    Each sequence goes to the pack with the least room that still takes it. Packs are kept by their room, and the
    rooms in use are the bits of one integer, so that finding the best fit is a shift and a lowest set bit: a million
    sequences take a few seconds. Raises ValueError when one sequence alone is over the budget.
    """
    order = numpy.argsort(-numpy.asarray(lengths, numpy.int64), kind="stable").tolist()
    sizes = numpy.asarray(lengths, numpy.int64).tolist()
    if order and sizes[order[0]] > budget:
        raise ValueError(f"row {order[0]} has {sizes[order[0]]} tokens, more than a batch of {budget} tokens takes")
    packs: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(budget + 1)]
    rooms = 0  # bit r is set when some pack has room for exactly r more tokens
    for index in order:
        size: int = sizes[index]
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            number = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
            packs[number].append(index)
        else:
            room, number = budget, len(packs)
            packs.append([index])
        by_room[room - size].append(number)
        rooms |= 1 << (room - size)
    return packs


def efficiency(lengths: "Listed[int] | NDArray[numpy.int64]", budget: int) -> tuple[int, float]:
    """How many packs the sequences take, and the share of their room that is filled."""
    packs = len(pack(lengths, budget))
    return packs, float(numpy.sum(numpy.asarray(lengths, numpy.int64))) / (packs * budget) if packs else 1.0


def collate(sequences: Listed[Sequence]) -> "Batch":
    """The sequences laid end to end as one batch.

    Position t predicts the token after it, so its weight is that token's; the last position of a sequence predicts
    nothing.
    """
    import torch

    from burnish.types import Batch

    lengths = [len(sequence.ids) for sequence in sequences]
    assert lengths
    assert min(lengths) > 0
    starts = numpy.zeros(len(lengths) + 1, numpy.int64)
    numpy.cumsum(lengths, out=starts[1:])
    tokens = numpy.concatenate([numpy.asarray(sequence.ids, numpy.int64) for sequence in sequences])
    weights = numpy.concatenate([numpy.asarray(sequence.weights, numpy.float32) for sequence in sequences])
    targets, shifted = numpy.zeros_like(tokens), numpy.zeros_like(weights)
    targets[:-1], shifted[:-1] = tokens[1:], weights[1:]
    last = starts[1:] - 1
    targets[last], shifted[last] = 0, 0.0
    sequence = numpy.repeat(numpy.arange(len(lengths)), lengths)
    return Batch(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        weights=torch.from_numpy(shifted),
        positions=torch.from_numpy(numpy.arange(len(tokens)) - starts[sequence]),
        sequence=torch.from_numpy(sequence),
        starts=torch.from_numpy(starts.astype(numpy.int32)),
        scored=torch.from_numpy(numpy.flatnonzero(shifted)),
        num_sequences=len(lengths),
        longest=max(lengths),
        total_weight=float(shifted.sum(dtype=numpy.float64)),
        rows=tuple(sequence.row for sequence in sequences),
    )
