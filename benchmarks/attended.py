"""Attention over packed sequences in each way that takes them, beside FlashAttention 2: a part of `kernels.py`."""

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.timing import Reading, attempt
from burnish.ops.attention import Layout, attention_backward, attention_forward, packed_layout
from burnish.ops.rope import Heads
from burnish.types import Batch

SCALE = 0.09
CALLS = 8
"""Calls of a burst."""
WAYS = ("FlashAttention 2", "by blocks", "cuDNN")
"""The first is what the others are held against."""
Times = tuple[float | None, float | None]
"""Seconds forward and backward, of what could be measured."""


class Attended(NamedTuple):
    """Sequences of a batch."""

    title: str
    lengths: Sequence[int]
    """Tokens of each sequence of its own."""
    prefixes: Sequence[tuple[int, int]] = ()
    """As a batch has them: where the prompt of each sequence starts that stands in another one, and its length."""


PACKED = Attended("packed 8192 in 7", [2500, 1800, 1500, 1000, 700, 400, 292])
SHARED = Attended(
    "4x(1024 shared + 4x256)",
    [1280, 256, 256, 256] * 4,
    [(2048 * group, 1024 if number else 0) for group in range(4) for number in range(4)],
)
BATCHES = (Attended("4x2048", [2048] * 4), PACKED, Attended("30x270", [270] * 30), SHARED)
ALIKE, GROUPED = Heads(32, 32, 128), Heads(32, 8, 128)
OTHERS = (Heads(32, 8, 64), Heads(32, 32, 80), Heads(32, 32, 96), Heads(16, 4, 192), Heads(16, 8, 256))
CASES = [*itertools.product(BATCHES, (ALIKE, GROUPED)), *((PACKED, heads) for heads in OTHERS)]


def attention_readings(device: torch.device, only: str) -> Iterator[Reading]:
    """What each way reaches, in operations of the scores that are seen."""
    for batch, heads in CASES:
        title = f"{batch.title}, {heads.queries} heads on {heads.keys} of {heads.width}"
        layouts = layouts_of(device, batch)
        names = {way: [f"attention{back} {title}, {way}" for back in ("", " backward")] for way in layouts}
        if not any(only in name for both in names.values() for name in both):
            continue
        sizes = (heads.queries, heads.keys, heads.keys)
        buffer = torch.randn(sum(batch.lengths), sum(sizes), heads.width, device=device).bfloat16()
        dout = torch.randn(sum(batch.lengths), heads.queries, heads.width, device=device).bfloat16()
        q, k, v = buffer.split(sizes, dim=1)
        before = [length for _, length in batch.prefixes] or [0] * len(batch.lengths)
        seen = sum(own * (own + 1) // 2 + own * length for own, length in zip(batch.lengths, before, strict=True))
        first: Times = (None, None)
        for way, layout in layouts.items():
            if way != WAYS[0] and not any(only in name for name in names[way]):
                continue
            taken = times_of(names[way], (q, k, v), dout, layout)
            first = taken if way == WAYS[0] else first
            for name, products, time, yardstick in zip(names[way], (2, 5), taken, first, strict=True):
                if time is not None and only in name:
                    rate = products * 2 * heads.width * heads.queries * seen / time
                    share = f"{yardstick / time:.3f} of {WAYS[0]}" if yardstick is not None else ""
                    yield Reading(name, time, f"{rate / 1e12:.0f} TFLOP/s", share)


def times_of(names: Sequence[str], given: tuple[Tensor, Tensor, Tensor], dout: Tensor, layout: Layout) -> Times:
    """The seconds forward and backward; None for what fails, and for what would come after it."""
    forward = partial(attention_forward, *given, layout, SCALE)
    if (taken := attempt(names[0], forward, CALLS)) is None:
        return None, None
    return taken, attempt(names[1], partial(attention_backward, dout, given, *forward(), layout, SCALE), CALLS)


def layouts_of(device: torch.device, batch: Attended) -> dict[str, Layout]:
    """The layout that each way of attention would be given."""
    starts = torch.tensor([0, *itertools.accumulate(batch.lengths)], dtype=torch.int32)
    none = torch.zeros(sum(batch.lengths), dtype=torch.long)
    packed = Batch(
        tokens=none,
        targets=none,
        weights=none.float(),
        positions=none,
        sequence=none,
        starts=starts,
        scored=none[:0],
        num_sequences=len(batch.lengths),
        longest=max(batch.lengths),
        total_weight=0.0,
        prefixes=tuple(batch.prefixes),
    )
    layout = packed_layout(packed.to(device), padded=False)
    ways = {WAYS[0]: layout._replace(even=False, blocks=None)}
    if layout.blocks is not None:
        ways[WAYS[1]] = layout._replace(even=False)
    return ways | ({WAYS[2]: layout} if layout.even else {})
