# pyright: basic, reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false
"""Rows of logits, read once for their statistics and once for their gradient: the twin of `ops.log_probs`.

A program takes one row, however long. The gradient is written in the memory of the logits: where it is half as wide it
fills the second half of each row, from the end, so that no logit is overwritten before it was read.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

_MOST_COLUMNS = 4096
"""Columns read at a time: two programs of 512 threads keep a multiprocessor's share of the memory bus busy."""


def read_rows(
    logits: Tensor, targets: Tensor, softcap: float | None, dtype: torch.dtype, wants_gradient: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(log-probability of the target, log Σ exp z, argmax == target, gradient in `dtype` or None) of each row.

    Of several highest logits the first counts. The logits are contiguous; with a gradient they are overwritten. All
    else is the same to the last bit with a gradient and without: one program computes both.
    """
    rows, columns = logits.shape
    assert logits.is_contiguous()
    log_probs, totals = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    correct = torch.empty(rows, dtype=torch.bool, device=logits.device)
    gradient = _over(logits, dtype)  # where it is not wanted too: a pointer of another dtype were another program
    if rows:
        block, warps = _launch(columns)
        with torch.cuda.device(logits.device) if logits.is_cuda else nullcontext():
            _read_rows[(rows,)](
                logits, targets.contiguous(), log_probs, totals, correct, gradient, columns, gradient.stride(0),
                int(wants_gradient), softcap or 1.0, CAPPED=softcap is not None, BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return log_probs, totals, correct, gradient if wants_gradient else None


def logit_gradient(
    logits: Tensor,
    targets: Tensor,
    totals: Tensor,
    weights: Tensor,
    first: int,
    softcap: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """weight · (onehot(target) - softmax(z)) · z' of each row, over its logits, which are columns `first` and on."""
    rows, columns = logits.shape
    assert all(part.is_contiguous() for part in (logits, targets, totals, weights))
    gradient = _over(logits, dtype)
    if rows:
        block, warps = _launch(columns)
        with torch.cuda.device(logits.device) if logits.is_cuda else nullcontext():
            _logit_gradient[(rows,)](
                logits, targets, totals, weights, gradient, first, columns, gradient.stride(0), softcap or 1.0,
                CAPPED=softcap is not None, BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return gradient


def _over(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for as many numbers in the memory of the logits: at the end of each row."""
    assert dtype.itemsize <= logits.element_size()
    whole = logits.view(dtype)
    return whole[:, whole.shape[1] - logits.shape[1] :]


def _launch(columns: int) -> tuple[int, int]:
    """(columns at a time, warps): eight columns a thread."""
    block = min(_MOST_COLUMNS, 1 << (max(columns, 256) - 1).bit_length())
    return block, block // 256


@triton.jit(do_not_specialize=["wants_gradient"])
def _read_rows(
    logits, targets, log_probs, totals, correct, gradient, num_columns, gradient_stride, wants_gradient, cap,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    here = logits + row * num_columns
    target = tl.load(targets + row)
    chosen = _capped(tl.load(here + target).to(tl.float32), cap, CAPPED)
    # Each lane has the highest of its logits so far and the sum of exp(z - highest): one exponential a logit.
    highest = tl.full([BLOCK], -1e38, tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    beaten = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < num_columns
        z = _capped(tl.load(here + column, mask=inside, other=0.0).to(tl.float32), cap, CAPPED)
        z = tl.where(inside, z, -float("inf"))
        beaten |= ((z > chosen) | ((z == chosen) & (column < target))).to(tl.int32)
        gap = z - highest
        smaller = tl.exp(-tl.abs(gap))
        mass = tl.where(gap > 0, mass * smaller + 1.0, mass + smaller)
        highest = tl.maximum(highest, z)
    top = tl.max(highest, 0)
    log_mass = tl.log(tl.sum(mass * tl.exp(highest - top), 0))
    total = top + log_mass
    tl.store(log_probs + row, (chosen - top) - log_mass)
    tl.store(totals + row, total)
    tl.store(correct + row, tl.max(beaten, 0) == 0)
    if wants_gradient != 0:
        _write_gradient(
            here, gradient + row * gradient_stride, target, total, 1.0, num_columns, cap, CAPPED, BLOCK
        )  # fmt: skip


@triton.jit
def _logit_gradient(
    logits, targets, totals, weights, gradient, first, num_columns, gradient_stride, cap,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    _write_gradient(
        logits + row * num_columns, gradient + row * gradient_stride, tl.load(targets + row) - first,
        tl.load(totals + row), tl.load(weights + row), num_columns, cap, CAPPED, BLOCK,
    )  # fmt: skip


@triton.jit
def _write_gradient(
    here, there, target, total, weight, num_columns, cap, CAPPED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    # From the end: column c is written where column (num_columns + c) / 2 was read, which lies behind it. What was read
    # last is also still in the cache.
    count = tl.cdiv(num_columns, BLOCK)
    for index in range(0, count):
        column = (count - 1 - index) * BLOCK + tl.arange(0, BLOCK)
        inside = column < num_columns
        z = _capped(tl.load(here + column, mask=inside, other=0.0).to(tl.float32), cap, CAPPED)
        slope = weight * (tl.where(column == target, 1.0, 0.0) - tl.exp(tl.where(inside, z - total, 0.0)))
        if CAPPED:
            slope *= 1.0 - (z / cap) * (z / cap)
        tl.debug_barrier()  # every thread has read these columns before one is overwritten
        tl.store(there + column, slope.to(there.dtype.element_ty), mask=inside)


@triton.jit
def _capped(x, cap, CAPPED: tl.constexpr):
    """cap · tanh(x / cap), by an exponential that cannot overflow."""
    if CAPPED:
        small = tl.exp(-2.0 * tl.abs(x) / cap)
        size = cap * ((1.0 - small) / (1.0 + small))
        x = tl.where(x < 0, -size, size)
    return x
