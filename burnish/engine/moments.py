"""What a block of a decoder holds at its worst moments, in bytes: who lives when in `model/fused_pass.py`.

Each moment is a sum: what waits on the shelf for this block, what the block computes with, and what comes back from the
host for the block that is next. Numbers per token of LoRA and norms are counted elsewhere.
"""

from collections.abc import Mapping, Set
from typing import NamedTuple

ATTENTION = frozenset({"x", "qkv", "attention"})
"""What the backward pass of the attention half takes from the shelf."""


class Widths(NamedTuple):
    """Bytes of what passes through a block, for the largest micro-batch."""

    saved: Mapping[str, int]
    """By the names of `model.shelf.NAMES`."""
    sums: int
    """What attention's backward pass adds up in fp32."""
    weights: Mapping[str, int]
    """By joint layers, what a decoded weight takes while it is multiplied with; 0 where weights are used as stored."""
    eighths: float = 0.0
    """What a tensor takes once more in 8 bits, as a share of itself; 0 without FP8."""
    turned: int = 0
    """q and k after the norms of heads, which are kept as they were before them; 0 where there are none."""
    copied: tuple[int, int] = (0, 0)
    """What attention holds besides: copies of shared keys and values on the way in, and their gradients on the way."""
    clones: bool = False
    """Whether LoRA's rank is beyond the gate's kernels, which then works on a copy of gate and up."""
    own: int = 0
    """The gradient of the largest joint layer, where weights train and a second micro-batch adds to it."""


def forward_peak(widths: Widths, waiting: Set[str], leaving: int, decoded: bool = False, share: float = 1.0) -> int:
    """The most that a block's forward pass holds beside what waits for other blocks.

    `waiting` are the names that will wait on the shelf, `leaving` bytes of the block before that are on their way to
    the host; `share` is the part of the tokens that the MLP takes at a time; `decoded`: its weights lie ready.
    """
    x, gate_up = widths.saved["x"], widths.saved["gate_up"]
    weights = _none(widths.weights) if decoded else widths.weights
    kept = sum(widths.saved[name] for name in waiting - {"gate_up"})
    middle = 0 if "x_mid" in waiting else x
    whole = "gate_up" in waiting
    part = gate_up if whole else round(gate_up * share)
    both = 0 if whole or share == 1 else weights["gate_up"] + weights["down"]
    normed = x + round(x * widths.eighths)
    outputs = x if share < 1 and not whole else 0
    made = max(
        normed + part + (both or weights["gate_up"]),
        part
        + (part if widths.clones else part // 2)
        + round(part // 2 * widths.eighths)
        + both
        + (normed if both else 0),
        (part if whole else 0) + part // 2 + x + (both or weights["down"]) + (normed if both else 0),
    )
    return kept + middle + leaving + outputs + made


def backward_peak(
    widths: Widths, kept: Set[str], host: Set[str], coming: int, decoded: bool = False, share: float = 1.0
) -> int:
    """The most that a block's backward pass holds beside what waits for the blocks before it.

    `kept` and `host` say where its own tensors waited; `coming` are the bytes that come back from the host meanwhile
    for the block before it.
    """
    weights = _none(widths.weights) if decoded else widths.weights
    mlp = _mlp_moments(widths, kept, host, share, weights)
    # The gradient that the pass began with is there until its end: autograd holds it.
    return widths.saved["x"] + max(mlp, coming + _attention_moments(widths, kept | host, weights))


def _mlp_moments(widths: Widths, kept: Set[str], host: Set[str], share: float, weights: Mapping[str, int]) -> int:
    saved, have = widths.saved, kept | host
    x, gate_up = saved["x"], saved["gate_up"]
    # To compute x_mid again takes attention first: what that half wants is then there from the start.
    early = ATTENTION if "x_mid" not in have else ATTENTION & kept
    back = sum(saved[name] for name in ATTENTION & host - early)
    base = sum(saved[name] for name in early) + 2 * x + round(x * widths.eighths)  # x_mid, and the gradient from above
    tiled = share < 1 and "gate_up" not in have
    part = round(gate_up * share) if tiled else gate_up
    # In 8 bits gate and up are there in both of their layouts.
    both = weights["gate_up"] * (2 if widths.eighths else 1) + weights["down"] if tiled else 0
    normed = 0 if "gate_up" in have else x + round(x * widths.eighths)
    if tiled:
        base += x  # the gradients of the tiles, and at the end all of them side by side
        normed = round(normed * share)
    return max(
        base + part + normed + (both or (weights["gate_up"] if normed else 0)),
        base + part + part // 2 + (both or weights["down"]),
        base + part + part // 2 + round(part * widths.eighths) + both + widths.own,
        base + back + part + round(part * widths.eighths) + round(x * share) + (both or weights["gate_up"]),
        base + back + 3 * x,
    )


def _attention_moments(widths: Widths, have: Set[str], weights: Mapping[str, int]) -> int:
    saved = widths.saved
    x, qkv, out = saved["x"], saved["qkv"], saved["attention"]
    above = x + round(x * widths.eighths)
    again = 0 if "qkv" in have else x + round(x * widths.eighths) + weights["qkv"]
    first = widths.turned + widths.copied[0] + out if "attention" not in have else out
    back = qkv + widths.sums + widths.turned + sum(widths.copied)
    return max(
        x + qkv + above + max(first, again),
        x + qkv + out + above + out + max(weights["o"], back),
        x + above + 2 * qkv + round(qkv * widths.eighths) + (qkv if widths.turned else 0),
        x + above + qkv + round(qkv * widths.eighths) + x + weights["qkv"] + widths.own // 2,
        x + above + 3 * x,
    )


def _none(weights: Mapping[str, int]) -> Mapping[str, int]:
    return dict.fromkeys(weights, 0)
