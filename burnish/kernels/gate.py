# pyright: basic, reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false
"""The gate of an MLP, forward and backward, with low-rank parts and 8 bits: the twin of `ops.gate`.

A program takes a block of rows and a span of columns, which it walks in chunks. So every large matrix is read once and
written once, and there are programs enough for any number of rows. What belongs to whole rows (products with low-rank
matrices, largest magnitudes) is written as one partial result per span, in fp32, and brought together by a second
launch, always in the same order. The 8 bits need the largest magnitude first, so that they are a pass of their own.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_PROGRAMS = 1056
"""Spans are made until there are about so many programs: two rounds of four on each of 132 multiprocessors."""
_LEAST_CHUNKS = 4
"""No span is shorter: a program reads its low-rank rows, and writes its partial results, once for a span."""
_QUANTISED = (16, 512)
"""Rows and columns that a program turns into 8 bits: it reads 16 KiB of them, and 2 KiB of scales of columns."""
_SUMMED = 1024
"""Sums that a program adds up over the spans."""


class _Plan(NamedTuple):
    """How the matrix is cut, and how many warps work on a chunk."""

    rows: int
    """To a block. Each block reads all low-rank weights again, from L2: with 64 rows and rank 16 that is 135 MB in all
    for 8,192 rows of 11,008, where gate and up are 360 MB. Higher ranks leave registers for fewer rows."""
    columns: int
    """To a chunk."""
    chunks: int
    """To a span."""
    spans: int
    warps: int


def gate(
    gu: Tensor,
    xa: Tensor | None,
    Bg: Tensor | None,
    Bu: Tensor | None,
    A_down: Tensor | None,
    activation: str,
    fp8: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(h, its 8 bits, their scale, h A_downᵀ)."""
    num_rows, inner = len(gu), gu.shape[1] // 2
    _check(gu, xa, Bg, Bu, A_down)
    rank_in, rank_out = _rank(Bg, 1), _rank(A_down, 0)
    plan = _plan(num_rows, inner, max(rank_in, rank_out))
    h = torch.empty((num_rows, inner), dtype=gu.dtype, device=gu.device)
    sums = _partial(gu, plan, rank_out) if rank_out else None
    peaks = _partial(gu, plan, 1) if fp8 else None
    with _on(gu):
        if num_rows:
            _forward[(plan.spans, triton.cdiv(num_rows, plan.rows))](
                gu, xa, Bg, Bu, A_down, h, sums, peaks, num_rows, inner, plan.chunks,
                SILU=activation == "silu", RANK_IN=rank_in, RANK_OUT=rank_out, PEAK=fp8,
                ROWS=plan.rows, COLUMNS=plan.columns, num_warps=plan.warps, num_stages=2,
            )  # fmt: skip
        ha = None if sums is None else _sum(sums, gu.dtype)
        values, scale = (None, None) if peaks is None else _quantise(h, None, peaks)
    return h, values, scale, ha


def gate_backward(
    dh: Tensor,
    gu: Tensor,
    dha: Tensor | None,
    A_down: Tensor | None,
    xa: Tensor | None,
    Bg: Tensor | None,
    Bu: Tensor | None,
    w_scale: Tensor | None,
    activation: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """([dg Bg | du Bu], the 8 bits of dgu · w_scale, their scale); dgu is written over gu and h over dh."""
    num_rows, inner = dh.shape
    _check(dh, gu, dha, A_down, xa, Bg, Bu, w_scale)
    rank_in, rank_out = _rank(Bg, 1), _rank(A_down, 0)
    plan = _plan(num_rows, inner, max(rank_in, rank_out))
    sums = _partial(gu, plan, 2 * rank_in) if rank_in else None
    peaks = _partial(gu, plan, 1) if w_scale is not None else None
    with _on(gu):
        if num_rows:
            _backward[(plan.spans, triton.cdiv(num_rows, plan.rows))](
                dh, gu, dha, A_down, xa, Bg, Bu, w_scale, sums, peaks, num_rows, inner, plan.chunks,
                SILU=activation == "silu", RANK_IN=rank_in, RANK_OUT=rank_out, PEAK=w_scale is not None,
                ROWS=plan.rows, COLUMNS=plan.columns, num_warps=plan.warps, num_stages=2,
            )  # fmt: skip
        dxa = None if sums is None else _sum(sums, gu.dtype)
        values, scale = (None, None) if peaks is None else _quantise(gu, w_scale, peaks)
    return dxa, values, scale


def _plan(num_rows: int, inner: int, rank: int) -> _Plan:
    rows, columns, warps = (64, 64, 8) if rank <= 32 else (32, 64, 8) if rank <= 64 else (16, 32, 4)
    chunks = triton.cdiv(inner, columns)
    wanted = _PROGRAMS // max(triton.cdiv(num_rows, rows), 1)
    per_span = triton.cdiv(chunks, max(min(wanted, chunks // _LEAST_CHUNKS), 1))
    return _Plan(rows, columns, per_span, triton.cdiv(chunks, per_span), warps)


def _check(*given: Tensor | None) -> None:
    assert all(each is None or each.is_contiguous() for each in given)


def _rank(weight: Tensor | None, dim: int) -> int:
    return 0 if weight is None else weight.shape[dim]


def _partial(like: Tensor, plan: _Plan, width: int) -> Tensor:
    return torch.empty((plan.spans, len(like), width), dtype=torch.float32, device=like.device)


def _on(x: Tensor) -> Any:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _sum(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over spans, rounded once."""
    spans, num_rows, width = partial.shape
    total = torch.empty((num_rows, width), dtype=dtype, device=partial.device)
    if total.numel():
        grid = (triton.cdiv(total.numel(), _SUMMED),)
        _sum_spans[grid](partial, total, total.numel(), spans, BLOCK=_SUMMED, num_warps=4)
    return total


def _quantise(x: Tensor, w_scale: Tensor | None, peaks: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of x · w_scale in 8 bits, and their scales, from the largest magnitude in each span."""
    (num_rows, width), (rows, columns) = x.shape, _QUANTISED
    values = torch.empty((num_rows, width), dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    if num_rows:
        _quantise_rows[(triton.cdiv(width, columns), triton.cdiv(num_rows, rows))](
            x, w_scale, peaks, values, scale, num_rows, width, len(peaks),
            SCALED=w_scale is not None, SPANS=triton.next_power_of_2(len(peaks)), ROWS=rows, COLUMNS=columns,
            num_warps=8,
        )  # fmt: skip
    return values, scale


@triton.jit
def _forward(
    gu, xa, Bg, Bu, A_down, h, sums, peaks, num_rows, inner, chunks,
    SILU: tl.constexpr, RANK_IN: tl.constexpr, RANK_OUT: tl.constexpr, PEAK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    span = tl.program_id(0)
    first = tl.program_id(1) * ROWS
    # 64 bits for where the block begins, 32 within it.
    gu += first.to(tl.int64) * 2 * inner
    h += first.to(tl.int64) * inner
    row = tl.arange(0, ROWS)
    exists = first + row < num_rows
    if RANK_IN:
        xg, xu = _low_rank_rows(xa, first, row, exists, RANK_IN)
    if RANK_OUT:
        ha = tl.zeros((ROWS, RANK_OUT), tl.float32)
    if PEAK:
        peak = tl.zeros((ROWS, COLUMNS), tl.float32)
    for chunk in range(span * chunks, min((span + 1) * chunks, tl.cdiv(inner, COLUMNS))):
        column = chunk * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < inner
        mask = exists[:, None] & inside[None, :]
        place = row[:, None] * (2 * inner) + column[None, :]
        g = tl.load(gu + place, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(gu + inner + place, mask=mask, other=0.0).to(tl.float32)
        if RANK_IN:
            g = tl.dot(xg, tl.trans(_thin(Bg, column, inside, RANK_IN)), acc=g, input_precision="ieee")
            u = tl.dot(xu, tl.trans(_thin(Bu, column, inside, RANK_IN)), acc=u, input_precision="ieee")
        g = g.to(gu.dtype.element_ty).to(tl.float32)
        u = u.to(gu.dtype.element_ty).to(tl.float32)
        made = (g * _sigmoid(g, SILU) * u).to(h.dtype.element_ty)
        tl.store(h + row[:, None] * inner + column[None, :], made, mask=mask)
        if PEAK:
            peak = tl.maximum(peak, tl.abs(made.to(tl.float32)))
        if RANK_OUT:
            ha = tl.dot(made, tl.trans(_wide(A_down, column, inside, inner, RANK_OUT)), acc=ha, input_precision="ieee")
    if RANK_OUT:
        _store_rows(sums, ha, span, first, row, num_rows, 0, RANK_OUT, RANK_OUT)
    if PEAK:
        tl.store(peaks + span.to(tl.int64) * num_rows + first + row, tl.max(peak, axis=1), mask=exists)


@triton.jit
def _backward(
    dh, gu, dha, A_down, xa, Bg, Bu, w_scale, sums, peaks, num_rows, inner, chunks,
    SILU: tl.constexpr, RANK_IN: tl.constexpr, RANK_OUT: tl.constexpr, PEAK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    span = tl.program_id(0)
    first = tl.program_id(1) * ROWS
    gu += first.to(tl.int64) * 2 * inner
    dh += first.to(tl.int64) * inner
    row = tl.arange(0, ROWS)
    exists = first + row < num_rows
    if RANK_IN:
        xg, xu = _low_rank_rows(xa, first, row, exists, RANK_IN)
        dxg = tl.zeros((ROWS, RANK_IN), tl.float32)
        dxu = tl.zeros((ROWS, RANK_IN), tl.float32)
    if RANK_OUT:
        rank = tl.arange(0, RANK_OUT)
        low = tl.load(dha + (first + row)[:, None] * RANK_OUT + rank[None, :], mask=exists[:, None], other=0.0)
    if PEAK:
        peak = tl.zeros((ROWS, COLUMNS), tl.float32)
    for chunk in range(span * chunks, min((span + 1) * chunks, tl.cdiv(inner, COLUMNS))):
        column = chunk * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < inner
        mask = exists[:, None] & inside[None, :]
        place = row[:, None] * (2 * inner) + column[None, :]
        place_h = row[:, None] * inner + column[None, :]
        g = tl.load(gu + place, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(gu + inner + place, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(dh + place_h, mask=mask, other=0.0).to(tl.float32)
        if RANK_IN:
            bg, bu = _thin(Bg, column, inside, RANK_IN), _thin(Bu, column, inside, RANK_IN)
            g = tl.dot(xg, tl.trans(bg), acc=g, input_precision="ieee")
            u = tl.dot(xu, tl.trans(bu), acc=u, input_precision="ieee")
        if RANK_OUT:
            d = tl.dot(low, _wide(A_down, column, inside, inner, RANK_OUT), acc=d, input_precision="ieee")
        g = g.to(gu.dtype.element_ty).to(tl.float32)
        u = u.to(gu.dtype.element_ty).to(tl.float32)
        share = _sigmoid(g, SILU)
        opened = g * share
        dg = (d * u * _slope(g, share, SILU)).to(gu.dtype.element_ty)
        du = (d * opened).to(gu.dtype.element_ty)
        # In place: no thread may write before every other has read what it needs of this chunk.
        tl.debug_barrier()
        tl.store(gu + place, dg, mask=mask)
        tl.store(gu + inner + place, du, mask=mask)
        tl.store(dh + place_h, (opened * u).to(dh.dtype.element_ty), mask=mask)
        if PEAK:
            scale_g = tl.load(w_scale + column, mask=inside, other=0.0)
            scale_u = tl.load(w_scale + inner + column, mask=inside, other=0.0)
            peak = tl.maximum(peak, tl.abs(dg.to(tl.float32) * scale_g[None, :]))
            peak = tl.maximum(peak, tl.abs(du.to(tl.float32) * scale_u[None, :]))
        if RANK_IN:
            dxg = tl.dot(dg, bg, acc=dxg, input_precision="ieee")
            dxu = tl.dot(du, bu, acc=dxu, input_precision="ieee")
    if RANK_IN:
        _store_rows(sums, dxg, span, first, row, num_rows, 0, 2 * RANK_IN, RANK_IN)
        _store_rows(sums, dxu, span, first, row, num_rows, RANK_IN, 2 * RANK_IN, RANK_IN)
    if PEAK:
        tl.store(peaks + span.to(tl.int64) * num_rows + first + row, tl.max(peak, axis=1), mask=exists)


@triton.jit
def _low_rank_rows(xa, first, row, exists, RANK: tl.constexpr):
    """The two halves of these rows of xa."""
    place = (first + row)[:, None] * (2 * RANK) + tl.arange(0, RANK)[None, :]
    xg = tl.load(xa + place, mask=exists[:, None], other=0.0)
    return xg, tl.load(xa + RANK + place, mask=exists[:, None], other=0.0)


@triton.jit
def _thin(weight, column, inside, RANK: tl.constexpr):
    """These rows of a matrix [I, RANK]."""
    place = column[:, None] * RANK + tl.arange(0, RANK)[None, :]
    return tl.load(weight + place, mask=inside[:, None], other=0.0)


@triton.jit
def _wide(weight, column, inside, inner, RANK: tl.constexpr):
    """These columns of a matrix [RANK, I]."""
    place = tl.arange(0, RANK)[:, None] * inner + column[None, :]
    return tl.load(weight + place, mask=inside[None, :], other=0.0)


@triton.jit
def _store_rows(sums, values, span, first, row, num_rows, start, width, RANK: tl.constexpr):
    """Columns `start` and on of the partial result of these rows."""
    sums += (span.to(tl.int64) * num_rows + first) * width + start
    place = row[:, None] * width + tl.arange(0, RANK)[None, :]
    tl.store(sums + place, values, mask=(first + row < num_rows)[:, None])


@triton.jit
def _sigmoid(g, SILU: tl.constexpr):
    """What g is multiplied by: the logistic function of g, or of 2 √(2/π) (g + 0.044715 g³) for gelu_tanh."""
    z = g
    if not SILU:
        z = 1.5957691216057308 * (g + 0.044715 * g * g * g)
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def _slope(g, share, SILU: tl.constexpr):
    """The derivative of g · share."""
    bent = g * share * (1.0 - share)
    if not SILU:
        bent = bent * (1.5957691216057308 * (1.0 + 3 * 0.044715 * g * g))
    return share + bent


@triton.jit
def _sum_spans(partial, total, count, spans, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    made = tl.zeros((BLOCK,), tl.float32)
    for _ in range(spans):
        made += tl.load(partial + place, mask=place < count, other=0.0)
        partial += count
    tl.store(total + place, made.to(total.dtype.element_ty), mask=place < count)


@triton.jit
def _quantise_rows(
    x, w_scale, peaks, values, scale, num_rows, width, spans,
    SCALED: tl.constexpr, SPANS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # From the last rows to the first: those written last are still in L2.
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    row = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    span = tl.arange(0, SPANS)
    known = (span < spans)[:, None] & (row < num_rows)[None, :]
    peak = tl.load(peaks + span[:, None] * num_rows + row[None, :], mask=known, other=0.0)
    step = tl.div_rn(tl.max(peak, axis=0), 448.0)
    step = tl.where(step == 0.0, 1.0, step)
    if tl.program_id(0) == 0:
        tl.store(scale + row, step, mask=row < num_rows)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < num_rows)[:, None] & (column < width)[None, :]
    place = row[:, None] * width + column[None, :]
    value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    if SCALED:
        value *= tl.load(w_scale + column, mask=column < width, other=0.0)[None, :]
    # Divided as PyTorch divides: a product with the reciprocal would now and then round the other way.
    value = tl.div_rn(value, tl.broadcast_to(step[:, None], (ROWS, COLUMNS)))
    tl.store(values + place, value.to(tl.float8e4nv), mask=mask)
