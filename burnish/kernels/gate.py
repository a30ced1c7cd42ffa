# pyright: basic, reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportUnboundVariable=false
"""The gate of an MLP, forward and backward, with the low-rank parts around it: the twin of `ops.gate`.

A program takes a block of rows and a span of columns, which it walks in chunks. So every large matrix is read once and
written once, and there are programs enough for any number of rows. Products that sum over columns are written as one
partial result per span, in fp32, and added up by a second launch, always in the same order.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_PROGRAMS = 1056
"""Spans are made until there are about so many programs: two rounds of four on each of 132 multiprocessors."""
_ROWS, _WARPS = 64, 4
"""To a block of rows. Each block reads all low-rank weights again, from L2: with rank 16 that is 135 MB in all for
8,192 rows of 11,008, where gate and up are 360 MB. Triton gives each warp 16 rows of a product that another product
reads: more warps than rows / 16 would repeat each other's work."""
_STAGES = 3
"""Chunks under way at once: their loads, of the low-rank weights too, are asynchronous copies into shared memory."""
_LEAST_COLUMNS = 256
"""No span is shorter: a program reads its low-rank rows, and writes its partial results, once for a span."""
_MOST_SUMMED = 64
"""Higher ranks leave no registers for sums: cuBLAS makes their products, in passes of their own."""
_ADDED = 1024
"""Sums that a program adds up over the spans."""


class _Plan(NamedTuple):
    """How columns are cut."""

    columns: int
    """To a chunk: 64 are a line of the cache, for which higher ranks leave too few registers."""
    chunks: int
    """To a span."""
    spans: int


def gate(
    gu: Tensor, xa: Tensor | None, Bg: Tensor | None, Bu: Tensor | None, A_down: Tensor | None, activation: str
) -> tuple[Tensor, Tensor | None]:
    """(h, h A_downᵀ)."""
    if Bg is not None and Bg.shape[1] > _MOST_SUMMED:
        gu, xa, Bg, Bu = _with_products(gu.clone(), xa, Bg, Bu), None, None, None
    num_rows, inner = len(gu), gu.shape[1] // 2
    assert all(each is None or each.is_contiguous() for each in (gu, xa, Bg, Bu, A_down))
    rank_in, rank_out = 0 if Bg is None else Bg.shape[1], 0 if A_down is None else len(A_down)
    summed = 0 < rank_out <= _MOST_SUMMED
    plan = _plan(num_rows, inner, max(rank_in, rank_out if summed else 0))
    h = torch.empty((num_rows, inner), dtype=gu.dtype, device=gu.device)
    sums = _partial(gu, plan, rank_out) if summed else None
    with _on(gu):
        if num_rows:
            _forward[(plan.spans, triton.cdiv(num_rows, _ROWS))](
                gu, xa, Bg, Bu, A_down if summed else None, h, sums, num_rows, plan.chunks,
                INNER=inner, SILU=activation == "silu", RANK_IN=rank_in, RANK_OUT=rank_out if summed else 0,
                ROWS=_ROWS, COLUMNS=plan.columns, STAGES=_STAGES, num_warps=_WARPS,
            )  # fmt: skip
        if sums is not None:
            return h, _added(sums, gu.dtype)
    return h, None if A_down is None else h @ A_down.T


def gate_backward(
    dh: Tensor,
    gu: Tensor,
    dha: Tensor | None,
    A_down: Tensor | None,
    xa: Tensor | None,
    Bg: Tensor | None,
    Bu: Tensor | None,
    activation: str,
) -> Tensor | None:
    """[dg Bg | du Bu]; [dg | du] is written over gu, and h over dh."""
    num_rows, inner = dh.shape
    assert all(each is None or each.is_contiguous() for each in (dh, gu, dha, A_down, xa, Bg, Bu))
    if A_down is not None and dha is not None and len(A_down) > _MOST_SUMMED:
        dh.addmm_(dha, A_down)
        dha, A_down = None, None
    if Bg is not None and Bu is not None and Bg.shape[1] > _MOST_SUMMED:
        _with_products(gu, xa, Bg, Bu)
        gate_backward(dh, gu, dha, A_down, None, None, None, activation)
        return torch.cat([gu[:, :inner] @ Bg, gu[:, inner:] @ Bu], dim=1)
    rank_in, rank_out = 0 if Bg is None else Bg.shape[1], 0 if A_down is None else len(A_down)
    plan = _plan(num_rows, inner, max(rank_in, rank_out))
    sums = _partial(gu, plan, 2 * rank_in) if rank_in else None
    with _on(gu):
        if num_rows:
            _backward[(plan.spans, triton.cdiv(num_rows, _ROWS))](
                dh, gu, dha, A_down, xa, Bg, Bu, sums, num_rows, plan.chunks,
                INNER=inner, SILU=activation == "silu", RANK_IN=rank_in, RANK_OUT=rank_out,
                ROWS=_ROWS, COLUMNS=plan.columns, STAGES=_STAGES, num_warps=_WARPS,
            )  # fmt: skip
        return None if sums is None else _added(sums, gu.dtype)


def _with_products(gu: Tensor, xa: Tensor | None, Bg: Tensor, Bu: Tensor | None) -> Tensor:
    """gu with the low-rank parts of high rank added in place, by cuBLAS."""
    assert xa is not None
    assert Bu is not None
    rank = Bg.shape[1]
    for half, low, B in zip(gu.chunk(2, dim=1), xa.split(rank, dim=1), (Bg, Bu), strict=True):
        half.addmm_(low, B.T)
    return gu


def _plan(num_rows: int, inner: int, rank: int) -> _Plan:
    columns = 64 if rank <= 16 else 32
    chunks = -(-inner // columns)
    wanted = min(_PROGRAMS // max(-(-num_rows // _ROWS), 1), inner // _LEAST_COLUMNS)
    per_span = -(-chunks // max(wanted, 1))
    return _Plan(columns, per_span, -(-chunks // per_span))


def _partial(like: Tensor, plan: _Plan, width: int) -> Tensor:
    return torch.empty((plan.spans, len(like), width), dtype=torch.float32, device=like.device)


def _on(x: Tensor) -> Any:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _added(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over spans, rounded once."""
    spans, num_rows, width = partial.shape
    total = torch.empty((num_rows, width), dtype=dtype, device=partial.device)
    if num_rows:
        grid = (triton.cdiv(total.numel(), _ADDED),)
        _add_spans[grid](partial, total, total.numel(), spans, BLOCK=_ADDED, num_warps=4)
    return total


@triton.jit(do_not_specialize=["num_rows", "chunks"])
def _forward(
    gu, xa, Bg, Bu, A_down, h, sums, num_rows, chunks,
    INNER: tl.constexpr, SILU: tl.constexpr, RANK_IN: tl.constexpr, RANK_OUT: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    span = tl.program_id(0)
    first = tl.program_id(1) * ROWS
    # 64 bits for where the block begins, 32 within it.
    gu += first.to(tl.int64) * 2 * INNER
    h += first.to(tl.int64) * INNER
    row = tl.arange(0, ROWS)
    exists = first + row < num_rows
    if RANK_IN:
        xg = _low_rank_rows(xa, first, row, exists, 2 * RANK_IN, RANK_IN)
        xu = _low_rank_rows(xa + RANK_IN, first, row, exists, 2 * RANK_IN, RANK_IN)
    if RANK_OUT:
        ha = tl.zeros((ROWS, RANK_OUT), tl.float32)
    begin, end = span * chunks * COLUMNS, tl.minimum((span + 1) * chunks * COLUMNS, INNER)
    for start in tl.range(begin, end, COLUMNS, num_stages=STAGES):
        column = start + tl.arange(0, COLUMNS)
        inside = (column < INNER) | (INNER % COLUMNS == 0)
        mask = exists[:, None] & inside[None, :]
        here = gu + row[:, None] * (2 * INNER) + column[None, :]
        g = tl.load(here, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(here + INNER, mask=mask, other=0.0).to(tl.float32)
        if RANK_IN:
            g = tl.dot(xg, tl.trans(_thin(Bg, column, inside, RANK_IN)), acc=g, input_precision="ieee")
            u = tl.dot(xu, tl.trans(_thin(Bu, column, inside, RANK_IN)), acc=u, input_precision="ieee")
        g = g.to(gu.dtype.element_ty).to(tl.float32)
        u = u.to(gu.dtype.element_ty).to(tl.float32)
        made = (g * _share(g, SILU) * u).to(h.dtype.element_ty)
        tl.store(h + row[:, None] * INNER + column[None, :], made, mask=mask)
        if RANK_OUT:
            ha = tl.dot(made, tl.trans(_wide(A_down, column, inside, INNER, RANK_OUT)), acc=ha, input_precision="ieee")
    if RANK_OUT:
        sums += (span.to(tl.int64) * num_rows + first) * RANK_OUT
        tl.store(sums + row[:, None] * RANK_OUT + tl.arange(0, RANK_OUT)[None, :], ha, mask=exists[:, None])


@triton.jit(do_not_specialize=["num_rows", "chunks"])
def _backward(
    dh, gu, dha, A_down, xa, Bg, Bu, sums, num_rows, chunks,
    INNER: tl.constexpr, SILU: tl.constexpr, RANK_IN: tl.constexpr, RANK_OUT: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    span = tl.program_id(0)
    first = tl.program_id(1) * ROWS
    gu += first.to(tl.int64) * 2 * INNER
    dh += first.to(tl.int64) * INNER
    row = tl.arange(0, ROWS)
    exists = first + row < num_rows
    if RANK_IN:
        xg = _low_rank_rows(xa, first, row, exists, 2 * RANK_IN, RANK_IN)
        xu = _low_rank_rows(xa + RANK_IN, first, row, exists, 2 * RANK_IN, RANK_IN)
    if RANK_OUT:
        low = _low_rank_rows(dha, first, row, exists, RANK_OUT, RANK_OUT)
    if RANK_IN:
        dxg = tl.zeros((ROWS, RANK_IN), tl.float32)
        dxu = tl.zeros((ROWS, RANK_IN), tl.float32)
    begin, end = span * chunks * COLUMNS, tl.minimum((span + 1) * chunks * COLUMNS, INNER)
    for start in tl.range(begin, end, COLUMNS, num_stages=STAGES):
        # What is read ahead lies beyond what this turn writes, and a chunk is whole in shared memory before its turn:
        # working in place is safe.
        column = start + tl.arange(0, COLUMNS)
        inside = (column < INNER) | (INNER % COLUMNS == 0)
        mask = exists[:, None] & inside[None, :]
        here = gu + row[:, None] * (2 * INNER) + column[None, :]
        there = dh + row[:, None] * INNER + column[None, :]
        g = tl.load(here, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(here + INNER, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(there, mask=mask, other=0.0).to(tl.float32)
        if RANK_IN:
            bg, bu = _thin(Bg, column, inside, RANK_IN), _thin(Bu, column, inside, RANK_IN)
            g = tl.dot(xg, tl.trans(bg), acc=g, input_precision="ieee")
            u = tl.dot(xu, tl.trans(bu), acc=u, input_precision="ieee")
        if RANK_OUT:
            d = tl.dot(low, _wide(A_down, column, inside, INNER, RANK_OUT), acc=d, input_precision="ieee")
        g = g.to(gu.dtype.element_ty).to(tl.float32)
        u = u.to(gu.dtype.element_ty).to(tl.float32)
        share = _share(g, SILU)
        opened = g * share
        dg = (d * u * _slope(g, share, SILU)).to(gu.dtype.element_ty)
        du = (d * opened).to(gu.dtype.element_ty)
        tl.store(here, dg, mask=mask)
        tl.store(here + INNER, du, mask=mask)
        tl.store(there, (opened * u).to(dh.dtype.element_ty), mask=mask)
        if RANK_IN:
            dxg = tl.dot(dg, bg, acc=dxg, input_precision="ieee")
            dxu = tl.dot(du, bu, acc=dxu, input_precision="ieee")
    if RANK_IN:
        sums += (span.to(tl.int64) * num_rows + first) * (2 * RANK_IN)
        place = row[:, None] * (2 * RANK_IN) + tl.arange(0, RANK_IN)[None, :]
        tl.store(sums + place, dxg, mask=exists[:, None])
        tl.store(sums + RANK_IN + place, dxu, mask=exists[:, None])


@triton.jit
def _low_rank_rows(x, first, row, exists, width, RANK: tl.constexpr):
    """The first RANK columns of these rows of x."""
    place = (first + row)[:, None] * width + tl.arange(0, RANK)[None, :]
    return tl.load(x + place, mask=exists[:, None], other=0.0)


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
def _share(g, SILU: tl.constexpr):
    """What g is multiplied by: the logistic function of g, or of 2 √(2/π) (g + 0.044715 g³) for gelu_tanh."""
    z = g
    if not SILU:
        z = 1.5957691216057308 * (g + 0.044715 * g * g * g)
    root = tl.rsqrt(1.0 + tl.exp(-z))  # one instruction, where a division is eight
    return root * root


@triton.jit
def _slope(g, share, SILU: tl.constexpr):
    """The derivative of g · share."""
    bent = g * share * (1.0 - share)
    if not SILU:
        bent = bent * (1.5957691216057308 * (1.0 + 3 * 0.044715 * g * g))
    return share + bent


@triton.jit
def _add_spans(partial, total, count, spans, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    made = tl.zeros((BLOCK,), tl.float32)
    for _ in range(spans):
        made += tl.load(partial + place, mask=place < count, other=0.0)
        partial += count
    tl.store(total + place, made.to(total.dtype.element_ty), mask=place < count)
