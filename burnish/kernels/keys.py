# pyright: basic, reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false
"""Keys and values copied to all who read them, and the gradients of the copies added up: the twins of `ops.keys`.

A program has one row of the keys and the same of the values, or a block of their columns.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 2048
"""The most that a program takes of a row."""


def copy_out(k: Tensor, v: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of k and of v at these positions. Rows of either may be at any distance."""
    assert k.shape == v.shape
    assert all(x.stride(2) == 1 and x.stride(1) == x.shape[2] for x in (k, v))
    width = k.shape[1] * k.shape[2]
    copies = [torch.empty((len(position), *x.shape[1:]), dtype=x.dtype, device=x.device) for x in (k, v)]
    if len(position):
        block = min(triton.next_power_of_2(width), _COLUMNS)
        with torch.cuda.device(k.device) if k.is_cuda else nullcontext():
            _copy_out[(len(position), triton.cdiv(width, block))](
                k, v, *copies, position, k.stride(0), v.stride(0), WIDTH=width, BLOCK=block, num_warps=4
            )
    return copies[0], copies[1]


def add_up(dk: Tensor, dv: Tensor, copies: Tensor, copy_starts: Tensor) -> tuple[Tensor, Tensor]:
    """For each position, the sum of the rows of its copies: first to last, in fp32."""
    assert dk.shape == dv.shape
    dk, dv = dk.contiguous(), dv.contiguous()
    num_rows, width = len(copy_starts) - 1, dk.shape[1] * dk.shape[2]
    sums = [torch.empty((num_rows, *x.shape[1:]), dtype=x.dtype, device=x.device) for x in (dk, dv)]
    if num_rows:
        block = min(triton.next_power_of_2(width), _COLUMNS)
        with torch.cuda.device(dk.device) if dk.is_cuda else nullcontext():
            _add_up[(num_rows, triton.cdiv(width, block))](
                dk, dv, *sums, copies, copy_starts, WIDTH=width, BLOCK=block, num_warps=4
            )
    return sums[0], sums[1]


@triton.jit
def _copy_out(
    k, v, k_copies, v_copies, position, k_stride, v_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    copy = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = column < WIDTH
    row = tl.load(position + copy).to(tl.int64)
    keys = tl.load(k + row * k_stride + column, mask=exists)
    values = tl.load(v + row * v_stride + column, mask=exists)
    tl.store(k_copies + copy * WIDTH + column, keys, mask=exists)
    tl.store(v_copies + copy * WIDTH + column, values, mask=exists)


@triton.jit
def _add_up(
    dk, dv, dk_sums, dv_sums, copies, copy_starts, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = column < WIDTH
    keys, values = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    first, last = tl.load(copy_starts + row), tl.load(copy_starts + row + 1)
    for place in range(first, last):
        copy = tl.load(copies + place).to(tl.int64)
        keys += tl.load(dk + copy * WIDTH + column, mask=exists, other=0.0).to(tl.float32)
        values += tl.load(dv + copy * WIDTH + column, mask=exists, other=0.0).to(tl.float32)
    tl.store(dk_sums + row * WIDTH + column, keys.to(dk_sums.dtype.element_ty), mask=exists)
    tl.store(dv_sums + row * WIDTH + column, values.to(dv_sums.dtype.element_ty), mask=exists)
