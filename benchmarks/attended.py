"""Attention over packed sequences in each way that takes them, beside FlashAttention 2: a part of `kernels.py`."""

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.timing import Reading, attempt
from burnish.ops.attention import Layout, attention_backward, attention_forward, packed_layout
from burnish.ops.rope import Heads
from burnish.types import Batch

SCALE = 0.09
CALLS = 8
"""Of a burst."""
WAYS = ("FlashAttention 2", "by blocks", "cuDNN")
"""The first is what the others are held against."""


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
        names = [f"attention{back} {title}" for back in ("", " backward")]
        if not any(only in f"{name}, {way}" for name in names for way in WAYS):
            continue
        sizes = (heads.queries, heads.keys, heads.keys)
        buffer = torch.randn(sum(batch.lengths), sum(sizes), heads.width, device=device).bfloat16()
        dout = torch.randn(sum(batch.lengths), heads.queries, heads.width, device=device).bfloat16()
        given, first = buffer.split(sizes, dim=1), dict[str, float]()
        before = [length for _, length in batch.prefixes] or [0] * len(batch.lengths)
        seen = sum(own * (own + 1) // 2 + own * length for own, length in zip(batch.lengths, before, strict=True))
        for way, layout in layouts_of(device, batch).items():
            forward = partial(attention_forward, *given, layout, SCALE)
            back = partial(attention_backward, dout, given, *forward(), layout, SCALE)
            for name, call, products in zip(names, (forward, back), (2, 5), strict=True):
                if (taken := attempt(f"{name}, {way}", call, CALLS)) is not None:
                    rate = products * 2 * heads.width * heads.queries * seen / taken
                    share = f"{first.setdefault(name, taken) / taken:.3f} of {WAYS[0]}"
                    yield Reading(f"{name}, {way}", taken, f"{rate / 1e12:.0f} TFLOP/s", share)


def layouts_of(device: torch.device, batch: Attended) -> dict[str, Layout]:
    """The layout that each way of attention would be given."""
    starts = torch.tensor([0, *itertools.accumulate(batch.lengths)], dtype=torch.int32)
    one, count = torch.zeros(sum(batch.lengths)), len(batch.lengths)
    columns = (*[one.long()] * 2, one, one.long(), one.long(), starts, one.long()[:0])
    packed = Batch(*columns, count, max(batch.lengths), 0.0, prefixes=tuple(batch.prefixes)).to(device)
    layout = packed_layout(packed, padded=False)
    ways = {WAYS[0]: layout._replace(even=False, blocks=None)}
    if layout.blocks is not None:
        ways[WAYS[1]] = layout._replace(even=False)
    return ways | ({WAYS[2]: layout} if layout.even else {})
