"""Batches divided where a device has no room for them. No pair is ever divided: its loss needs both sides.

Losses are sums over sequences or over pairs, so the parts add up to what the whole gives.
"""

from dataclasses import fields, replace
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from burnish.types import Batch, PreferenceBatch

B = TypeVar("B", bound=Batch)

BY_POSITION = {"tokens", "targets", "weights", "positions", "reference_log_probs"} | {
    *("old_log_probs", "old_values", "advantages", "returns", "value_weights"),
}
"""The columns of all kinds of batches that have a number for each position; those that have one for each sequence."""
BY_SEQUENCE = {"labels", "scores", "groups", "ended"}
BY_PAIR = {"chosen", "rejected", "margins", "pair_weights"}


def within(batch: B, limit: int | None) -> list[B]:
    """The batch in parts of at most so many tokens each, in order; what cannot be divided stays larger."""
    if limit is None or len(batch.tokens) <= limit:
        return [batch]
    halves = in_two(batch)
    return [batch] if halves is None else [part for half in halves for part in within(half, limit)]


def in_two(batch: B) -> tuple[B, B] | None:
    """The batch divided between two sequences, as near to the middle of its tokens as can be; None where it cannot.

    Sequences that share a prompt stay together, unless they are all that there is: then both parts get the prompt.
    Each part is the batch that its sequences alone would have made.
    """
    cut = _cut(batch)
    if cut is None:
        return None
    return _part(batch, 0, cut), _part(batch, cut, batch.num_sequences)


def _cut(batch: Batch) -> int | None:
    """The sequence that the second part begins with."""
    starts, inside = batch.starts.tolist(), set[int]()
    if isinstance(batch, PreferenceBatch):
        for pair in zip(batch.chosen.tolist(), batch.rejected.tolist(), strict=True):
            inside.update(range(min(pair) + 1, max(pair) + 1))
    places = {start: number for number, start in enumerate(starts)}
    sharing = {
        number
        for reader, (start, length) in enumerate(batch.prefixes)
        if length
        for number in range(places[start] + 1, reader + 1)
    }
    possible = [number for number in range(1, batch.num_sequences) if number not in inside]
    apart = [number for number in possible if number not in sharing]
    return min(apart or possible, key=lambda number: abs(2 * starts[number] - starts[-1]), default=None)


class _Layout(NamedTuple):
    """What stands where in a part."""

    source: list[range]
    """The positions of the whole that it is made of, in order."""
    lengths: list[int]
    """Tokens of each sequence there."""
    prefixes: list[tuple[int, int]]
    copied: list[int]
    """Where copies of prompts end."""


def _layout(batch: Batch, first: int, last: int) -> _Layout:
    found, starts = _Layout([], [], [], []), batch.starts.tolist()
    prefixes = batch.prefixes or ((0, 0),) * batch.num_sequences
    shared: dict[int, tuple[int, int]] = {}  # where a prompt stood: where it stands now, and how much of it
    at = 0
    for number in range(first, last):
        (start, length), begin, end = prefixes[number], starts[number], starts[number + 1]
        if length == 0:
            shared[begin] = at, end - begin
        elif start not in shared:  # it stands in the other part: this sequence is the first to read it here
            shared[start] = at, 0
        place, there = shared.get(start, (at, 0))
        read = min(length, there)
        if read < length:
            found.source.append(range(start + read, start + length))
            found.copied.append(at + length - read - 1)
            if place == at:
                shared[start] = at, length
        found.source.append(range(begin, end))
        found.prefixes.append((place, read))
        found.lengths.append(length - read + end - begin)
        at += found.lengths[-1]
    return found


def _part(batch: B, first: int, last: int) -> B:
    """These sequences of the batch as a batch."""
    layout, device = _layout(batch, first, last), batch.tokens.device
    source = torch.cat([torch.arange(piece.start, piece.stop) for piece in layout.source]).to(device)
    columns: dict[str, Any] = {}
    for name in (field.name for field in fields(batch)):
        column: Tensor | None = getattr(batch, name)
        if column is not None and name in BY_POSITION | BY_SEQUENCE:
            columns[name] = column[source] if name in BY_POSITION else column[first:last]
    copied = torch.tensor(layout.copied, dtype=torch.int64, device=device)
    columns["targets"][copied] = columns["tokens"][copied + 1]
    columns |= _pairs(batch, first, last) if isinstance(batch, PreferenceBatch) else {}
    starts, lengths = [0, *accumulate(layout.lengths)], torch.tensor(layout.lengths)
    return replace(
        batch,
        **columns,
        sequence=torch.arange(last - first).repeat_interleave(lengths).to(device),
        starts=torch.tensor(starts, dtype=torch.int32).to(device),
        scored=columns["weights"].nonzero()[:, 0],
        num_sequences=last - first,
        longest=max(read + own for (_, read), own in zip(layout.prefixes, layout.lengths, strict=True)),
        total_weight=float(columns["weights"].sum(dtype=torch.float64)),
        rows=batch.rows[first:last],
        prefixes=tuple(layout.prefixes) if any(read for _, read in layout.prefixes) else (),
    )


def _pairs(batch: PreferenceBatch, first: int, last: int) -> dict[str, Any]:
    """What a part has of the pairs, both sides of which are in it or neither."""
    kept = (batch.chosen >= first) & (batch.chosen < last)
    columns = {name: getattr(batch, name)[kept] for name in BY_PAIR}
    weights = columns["pair_weights"].sum(dtype=torch.float64)
    return {
        **columns,
        "chosen": columns["chosen"] - first,
        "rejected": columns["rejected"] - first,
        "num_pairs": round(float(weights), 6),  # thirds and sixths in fp32 add up to 1 but for their rounding
        "num_labels": int((batch.labels[first:last] != 0).sum()),
    }
