"""Rows of tensors, some at a time: what goes over many tokens in tiles needs memory for one tile."""

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from burnish.ops.fp8 import Quantised

ROWS = 128
"""Tiles hold a multiple of so many rows, as a matmul's own tiles do; the last one may hold fewer."""


def tiles_of(num_tokens: int, tile: int | None) -> list[slice | None]:
    """The tiles of so many tokens, nearly alike and about `tile` tokens each; one of None, which is all, without it."""
    if tile is None or num_tokens <= tile:
        return [None]
    count = -(-num_tokens // tile)
    size = -(-num_tokens // (count * ROWS)) * ROWS
    return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]


@overload
def part_of(x: Tensor, rows: slice | None) -> Tensor: ...
@overload
def part_of(x: Tensor | None, rows: slice | None) -> Tensor | None: ...
def part_of(x: Tensor | None, rows: slice | None) -> Tensor | None:
    """These rows; all for None."""
    return x if x is None or rows is None else x[rows]


def rows8(x8: Quantised | None, rows: slice | None) -> Quantised | None:
    """These rows in 8 bits."""
    return x8 if x8 is None or rows is None else Quantised(x8.values[rows], x8.scale[rows])


def joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """One below the other; None where there is nothing."""
    present = [part for part in parts if part is not None]
    return present[0] if len(present) == 1 else torch.cat(present) if present else None
