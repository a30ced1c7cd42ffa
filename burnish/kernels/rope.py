# pyright: basic, reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportUnboundVariable=false, reportAttributeAccessIssue=false
"""LoRA, bias, norms and rotation of queries, keys and values, and the way back: the twins of `ops.rope`.

A tile is one head of a few rows, in two halves whose channels turn in pairs, and what is not turned at all (`REST`).
The table's tiles stay in registers while a program walks over heads.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _HEADS = 32, 8  # forward: heads to a program, enough programs to keep memory busy, few readings of the table
_HEADS_BACK = 16  # backward: few products to add up
_TILE_BACK = 64 * 128  # numbers of a head's tile, 64 rows of 128 channels: one in registers, two under way

Table = tuple[Tensor, Tensor]
Norms = tuple[Tensor, Tensor, float, float]
Before = tuple[Tensor, Norms, bool]


def rope(
    qkv: Tensor,
    xa: Tensor | None,
    Bs: tuple[Tensor, Tensor, Tensor] | None,
    bias: Tensor | None,
    table: Table | None,
    heads: tuple[int, int, int],
) -> None:
    """Changes qkv in place. heads: of queries, of keys (and as many of values), channels of one."""
    num_q, num_k, width = heads
    adds, turned = Bs is not None or bias is not None, 0 if table is None else num_q + num_k
    walked = num_q + 2 * num_k if adds else turned  # what is not turned is left alone
    assert all(part is None or part.is_contiguous() for part in (qkv, xa, bias, *(table or ()), *(Bs or ())))
    if len(qkv) and walked:
        with _on(qkv):
            _rope[(triton.cdiv(len(qkv), _ROWS), triton.cdiv(walked, _HEADS))](
                qkv, xa, *(Bs or (None, None, None)), bias, *(table or (None, None)), len(qkv), walked,
                NUM_Q=num_q, NUM_K=num_k, **_sizes(width, table, Bs), TURNED=turned, HAS_BIAS=bias is not None,
                ADDS=adds, ROWS=_ROWS, HEADS=_HEADS, num_warps=4,
            )  # fmt: skip


def norm_rope(qkv: Tensor, norms: Norms, table: Table, heads: tuple[int, int, int]) -> Tensor:
    """The normed and turned heads of queries and of keys, side by side. norms: two weights, eps and offset."""
    num_q, num_k, width = heads
    turned = torch.empty((len(qkv), (num_q + num_k) * width), dtype=qkv.dtype, device=qkv.device)
    assert all(part.is_contiguous() for part in (qkv, *table, *norms[:2]))
    if len(qkv):
        half = width // 2
        with _on(qkv):
            _norm_rope[(triton.cdiv(len(qkv), _ROWS), triton.cdiv(num_q + num_k, _HEADS))](
                qkv, turned, *norms, *table, len(qkv), NUM_Q=num_q, NUM_K=num_k,
                HALF=half, HALF_PAD=_padded(half), ROWS=_ROWS, HEADS=_HEADS, num_warps=4,
            )  # fmt: skip
    return turned


def rope_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    table: Table | None,
    Bs: tuple[Tensor, Tensor, Tensor] | None,
    before: Before | None,
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
    """(dqkv, dxa where there is LoRA, the gradients of two norms' weights where wanted). before: qkv, norms, wanted."""
    (num_rows, num_q, width), num_k = dq.shape, dk.shape[1]
    sizes = _sizes(width, table, Bs)
    rank, tile = sizes["RANK"], 2 * sizes["HALF_PAD"] + sizes["REST_PAD"]
    dqkv = torch.empty((num_rows, (num_q + 2 * num_k) * width), dtype=dq.dtype, device=dq.device)
    dxa = None if Bs is None else torch.empty((num_rows, 3 * rank), dtype=dq.dtype, device=dq.device)
    groups_q, groups_k = -(-num_q // _HEADS_BACK), -(-num_k // _HEADS_BACK)
    groups, products = groups_q + 2 * groups_k, dxa
    if dxa is not None and groups > 3:
        products = torch.empty((num_rows, groups, rank), dtype=torch.float32, device=dq.device)
    # Where there are norms, two tiles are in registers at a time: half as many rows.
    rows = max(16, min(_TILE_BACK // tile // (1 if before is None else 2), 64))
    rows = 1 << rows.bit_length() - 1
    blocks, (qkv, norms, wants) = -(-num_rows // rows), before or (None, (None, None, 0.0, 0.0), False)
    # Sums over the rows of a program and the heads of a group, added up in a fixed order below: no atomics.
    sums = torch.empty((blocks, groups_q + groups_k, width), dtype=torch.float32, device=dq.device) if wants else None
    assert all(d.stride(2) == 1 for d in (dq, dk, dv))
    assert all(part is None or part.is_contiguous() for part in (*(table or ()), *(Bs or ()), qkv, *norms[:2]))
    assert before is None or sizes["REST"] == 0
    if num_rows:
        with _on(dq):
            _rope_backward[(blocks, groups)](
                dq, dk, dv, *(table or (None, None)), *(Bs or (None, None, None)), dqkv, products, num_rows,
                *dq.stride()[:2], *dk.stride()[:2], *dv.stride()[:2], qkv, *norms, sums,
                NUM_Q=num_q, NUM_K=num_k, **sizes, ROWS=rows, HEADS=_HEADS_BACK, TURNS=table is not None,
                NORM=before is not None, WANTS=wants, STAGES=3 if sizes["RANK_PAD"] <= 64 else 1, num_warps=8,
            )  # fmt: skip
            if dxa is not None and groups > 3:
                _add_products[(triton.cdiv(dxa.numel(), 1024),)](
                    products, dxa, dxa.numel(), GROUPS_Q=groups_q, GROUPS_K=groups_k, RANK=rank, SIZE=1024, num_warps=4
                )
    dnorms = None if sums is None else (sums[:, :groups_q].sum((0, 1)), sums[:, groups_q:].sum((0, 1)))
    return dqkv, dxa, dnorms


def _sizes(width: int, table: Table | None, Bs: tuple[Tensor, Tensor, Tensor] | None) -> dict[str, int]:
    """Of a head, and of blocks that hold its parts: powers of two, and 16 at least, as tensor cores want."""
    half = width // 2 if table is None else table[0].shape[1]
    rest, rank = width - 2 * half, 0 if Bs is None else Bs[0].shape[1]
    assert half > 0 <= rest
    sizes = {"HALF": half, "REST": rest, "RANK": rank}
    return {"WIDTH": width, **sizes, **{f"{name}_PAD": _padded(size) for name, size in sizes.items()}}


def _padded(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length()) if size else 0


def _on(x: Tensor) -> torch.cuda.device | nullcontext[None]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@triton.jit(do_not_specialize=["num_rows"])
def _rope(
    qkv, xa, b_q, b_k, b_v, bias, cos_table, sin_table, num_rows, walked,
    NUM_Q: tl.constexpr, NUM_K: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    RANK: tl.constexpr, HALF_PAD: tl.constexpr, REST_PAD: tl.constexpr, RANK_PAD: tl.constexpr,
    TURNED: tl.constexpr, HAS_BIAS: tl.constexpr, ADDS: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first_head = tl.program_id(1) * HEADS
    pair = tl.arange(0, HALF_PAD)
    if TURNED > 0:
        cos = _tile(cos_table, row, HALF, pair, HALF, num_rows)
        sin = _tile(sin_table, row, HALF, pair, HALF, num_rows)
    for head in tl.range(first_head, tl.minimum(first_head + HEADS, walked), num_stages=2):
        column = head * WIDTH + pair
        mask = (row < num_rows)[:, None] & (pair < HALF)[None, :]
        place = qkv + row[:, None] * ((NUM_Q + 2 * NUM_K) * WIDTH) + column[None, :]
        first = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(place + HALF, mask=mask, other=0.0).to(tl.float32)
        if RANK > 0:
            part, B = 0, b_q + head * WIDTH * RANK
            if head >= NUM_Q:
                part, B = 1, b_k + (head - NUM_Q) * WIDTH * RANK
            if head >= NUM_Q + NUM_K:
                part, B = 2, b_v + (head - NUM_Q - NUM_K) * WIDTH * RANK
            low = _tile_low(xa, row, part, RANK, RANK_PAD, num_rows)
            first += _lift(low, B, pair, HALF, RANK, RANK_PAD)
            second += _lift(low, B + HALF * RANK, pair, HALF, RANK, RANK_PAD)
        if HAS_BIAS:
            first += tl.load(bias + column, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
            second += tl.load(bias + column + HALF, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
        if TURNED > 0:
            turns = head < TURNED
            if turns:
                turned = first * cos - second * sin
                second = second * cos + first * sin
                first = turned
        tl.store(place, first.to(qkv.dtype.element_ty), mask=mask)
        tl.store(place + HALF, second.to(qkv.dtype.element_ty), mask=mask)
        if ADDS and REST > 0:
            still = tl.arange(0, REST_PAD)
            column = head * WIDTH + 2 * HALF + still
            mask = (row < num_rows)[:, None] & (still < REST)[None, :]
            place = qkv + row[:, None] * ((NUM_Q + 2 * NUM_K) * WIDTH) + column[None, :]
            x = tl.load(place, mask=mask, other=0.0).to(tl.float32)
            if RANK > 0:
                x += _lift(low, B + 2 * HALF * RANK, still, REST, RANK, RANK_PAD)
            if HAS_BIAS:
                x += tl.load(bias + column, mask=still < REST, other=0.0).to(tl.float32)[None, :]
            tl.store(place, x.to(qkv.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _norm_rope(
    qkv, turned, weight_q, weight_k, eps, offset, cos_table, sin_table, num_rows,
    NUM_Q: tl.constexpr, NUM_K: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr,
    ROWS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = 2 * HALF
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first_head = tl.program_id(1) * HEADS
    pair = tl.arange(0, HALF_PAD)
    cos = _tile(cos_table, row, HALF, pair, HALF, num_rows)
    sin = _tile(sin_table, row, HALF, pair, HALF, num_rows)
    mask = (row < num_rows)[:, None] & (pair < HALF)[None, :]
    source = qkv + row[:, None] * ((NUM_Q + 2 * NUM_K) * WIDTH) + pair[None, :]
    place = turned + row[:, None] * ((NUM_Q + NUM_K) * WIDTH) + pair[None, :]
    dtype = turned.dtype.element_ty
    for head in tl.range(first_head, tl.minimum(first_head + HEADS, NUM_Q + NUM_K), num_stages=2):
        first = tl.load(source + head * WIDTH, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(source + head * WIDTH + HALF, mask=mask, other=0.0).to(tl.float32)
        weight = weight_q
        if head >= NUM_Q:
            weight = weight_k
        rstd = _rstd(first, second, eps, WIDTH)[:, None]
        first *= rstd * _gain(weight, offset, pair, HALF)
        second *= rstd * _gain(weight + HALF, offset, pair, HALF)
        tl.store(place + head * WIDTH, (first * cos - second * sin).to(dtype), mask=mask)
        tl.store(place + head * WIDTH + HALF, (second * cos + first * sin).to(dtype), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _rope_backward(
    dq, dk, dv, cos_table, sin_table, b_q, b_k, b_v, dqkv, products, num_rows,
    q_token, q_head, k_token, k_head, v_token, v_head, qkv, weight_q, weight_k, eps, offset, sums,
    NUM_Q: tl.constexpr, NUM_K: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    RANK: tl.constexpr, HALF_PAD: tl.constexpr, REST_PAD: tl.constexpr, RANK_PAD: tl.constexpr,
    ROWS: tl.constexpr, HEADS: tl.constexpr, TURNS: tl.constexpr, NORM: tl.constexpr, WANTS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A group of heads, all of queries, keys or values: what LoRA wants of a group is its own product."""
    GROUPS_Q: tl.constexpr = (NUM_Q + HEADS - 1) // HEADS
    GROUPS_K: tl.constexpr = (NUM_K + HEADS - 1) // HEADS
    GROUPS: tl.constexpr = GROUPS_Q + 2 * GROUPS_K
    N: tl.constexpr = (NUM_Q + 2 * NUM_K) * WIDTH
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    part, begin, count, skipped = 0, group * HEADS, NUM_Q, 0
    given, token_stride, head_stride = dq, q_token, q_head
    if group >= GROUPS_Q:
        part, begin, count, skipped = 1, (group - GROUPS_Q) * HEADS, NUM_K, NUM_Q
        given, token_stride, head_stride = dk, k_token, k_head
    if group >= GROUPS_Q + GROUPS_K:
        part, begin, count, skipped = 2, (group - GROUPS_Q - GROUPS_K) * HEADS, NUM_K, NUM_Q + NUM_K
        given, token_stride, head_stride = dv, v_token, v_head
    pair = tl.arange(0, HALF_PAD)
    if TURNS:
        cos = tl.where(part < 2, _tile(cos_table, row, HALF, pair, HALF, num_rows), 1.0)
        sin = tl.where(part < 2, _tile(sin_table, row, HALF, pair, HALF, num_rows), 0.0)
    mask = (row < num_rows)[:, None] & (pair < HALF)[None, :]
    source = given + row[:, None] * token_stride + pair[None, :]
    place = dqkv + row[:, None] * N + skipped * WIDTH + pair[None, :]
    dtype = dqkv.dtype.element_ty
    if REST > 0:
        still = tl.arange(0, REST_PAD)
        still_mask = (row < num_rows)[:, None] & (still < REST)[None, :]
        still_source = given + row[:, None] * token_stride + 2 * HALF + still[None, :]
        still_place = dqkv + row[:, None] * N + skipped * WIDTH + 2 * HALF + still[None, :]
    if RANK > 0:
        low = tl.zeros([ROWS, RANK_PAD], tl.float32)
        B = b_q
        if part == 1:
            B = b_k
        if part == 2:
            B = b_v
    if NORM:
        before = qkv + row[:, None] * N + skipped * WIDTH + pair[None, :]
        normed = mask & (part < 2)  # of values nothing is read, and nothing changed
        weight_norm = weight_q
        if part > 0:
            weight_norm = weight_k
        gain_first = _gain(weight_norm, offset, pair, HALF)
        gain_second = _gain(weight_norm + HALF, offset, pair, HALF)
    if WANTS:
        sum_first = tl.zeros([ROWS, HALF_PAD], tl.float32)
        sum_second = tl.zeros([ROWS, HALF_PAD], tl.float32)
    for head in tl.range(begin, tl.minimum(begin + HEADS, count), num_stages=STAGES):
        here = source + head * head_stride
        first = tl.load(here, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        second = tl.load(here + HALF, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if TURNS:
            turned = first * cos + second * sin
            second = second * cos - first * sin
            first = turned
        if NORM:
            unit_first = tl.load(before + head * WIDTH, mask=normed, other=0.0).to(tl.float32)
            unit_second = tl.load(before + head * WIDTH + HALF, mask=normed, other=0.0).to(tl.float32)
            rstd = _rstd(unit_first, unit_second, eps, WIDTH)[:, None]
            unit_first *= rstd
            unit_second *= rstd
            if WANTS:
                sum_first += first * unit_first
                sum_second += second * unit_second
            scaled_first = first * gain_first
            scaled_second = second * gain_second
            mean = tl.sum(scaled_first * unit_first + scaled_second * unit_second, axis=1)[:, None] / WIDTH
            first = tl.where(part < 2, rstd * (scaled_first - unit_first * mean), first)
            second = tl.where(part < 2, rstd * (scaled_second - unit_second * mean), second)
        first = first.to(dtype)
        second = second.to(dtype)
        tl.store(place + head * WIDTH, first, mask=mask)
        tl.store(place + head * WIDTH + HALF, second, mask=mask)
        if RANK > 0:
            weight = B + head * WIDTH * RANK
            low = _press(first, weight, pair, HALF, RANK, RANK_PAD, low)
            low = _press(second, weight + HALF * RANK, pair, HALF, RANK, RANK_PAD, low)
        if REST > 0:
            x = tl.load(still_source + head * head_stride, mask=still_mask, other=0.0, eviction_policy="evict_first")
            tl.store(still_place + head * WIDTH, x, mask=still_mask)
            if RANK > 0:
                low = _press(x, weight + 2 * HALF * RANK, still, REST, RANK, RANK_PAD, low)
    if RANK > 0:
        rank = tl.arange(0, RANK_PAD)
        exists = (row < num_rows)[:, None] & (rank < RANK)[None, :]
        place = products + row[:, None] * (GROUPS * RANK) + group * RANK + rank[None, :]
        tl.store(place, low.to(products.dtype.element_ty), mask=exists)
    if WANTS:
        place = sums + (tl.program_id(0).to(tl.int64) * (GROUPS_Q + GROUPS_K) + group) * WIDTH + pair
        tl.store(place, tl.sum(sum_first, axis=0), mask=(pair < HALF) & (part < 2))
        tl.store(place + HALF, tl.sum(sum_second, axis=0), mask=(pair < HALF) & (part < 2))


@triton.jit
def _add_products(
    products, dxa, total, GROUPS_Q: tl.constexpr, GROUPS_K: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr
):
    """dxa [T, 3 R] of the products of groups [T, groups, R]."""
    MOST: tl.constexpr = GROUPS_Q if GROUPS_Q > GROUPS_K else GROUPS_K
    n = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    row, part, rank = n // (3 * RANK), n // RANK % 3, n % RANK
    begin = tl.where(part == 0, 0, tl.where(part == 1, GROUPS_Q, GROUPS_Q + GROUPS_K))
    count = tl.where(part == 0, GROUPS_Q, GROUPS_K)
    made = tl.zeros([SIZE], tl.float32)
    for number in tl.static_range(MOST):
        place = (row * (GROUPS_Q + 2 * GROUPS_K) + begin + number) * RANK + rank
        made += tl.load(products + place, mask=(n < total) & (number < count), other=0.0)
    tl.store(dxa + n, made.to(dxa.dtype.element_ty), mask=n < total)


@triton.jit
def _rstd(first, second, eps, WIDTH: tl.constexpr):
    """1 / root mean square of the heads whose halves these are."""
    return tl.rsqrt(tl.sum(first * first + second * second, axis=1) / WIDTH + eps)


@triton.jit
def _gain(weight, offset, channel, COUNT: tl.constexpr):
    """A row of what a norm multiplies by, for the channels from weight on."""
    return (tl.load(weight + channel, mask=channel < COUNT, other=0.0).to(tl.float32) + offset)[None, :]


@triton.jit
def _tile(source, row, stride, column, num_columns, num_rows):
    mask = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    return tl.load(source + row[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def _tile_low(xa, row, part, RANK: tl.constexpr, RANK_PAD: tl.constexpr, num_rows):
    """The columns of xa that belong to queries (part 0), keys (1) or values (2)."""
    rank = tl.arange(0, RANK_PAD)
    return _tile(xa + part * RANK, row, 3 * RANK, rank, RANK, num_rows)


@triton.jit
def _lift(low, B, channel, COUNT: tl.constexpr, RANK: tl.constexpr, RANK_PAD: tl.constexpr):
    """low Bᵀ, for the channels from B's row on."""
    rank = tl.arange(0, RANK_PAD)
    mask = (rank < RANK)[:, None] & (channel < COUNT)[None, :]
    weight = tl.load(B + channel[None, :] * RANK + rank[:, None], mask=mask, other=0.0)
    return tl.dot(low, weight, input_precision="ieee")


@triton.jit
def _press(x, B, channel, COUNT: tl.constexpr, RANK: tl.constexpr, RANK_PAD: tl.constexpr, low):
    """low + x B, for the channels from B's row on."""
    rank = tl.arange(0, RANK_PAD)
    mask = (channel < COUNT)[:, None] & (rank < RANK)[None, :]
    weight = tl.load(B + channel[:, None] * RANK + rank[None, :], mask=mask, other=0.0)
    return tl.dot(x, weight, low, input_precision="ieee")
