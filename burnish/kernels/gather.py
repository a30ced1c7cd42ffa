# pyright: basic, reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false
"""Rows of a table in pinned host memory, read by the device itself: the twin of `ops.gather`."""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 2048


def gather_rows(table: Tensor, places: Tensor) -> Tensor:
    """Row places[t] of the table for each t, on the device of `places`; NaN, which a step refuses, outside it."""
    assert table.is_contiguous()
    (rows,), (height, columns) = places.shape, table.shape
    out = torch.empty(rows, columns, dtype=table.dtype, device=places.device)
    if rows:
        block = min(_COLUMNS, triton.next_power_of_2(columns))
        with torch.cuda.device(places.device) if places.is_cuda else nullcontext():
            _gather[(rows, triton.cdiv(columns, block))](table, places.contiguous(), out, height, columns, BLOCK=block)
    return out


@triton.jit
def _gather(table, places, out, height, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(places + row).to(tl.int64)
    inside = (place >= 0) & (place < height) & (column < columns)
    values = tl.load(table + place * columns + column, mask=inside, other=float("nan"))
    tl.store(out + row * columns + column, values, mask=column < columns)
