"""What every system is trained on: the same lengths, the same random ids, the same steps. Imports no torch."""

import math
import random
from collections.abc import Mapping

from benchmarks.shapes import FIRST_ID, SHAPES

LENGTHS = ("fixed", "alpaca")
MEAN, SIGMA, SHORTEST = 270, 0.7, 16
"""Of Alpaca's rows, roughly: log-normal, 270 tokens in the mean, cut at `length`."""
ALPACA_ROWS, ALPACA_BATCH = 1024, 8
"""Rows that are drawn; and how many a step takes where a system does not pack them."""
WARM_UP, TIMED, USUAL = 4, 10, 8192
"""Steps of a turn that count for nothing, those that are timed, and the tokens of a step that both are meant for."""

CONTEXT = 0.7
"""GiB that a process on the device takes besides its tensors."""


def lengths_of(asked: Mapping[str, str], count: int) -> list[int]:
    """The lengths of the rows: all alike, or drawn like Alpaca's."""
    longest = int(asked["length"])
    if asked["lengths"] == "fixed":
        return [longest] * count
    draw, middle = random.Random(0), math.log(MEAN) - SIGMA**2 / 2
    drawn = (round(draw.lognormvariate(middle, SIGMA)) for _ in range(count))
    return [min(max(length, SHORTEST), longest) for length in drawn]


def rows_of(asked: Mapping[str, str], count: int) -> list[list[int]]:
    """So many rows of random ids; `count` is for rows of one length, ragged ones are always the same."""
    draw, vocab_size = random.Random(0), int(SHAPES[asked["shape"]]["vocab_size"])
    lengths = lengths_of(asked, count if asked["lengths"] == "fixed" else ALPACA_ROWS)
    return [[draw.randrange(FIRST_ID, vocab_size) for _ in range(length)] for length in lengths]


def turn_of(tokens: float) -> tuple[int, int]:
    """Steps of warm-up and timed ones: up to four times as many where a step holds few tokens."""
    factor = min(4, math.ceil(USUAL / tokens))
    return WARM_UP * factor, TIMED * factor


def sides_at_once(asked: Mapping[str, str], sides: list[str], num_peers: int, total_gib: float) -> list[list[str]]:
    """Which sides run with all their systems loaded at once: all of them where the device holds that, else each alone.

    A peer keeps its weights while it waits. The running one takes its own, as much again for what is made of them, and
    activations.
    """
    shape = {key: value for key, value in SHAPES[asked["shape"]].items() if isinstance(value, int)}
    width, depth, heads = shape["hidden_size"], shape["num_hidden_layers"], shape["num_attention_heads"]
    groups = shape["num_key_value_heads"] / heads
    block = 2 * width**2 * (1 + groups) + 3 * width * shape["intermediate_size"]
    tables = shape["vocab_size"] * width * (1 if shape.get("tie_word_embeddings") else 2)
    bytes_each = {"nf4": 0.52, "bf16": 2.0, "full16": 2.0, "full": 4.0}[asked["storage"]]
    weights = (depth * block * bytes_each + 2 * tables) / 2**30
    tokens = int(asked["sequences"]) * int(asked["length"])
    activations = tokens * depth * (6 * width + 4 * shape["intermediate_size"]) * 2 / 2**30
    running = 2 * weights + 1.2 * activations + 2
    return [sides] if running + num_peers * (weights + CONTEXT) <= 0.95 * total_gib else [[side] for side in sides]
