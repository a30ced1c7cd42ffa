"""What `benchmarks/memory.py` measures: the work, the memory that it may take, and what others promise. No torch."""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, TypeVar

from benchmarks.turns import Clock

R = TypeVar("R")


class Row(NamedTuple):
    """One piece of work and its cap."""

    what: str
    """In words, for docs/performance.md."""
    promise: str
    """What the field says that it takes."""
    target: str
    """What it is to take here, and do besides."""
    cap: str
    """What PyTorch's allocator may hold of the card."""
    kind: Literal["sft", "dpo", "ppo", "longest"]
    storage: str
    seconds: int
    """About as long as it may take on an H100, from the start of its process on; it is not begun with less."""
    shape: str = "llama-2-7b"
    length: int = 2048
    """Tokens of a sequence; of a pair's, and of an answer with its prompt, half of them are the prompt. Of `longest`
    where the search begins."""
    sequences: int = 1
    """Sequences, pairs or prompts of a step."""
    rank: int = 16
    """Of LoRA on all linear layers; 0: all weights are trained."""

    @property
    def tokens(self) -> int:
        """Tokens of a step, as peers count them: what a pair shares as often as it is read."""
        return self.sequences * self.length * (2 if self.kind == "dpo" else 1)


ROWS: Mapping[str, Row] = {
    "qlora-4x2048": Row(
        "QLoRA 7B, 4 x 2,048 tokens a step",
        "6 GB; Unsloth measured 5.54 GiB, TRL 7.17",
        "5.0 GiB, at no less than Unsloth's speed",
        *("5.0GiB", "sft", "nf4", 75),
        sequences=4,
    ),
    "qlora-1x2048": Row("QLoRA 7B, 1 x 2,048", "", "4.4 GiB", "4.4GiB", "sft", "nf4", 75),
    "lora-bf16": Row("LoRA 7B on bf16 weights, 1 x 2,048", "16 GB", "13.8 GiB", "13.8GiB", "sft", "bf16", 75),
    "full": Row("all weights of 7B, 1 x 2,048", "28 GB", "20 GiB", "20GiB", "sft", "full16", 90, rank=0),
    "dpo-full": Row(
        "DPO with all weights of 7B, 2 pairs of 512 + 512",
        "28 GB",
        "20 GiB",
        *("20GiB", "dpo", "full16", 90),
        length=1024,
        sequences=2,
        rank=0,
    ),
    "dpo-qlora": Row(
        "DPO with QLoRA 7B, 2 pairs of 512 + 512",
        "Unsloth measured 5.1 GiB, TRL 5.7",
        "5.5 GiB",
        *("5.5GiB", "dpo", "nf4", 75),
        length=1024,
        sequences=2,
    ),
    "ppo-bf16": Row(
        "PPO 7B, four roles on bf16 weights, 16 x (256 + 256)",
        "56 GB",
        "24 GiB",
        *("24GiB", "ppo", "bf16", 100),
        length=512,
        sequences=16,
    ),
    "ppo-nf4": Row(
        "PPO 7B, four roles on NF4 weights, 16 x (256 + 256)",
        "56 GB",
        "12 GiB",
        *("12GiB", "ppo", "nf4", 100),
        length=512,
        sequences=16,
    ),
    "qlora-65b": Row(
        "QLoRA 65B, rank 64, 1 x 2,048",
        "48 GB",
        "48 GB, at 1,400 tokens/s or more",
        *("48GB", "sft", "nf4", 150, "llama-65b"),
        rank=64,
    ),
    "longest": Row(
        "the longest sequence with QLoRA 8B",
        "Unsloth: 78k tokens in 24 GB",
        "80,000 tokens or more in 24 GB",
        *("24GB", "longest", "nf4", 240, "llama-3.1-8b"),
        length=81920,
    ),
}
"""GiB are of 2^30 bytes. What is 48 GB or 24 GB to others is held to 10^9: the rest of such a card is the driver's."""
UNIT, MOST = 4096, 131072
"""The longest sequence is found to so many tokens; and the longest that is tried, where nothing else is asked for."""
SMALLER = 32
"""Of a row's tokens, `shape=tiny` takes one in so many; of the longest sequence's, one in so many squared."""


def sized(row: Row, shape: str) -> Row:
    """The row, or with `tiny` the same work in a size for a CPU."""
    if shape != "tiny":
        return row
    return row._replace(shape=shape, length=row.length // (SMALLER**2 if row.kind == "longest" else SMALLER))


def longest(
    measure: Callable[[int], R | None], first: int, most: int, unit: int, clock: Clock
) -> tuple[int, R | None, str]:
    """The longest length that can be measured, what was measured of it, and whether the clock ended the search.

    `measure` gives None for a length that does not fit. From `first` on lengths are doubled, up to `most`; then the
    last step is halved until it is `unit`. Attention's time grows with the square of the length: one that by this would
    take longer than the clock leaves is not tried.
    """
    best, found, fails, took, length = 0, None, None, 0.0, first
    while length > best:
        if best and took * (length / best) ** 2 > clock.left():
            return best, found, f"{length:,} tokens were not tried, for want of time"
        before = clock.left()
        reading = measure(length)
        if reading is None:
            fails = length
        else:
            best, found, took = length, reading, before - clock.left()
        length = min(2 * best, most) if fails is None else (best + fails) // 2 // unit * unit
    return best, found, ""
