"""Attention over packed sequences in each way that takes them, beside FlashAttention 2: a part of `kernels.py`."""

import itertools
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from benchmarks.timing import Reading, attempt
from burnish.ops.attention import Layout, attention_backward, attention_forward, packed_layout
from burnish.types import Batch

Prefixes = Sequence[tuple[int, int]]
"""As a batch has them: where the prompt of each sequence starts that stands in another one, and its length."""
ATTENDED: Sequence[tuple[str, Sequence[int], Prefixes]] = (
    ("4x2048", [2048] * 4, ()),
    ("packed 8192 in 7", [2500, 1800, 1500, 1000, 700, 400, 292], ()),
    ("30x270", [270] * 30, ()),
    (
        "4x(1024 shared + 4x256)",
        [1280, 256, 256, 256] * 4,
        [(2048 * group, 1024 if number else 0) for group in range(4) for number in range(4)],
    ),
)
"""Their title, the tokens of each sequence of its own, and what it reads before them."""
HEADS, WIDTH, SCALE = 32, 128, 0.09
CALLS = 8
"""Of a burst."""
WAYS = ("FlashAttention 2", "by blocks", "cuDNN")
"""The first is what the others are held against."""


def attention_readings(device: torch.device, only: str) -> Iterator[Reading]:
    """What each way reaches, in operations of the scores that are seen."""
    for (title, lengths, prefixes), groups in itertools.product(ATTENDED, (HEADS, HEADS // 4)):
        names = [f"attention{back} {title}, {HEADS} heads on {groups}" for back in ("", " backward")]
        if not any(only in f"{name}, {way}" for name in names for way in WAYS):
            continue
        buffer = torch.randn(sum(lengths), HEADS + 2 * groups, WIDTH, device=device).bfloat16()
        dout = torch.randn(sum(lengths), HEADS, WIDTH, device=device).bfloat16()
        given, first = buffer.split((HEADS, groups, groups), dim=1), dict[str, float]()
        before = [length for _, length in prefixes] or [0] * len(lengths)
        seen = sum(own * (own + 1) // 2 + own * length for own, length in zip(lengths, before, strict=True))
        for way, layout in layouts_of(device, lengths, prefixes).items():
            forward = partial(attention_forward, *given, layout, SCALE)
            back = partial(attention_backward, dout, given, *forward(), layout, SCALE)
            for name, call, products in zip(names, (forward, back), (2, 5), strict=True):
                if (taken := attempt(f"{name}, {way}", call, CALLS)) is not None:
                    rate = products * 2 * WIDTH * HEADS * seen / taken
                    share = f"{first.setdefault(name, taken) / taken:.3f} of {WAYS[0]}"
                    yield Reading(f"{name}, {way}", taken, f"{rate / 1e12:.0f} TFLOP/s", share)


def layouts_of(device: torch.device, lengths: Sequence[int], prefixes: Prefixes) -> dict[str, Layout]:
    """The layout of sequences that each way of attention would be given."""
    starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    one = torch.zeros(sum(lengths))
    batch = Batch(
        *[one.long()] * 2, one, one.long(), one.long(), starts, one.long()[:0], len(lengths), max(lengths), 0.0,
        prefixes=tuple(prefixes),
    ).to(device)  # fmt: skip
    layout = packed_layout(batch, padded=False)
    ways = {WAYS[0]: layout._replace(even=False, blocks=None)}
    if layout.blocks is not None:
        ways[WAYS[1]] = layout._replace(even=False)
    return ways | ({WAYS[2]: layout} if layout.even else {})
