# pyright: basic, reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
"""The residual addition and its norm: the twins of `ops.add_norm`.

Forward, a program has 32 rows and walks them in chunks of columns. What needs a statistic of the whole row walks them
again, the other way round: what was touched last is still in the L2 cache.

Backward, a program has one row, whole in registers, and reads and writes it once. The low-rank products are made
before and after it: a row alone would read all of A and B, and 16 rows of three tensors fit into no cache.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from burnish.kernels.fp8 import row_scale


class Launch(NamedTuple):
    """How a kernel of rows is launched."""

    rows: int
    chunk: int
    """Columns at a time."""
    warps: int
    stages: int
    """Chunks under way at once: their loads are asynchronous copies into shared memory."""


# Two programs to a multiprocessor: one loads while the other waits at the end of a pass, and 8,192 rows are one round.
# Fewer rows at a time would leave more of them in the L2 cache, but read A and B more often.
FORWARD = Launch(rows=32, chunk=128, warps=8, stages=4)
PRODUCT = Launch(rows=64, chunk=128, warps=4, stages=5)
_SPAN = 16
"""Rows whose part of the gradient of the weight one program adds up."""


def add_norm(
    x: Tensor,
    y: Tensor | None,
    xa: Tensor | None,
    B: Tensor | None,
    weight: Tensor,
    eps: float,
    offset: float,
    A: Tensor | None,
    fp8: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(x', rstd, h, scale of h, ha): h is in 8 bits and has a scale where `fp8`."""
    num_rows, width = x.shape
    stream = x if y is None else torch.empty_like(x)
    rstd = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    h = torch.empty(x.shape, dtype=torch.float8_e4m3fn if fp8 else x.dtype, device=x.device)
    scale = torch.empty_like(rstd) if fp8 else None
    ha = None if A is None else torch.empty((num_rows, A.shape[0]), dtype=x.dtype, device=x.device)
    assert all(part is None or part.is_contiguous() for part in (x, y, xa, B, weight, A))
    if num_rows:
        with _on(x):
            _add_norm[(triton.cdiv(num_rows, FORWARD.rows),)](
                x, y, xa, B, weight, A, stream, rstd, h, scale, ha, num_rows, eps, offset,
                D=width, SUM=y is not None, FP8=fp8, **_sizes(FORWARD, width, A, B),
            )  # fmt: skip
    return stream, rstd, h, scale, ha


def norm_again(x: Tensor, rstd: Tensor, weight: Tensor, offset: float, fp8: bool) -> tuple[Tensor, Tensor | None]:
    """(h, its scale where `fp8`)."""
    num_rows, width = x.shape
    h = torch.empty(x.shape, dtype=torch.float8_e4m3fn if fp8 else x.dtype, device=x.device)
    scale = torch.empty_like(rstd) if fp8 else None
    assert all(part.is_contiguous() for part in (x, rstd, weight))
    block = _power_of_two(width)
    if num_rows:
        with _on(x):
            # 16 values to a thread, a whole row in registers.
            _norm_again[(num_rows,)](
                x, rstd, weight, h, scale, offset,
                D=width, FP8=fp8, BLOCK=block, num_warps=max(1, min(block // 512, 16)),
            )  # fmt: skip
    return h, scale


def add_norm_backward(
    dh: Tensor,
    x: Tensor,
    rstd: Tensor,
    dx_new: Tensor | None,
    dha: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    w_scale: Tensor | None,
    weight: Tensor,
    offset: float,
    wants_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dxa, dx8, scale of dx8, dweight)."""
    num_rows, width = x.shape
    span = _SPAN if wants_weight else 1
    num_programs = triton.cdiv(num_rows, span)
    dx = torch.empty_like(x)
    dx8 = None if w_scale is None else torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = None if w_scale is None else torch.empty_like(rstd)
    # One row of sums for each program, added up in a fixed order below: no atomics.
    parts = torch.empty((num_programs, width), dtype=torch.float32, device=x.device) if wants_weight else None
    assert all(part is None or part.is_contiguous() for part in (dh, x, rstd, dx_new, dha, A, B, w_scale, weight))
    low = None if dha is None or A is None else dha @ A
    block = _power_of_two(width)
    if num_rows:
        with _on(x):
            _add_norm_backward[(num_programs,)](
                dh, x, rstd, dx_new, low, w_scale, weight, dx, dx8, scale, parts, num_rows, offset,
                D=width, STREAM=dx_new is not None, LOW=low is not None, FP8=w_scale is not None, WEIGHT=wants_weight,
                SPAN=span, BLOCK=block, num_warps=max(1, min(block // 256, 16)),
            )  # fmt: skip
    dxa = None if B is None else _times(dx, B)
    return dx, dxa, dx8, scale, None if parts is None else parts.sum(dim=0)


def _times(x: Tensor, B: Tensor) -> Tensor:
    """x B, for a B of few columns: x is read once, from its first row, which was written last."""
    (num_rows, width), rank = x.shape, B.shape[1]
    made = torch.empty((num_rows, rank), dtype=x.dtype, device=x.device)
    padded = _power_of_two(rank)
    chunk = _chunk(PRODUCT, width, padded)
    if num_rows:
        with _on(x):
            _product[(triton.cdiv(num_rows, PRODUCT.rows),)](
                x, B, made, num_rows, D=width, RANK=rank, PADDED=padded, ROWS=PRODUCT.rows, CHUNK=chunk,
                STAGES=PRODUCT.stages, num_warps=PRODUCT.warps,
            )  # fmt: skip
    return made


@triton.jit(do_not_specialize=["num_rows"])
def _add_norm(
    x, y, xa, B, weight, A, stream, rstd, h, scale, ha, num_rows, eps, offset,
    D: tl.constexpr, ADDED: tl.constexpr, READ: tl.constexpr, ADDED_PAD: tl.constexpr, READ_PAD: tl.constexpr,
    SUM: tl.constexpr, FP8: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS  # only this needs 64 bits: places are counted from here
    row = tl.arange(0, ROWS)
    real = first + row < num_rows
    dtype: tl.constexpr = x.dtype.element_ty
    if ADDED:
        added = tl.arange(0, ADDED_PAD)
        valid = real[:, None] & (added < ADDED)
        low = tl.load(xa + first * ADDED + (row[:, None] * ADDED + added), mask=valid, other=0.0)
    # Sums and maxima are kept by columns of the chunk: one reduction over threads at the end, not one for each chunk.
    squares = tl.zeros((ROWS, CHUNK), tl.float32)
    largest = tl.zeros((ROWS, CHUNK), tl.float32)
    for start in tl.range(0, D, CHUNK, num_stages=STAGES):
        column = start + tl.arange(0, CHUNK)
        mask = real[:, None] & (column < D)
        place = row[:, None] * D + column
        value = tl.load(x + first * D + place, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if SUM:
            value += tl.load(y + first * D + place, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
            if ADDED:
                b = _columns_of(B, column, added, ADDED, D)
                value += tl.dot(low, tl.trans(b), input_precision="ieee")
            rounded = value.to(dtype)
            tl.store(stream + first * D + place, rounded, mask=mask)
            value = rounded.to(tl.float32)
        squares += value * value
        if FP8:
            largest = tl.maximum(largest, tl.abs(value * _gain(weight, column, offset, D)[None, :]))
    inverse_rms = tl.rsqrt(tl.sum(squares, axis=1) / D + eps)
    tl.store(rstd + first + row, inverse_rms, mask=real)
    if FP8:
        divisor = row_scale((tl.max(largest, axis=1) * inverse_rms).to(dtype).to(tl.float32))
        tl.store(scale + first + row, divisor, mask=real)
        inverse_scale = tl.div_rn(1.0, divisor)
    if READ:
        read = tl.arange(0, READ_PAD)
        product = tl.zeros((ROWS, READ_PAD), tl.float32)
    tl.debug_barrier()  # threads read below what others of the program have written above
    for back in tl.range(0, tl.cdiv(D, CHUNK), num_stages=STAGES):
        column = (tl.cdiv(D, CHUNK) - 1 - back) * CHUNK + tl.arange(0, CHUNK)
        mask = real[:, None] & (column < D)
        place = row[:, None] * D + column
        value = tl.load(stream + first * D + place, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        normed = (value * _gain(weight, column, offset, D)[None, :] * inverse_rms[:, None]).to(dtype)
        if FP8:
            short = (normed.to(tl.float32) * inverse_scale[:, None]).to(tl.float8e4nv)
            tl.store(h + first * D + place, short, mask=mask)
        else:
            tl.store(h + first * D + place, normed, mask=mask)
        if READ:
            a = _rows_of(A, read, column, READ, D)
            product = tl.dot(normed, tl.trans(a), product, input_precision="ieee")
    if READ:
        valid = real[:, None] & (read < READ)
        tl.store(ha + first * READ + (row[:, None] * READ + read), product.to(dtype), mask=valid)


@triton.jit
def _norm_again(x, rstd, weight, h, scale, offset, D: tl.constexpr, FP8: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < D
    value = tl.load(x + row * D + column, mask=mask, other=0.0).to(tl.float32)
    normed = (value * _gain(weight, column, offset, D) * tl.load(rstd + row)).to(x.dtype.element_ty)
    if FP8:
        wide = normed.to(tl.float32)
        divisor = row_scale(tl.max(tl.abs(wide), axis=0))
        tl.store(scale + row, divisor)
        tl.store(h + row * D + column, (wide * tl.div_rn(1.0, divisor)).to(tl.float8e4nv), mask=mask)
    else:
        tl.store(h + row * D + column, normed, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _add_norm_backward(
    dh, x, rstd, dx_new, low, w_scale, weight, dx, dx8, scale, parts, num_rows, offset,
    D: tl.constexpr, STREAM: tl.constexpr, LOW: tl.constexpr, FP8: tl.constexpr, WEIGHT: tl.constexpr,
    SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # From the last row to the first: the end of `low`, just written, is still in the L2 cache.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < D
    total = tl.zeros((BLOCK,), tl.float32)
    for step in range(SPAN):
        row = program.to(tl.int64) * SPAN + step
        mask = inside & (row < num_rows)
        place = row * D + column
        g = tl.load(dh + place, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        unit = tl.load(x + place, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if LOW:
            g += tl.load(low + place, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if STREAM:
            came = tl.load(dx_new + place, mask=mask, other=0.0, eviction_policy="evict_first")
        inverse_rms = tl.load(rstd + row, mask=row < num_rows, other=0.0)
        unit *= inverse_rms
        if WEIGHT:
            total += g * unit
        g *= _gain(weight, column, offset, D)
        change = inverse_rms * (g - unit * (tl.sum(g * unit, axis=0) / D))
        if STREAM:
            change += came.to(tl.float32)
        rounded = change.to(x.dtype.element_ty)
        tl.store(dx + place, rounded, mask=mask)
        if FP8:
            wide = rounded.to(tl.float32) * tl.load(w_scale + column, mask=inside, other=0.0)
            divisor = row_scale(tl.max(tl.abs(wide), axis=0))
            tl.store(scale + row, divisor, mask=row < num_rows)
            tl.store(dx8 + place, (wide * tl.div_rn(1.0, divisor)).to(tl.float8e4nv), mask=mask)
    if WEIGHT:
        tl.store(parts + program.to(tl.int64) * D + column, total, mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _product(
    x, B, made, num_rows,
    D: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, rank = tl.arange(0, ROWS), tl.arange(0, PADDED)
    real = first + row < num_rows
    product = tl.zeros((ROWS, PADDED), tl.float32)
    for start in tl.range(0, D, CHUNK, num_stages=STAGES):
        column = start + tl.arange(0, CHUNK)
        value = tl.load(x + first * D + (row[:, None] * D + column), mask=real[:, None] & (column < D), other=0.0)
        product = tl.dot(value, _columns_of(B, column, rank, RANK, D), product, input_precision="ieee")
    place = first * RANK + (row[:, None] * RANK + rank)
    tl.store(made + place, product.to(made.dtype.element_ty), mask=real[:, None] & (rank < RANK))


@triton.jit
def _gain(weight, column, offset, D: tl.constexpr):
    return tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32) + offset


@triton.jit
def _rows_of(A, read, column, READ: tl.constexpr, D: tl.constexpr):
    """Columns of A, which every program reads: they stay in the L2 cache."""
    mask = (read < READ)[:, None] & (column < D)
    return tl.load(A + read[:, None] * D + column, mask=mask, other=0.0, eviction_policy="evict_last")


@triton.jit
def _columns_of(B, column, added, ADDED: tl.constexpr, D: tl.constexpr):
    mask = (column < D)[:, None] & (added < ADDED)
    return tl.load(B + column[:, None] * ADDED + added, mask=mask, other=0.0, eviction_policy="evict_last")


def _sizes(launch: Launch, width: int, A: Tensor | None, B: Tensor | None) -> dict[str, int]:
    read, added = 0 if A is None else A.shape[0], 0 if B is None else B.shape[1]
    read_pad, added_pad = _power_of_two(read), _power_of_two(added)
    return {
        **{"READ": read, "READ_PAD": read_pad, "ADDED": added, "ADDED_PAD": added_pad, "ROWS": launch.rows},
        **{
            "CHUNK": _chunk(launch, width, max(read_pad, added_pad)),
            "STAGES": launch.stages,
            "num_warps": launch.warps,
        },
    }


def _chunk(launch: Launch, width: int, rank: int) -> int:
    """Columns at a time: fewer where chunks of a matrix of a higher rank than 64 would not fit into shared memory."""
    return min(_power_of_two(width), max(16, launch.chunk * 64 // max(64, rank)))


def _power_of_two(count: int) -> int:
    """The first that is not smaller, and at least 16, which tensor cores ask for."""
    return max(16, 1 << (count - 1).bit_length())


def _on(x: Tensor) -> torch.cuda.device | nullcontext[None]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
