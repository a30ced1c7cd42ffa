# pyright: basic, reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false
"""Tall matrices transposed times thin ones, read once at the speed of a copy: the twin of `ops.outer`.

A program takes a block of columns and a span of rows; the sums of the spans are added by a second launch.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

_PROGRAMS = 528
"""Spans are made until there are about so many programs: four on each of 132 multiprocessors."""
_ROWS, _STAGES = 64, 4
"""Rows read at a time, and how many times over: with 128 columns 16 KiB, of which three programs to a multiprocessor
have three under way each."""
_LEAST_ROWS = 256
"""No span is shorter, or its sums would be a large part of what is moved: 2 · 4 · R bytes a column to 2 · rows."""


def outer(x: Tensor, z: Tensor, widths: Sequence[int]) -> Tensor:
    """xᵀ z in fp32, for each of up to three parts of x of these widths and its columns of z.

    x and z have rows without gaps, at any distance.
    """
    (num_rows, width), rank = x.shape, z.shape[1] // len(widths)
    assert x.stride(1) == z.stride(1) == 1
    assert len(z) == num_rows
    assert sum(widths) == width
    padded = max(triton.next_power_of_2(rank), 16)
    columns, warps = (128, 4) if padded <= 64 else (64, 4) if padded <= 128 else (64, 8)
    first, second, third = *widths, *(3 - len(widths)) * (0,)
    blocks = sum(-(-part // columns) for part in widths)
    spans = max(min(_PROGRAMS // max(blocks, 1), num_rows // _LEAST_ROWS), 1)
    span = max(-(-num_rows // (spans * _ROWS)), 1) * _ROWS
    spans = max(-(-num_rows // span), 1)
    partial = torch.empty((spans, width, rank), dtype=torch.float32, device=x.device)
    if partial.numel():
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            _outer[(blocks, spans)](
                x, z, partial, num_rows, x.stride(0), z.stride(0), span, FIRST=first, SECOND=second, THIRD=third,
                RANK=rank, PADDED=padded, ROWS=_ROWS, COLUMNS=columns, num_warps=warps, num_stages=_STAGES,
            )  # fmt: skip
    return partial[0] if spans == 1 else partial.sum(dim=0)


@triton.jit
def _outer(
    x, z, partial, num_rows, x_stride, z_stride, span,
    FIRST: tl.constexpr, SECOND: tl.constexpr, THIRD: tl.constexpr,
    RANK: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    FIRST_BLOCKS: tl.constexpr = (FIRST + COLUMNS - 1) // COLUMNS
    SECOND_BLOCKS: tl.constexpr = (SECOND + COLUMNS - 1) // COLUMNS
    block = tl.program_id(0)
    part, offset, stop = 0, block * COLUMNS, FIRST
    if block >= FIRST_BLOCKS:
        part, offset, stop = 1, FIRST + (block - FIRST_BLOCKS) * COLUMNS, FIRST + SECOND
    if block >= FIRST_BLOCKS + SECOND_BLOCKS:
        part, offset = 2, FIRST + SECOND + (block - FIRST_BLOCKS - SECOND_BLOCKS) * COLUMNS
        stop = FIRST + SECOND + THIRD
    first = tl.program_id(1) * span
    last = min(first + span, num_rows)
    x += first.to(tl.int64) * x_stride
    z += first.to(tl.int64) * z_stride + part * RANK
    row = tl.arange(0, ROWS)
    column = offset + tl.arange(0, COLUMNS)
    rank = tl.arange(0, PADDED)
    place_x = row[:, None] * x_stride + column[None, :]
    place_z = row[:, None] * z_stride + rank[None, :]
    made = tl.zeros((COLUMNS, PADDED), tl.float32)
    for start in range(first, last, ROWS):
        exists = (start + row < last)[:, None]
        tall = tl.load(x + place_x, mask=exists & (column < stop)[None, :], other=0.0)
        thin = tl.load(z + place_z, mask=exists & (rank < RANK)[None, :], other=0.0)
        made = tl.dot(tl.trans(tall), thin, acc=made, input_precision="ieee")
        x += ROWS * x_stride
        z += ROWS * z_stride
    place = (tl.program_id(1).to(tl.int64) * (FIRST + SECOND + THIRD) + column)[:, None] * RANK + rank[None, :]
    tl.store(partial + place, made, mask=(column < stop)[:, None] & (rank < RANK)[None, :])
