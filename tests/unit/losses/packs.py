"""Packed batches written as patterns: "00110" is a sequence of five positions, the third and fourth with weight.

A unit is the answers to one prompt, the best first: every two of them are a pair.
"""

from collections.abc import Sequence
from itertools import combinations

import torch

from burnish.types import Batch, PreferenceBatch


def packed(patterns: Sequence[str], dtype: torch.dtype = torch.float64) -> Batch:
    return Batch(**_columns(patterns, dtype))


def compared(units: Sequence[Sequence[str]], dtype: torch.dtype = torch.float64) -> PreferenceBatch:
    """Margins are a tenth of the pair's number; labels go 1, −1, 0, 1, −1, 0, ..."""
    pairs: list[tuple[int, int, float]] = []
    first = 0
    for unit in units:
        places = list(combinations(range(first, first + len(unit)), 2))
        pairs += [(better, worse, 1 / len(places)) for better, worse in places]
        first += len(unit)
    patterns = [pattern for unit in units for pattern in unit]
    labels = torch.tensor([(1, -1, 0)[i % 3] for i in range(len(patterns))])
    return PreferenceBatch(
        **_columns(patterns, dtype),
        chosen=torch.tensor([better for better, _, _ in pairs], dtype=torch.int64),
        rejected=torch.tensor([worse for _, worse, _ in pairs], dtype=torch.int64),
        margins=torch.tensor([0.1 * (place % 3) for place in range(len(pairs))], dtype=dtype),
        pair_weights=torch.tensor([weight for _, _, weight in pairs], dtype=dtype),
        labels=labels,
        num_pairs=float(sum(len(unit) > 1 for unit in units)),
        num_labels=int((labels != 0).sum()),
    )


def _columns(patterns: Sequence[str], dtype: torch.dtype) -> dict:
    lengths = torch.tensor([len(pattern) for pattern in patterns])
    sequence = torch.arange(len(patterns)).repeat_interleave(lengths)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    weights = torch.tensor([float(weight) for weight in "".join(patterns)], dtype=dtype)
    assert all(pattern[-1] == "0" for pattern in patterns), "nothing follows the last position of a sequence"
    return {
        "tokens": torch.zeros(len(weights), dtype=torch.int64),
        "targets": torch.zeros(len(weights), dtype=torch.int64),
        "weights": weights,
        "positions": torch.arange(len(weights)) - starts[sequence],
        "sequence": sequence,
        "starts": starts.int(),
        "scored": weights.nonzero()[:, 0],
        "num_sequences": len(patterns),
        "longest": int(lengths.max()),
        "total_weight": float(weights.sum()),
    }
