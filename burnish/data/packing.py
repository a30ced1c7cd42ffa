"""Sequences into packs of a token budget, and packs into batches. Imports torch only when it makes a batch."""

from collections.abc import Sequence as Listed
from typing import TYPE_CHECKING, Any

import numpy
from numpy.typing import NDArray

from burnish.types import Sequence

if TYPE_CHECKING:
    from burnish.types import Batch


def pack(lengths: "Listed[int] | NDArray[numpy.int64]", budget: int) -> list[list[int]]:
    """Groups of indices whose lengths add up to at most `budget` each: best fit, longest first, over all of them.

    Each sequence goes to the pack with the least room that still takes it; a million sequences take a few seconds.
    Raises ValueError when one sequence alone is over the budget.
    """
    order: list[int] = numpy.argsort(-numpy.asarray(lengths, numpy.int64), kind="stable").tolist()
    sizes: list[int] = numpy.asarray(lengths, numpy.int64).tolist()
    if order and sizes[order[0]] > budget:
        raise ValueError(f"row {order[0]} has {sizes[order[0]]} tokens, more than a batch of {budget} tokens takes")
    packs: list[list[int]] = []
    rooms = _Rooms(budget)
    for index in order:
        room, number = rooms.take(sizes[index]) or (budget, len(packs))
        if number == len(packs):
            packs.append([])
        packs[number].append(index)
        rooms.put(room - sizes[index], number)
    return packs


class _Rooms:
    """Packs by how much room they have left, with the tightest fit for a size found in constant time.

    The amounts of room in use are bits: of a word for each 1024 amounts, and of one word for the words in use.
    """

    def __init__(self, budget: int) -> None:
        self._packs: list[list[int]] = [[] for _ in range(budget + 1)]
        self._words = [0] * ((budget >> 10) + 1)
        self._used = 0

    def put(self, room: int, pack: int) -> None:
        """Note that a pack has so much room."""
        self._packs[room].append(pack)
        self._words[room >> 10] |= 1 << (room & 1023)
        self._used |= 1 << (room >> 10)

    def take(self, size: int) -> tuple[int, int] | None:
        """The least room of at least this size and a pack that has it, which is no longer noted; None when none has."""
        word = size >> 10
        fitting = self._words[word] >> (size & 1023)
        if fitting:
            room = size + _lowest_bit(fitting)
        else:
            later = self._used >> (word + 1)
            if not later:
                return None
            word += 1 + _lowest_bit(later)
            room = (word << 10) + _lowest_bit(self._words[word])
        pack = self._packs[room].pop()
        if not self._packs[room]:
            self._words[word] ^= 1 << (room & 1023)
            if not self._words[word]:
                self._used ^= 1 << word
        return room, pack


def _lowest_bit(bits: int) -> int:
    return (bits & -bits).bit_length() - 1


def efficiency(lengths: "Listed[int] | NDArray[numpy.int64]", budget: int) -> tuple[int, float]:
    """How many packs the sequences take, and the share of their room that is filled."""
    packs = len(pack(lengths, budget))
    return packs, float(numpy.sum(numpy.asarray(lengths, numpy.int64))) / (packs * budget) if packs else 1.0


def collate(sequences: Listed[Sequence]) -> "Batch":
    """The sequences laid end to end as one batch.

    Position t predicts the token after it, so its weight is that token's; the last position of a sequence predicts
    nothing.
    """
    from burnish.types import Batch

    return Batch(**columns(sequences))


def columns(sequences: Listed[Sequence], left_out: Listed[int] | None = None) -> dict[str, Any]:
    """The fields of a Batch of these sequences, the first so many tokens of each `left_out`; `prefixes` aside."""
    import torch

    whole = [len(sequence.ids) for sequence in sequences]
    skipped = numpy.asarray(left_out if left_out is not None else [0] * len(whole), numpy.int64)
    lengths = numpy.asarray(whole, numpy.int64) - skipped
    assert len(lengths)
    assert lengths.min() > 0
    starts = numpy.zeros(len(lengths) + 1, numpy.int64)
    numpy.cumsum(lengths, out=starts[1:])
    both = list(zip(sequences, skipped.tolist(), strict=True))
    tokens = numpy.concatenate([numpy.asarray(sequence.ids[skip:], numpy.int64) for sequence, skip in both])
    weights = numpy.concatenate([numpy.asarray(sequence.weights[skip:], numpy.float32) for sequence, skip in both])
    targets, shifted = numpy.zeros_like(tokens), numpy.zeros_like(weights)
    targets[:-1], shifted[:-1] = tokens[1:], weights[1:]
    last = starts[1:] - 1
    targets[last], shifted[last] = 0, 0.0
    sequence = numpy.repeat(numpy.arange(len(lengths)), lengths)
    return {
        "tokens": torch.from_numpy(tokens),
        "targets": torch.from_numpy(targets),
        "weights": torch.from_numpy(shifted),
        "positions": torch.from_numpy(numpy.arange(len(tokens)) - (starts[:-1] - skipped)[sequence]),
        "sequence": torch.from_numpy(sequence),
        "starts": torch.from_numpy(starts.astype(numpy.int32)),
        "scored": torch.from_numpy(numpy.flatnonzero(shifted)),
        "num_sequences": len(whole),
        "longest": max(whole),
        "total_weight": float(shifted.sum(dtype=numpy.float64)),
        "rows": tuple(sequence.row for sequence in sequences),
    }
