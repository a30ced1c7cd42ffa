# pyright: basic, reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false
"""LoRA, bias and rotation of queries, keys and values in place, and the way back: the twins of `ops.rope`.

A tile is one head of a few rows, in two halves whose channels turn in pairs, and what is not turned at all (`REST`).
The table's tiles stay in registers while a program walks over heads.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _HEADS = 32, 8  # forward: heads to a program, enough programs to keep memory busy, few readings of the table
_ROWS_BACK = 16  # the fewest that tensor cores take: a second pass over long rows finds more of them in the L2 cache
_CHUNK = 256  # columns at a time of the second pass


def rope(
    qkv: Tensor,
    xa: Tensor | None,
    Bs: tuple[Tensor, Tensor, Tensor] | None,
    bias: Tensor | None,
    table: tuple[Tensor, Tensor],
    heads: tuple[int, int, int],
) -> None:
    """Changes qkv in place. heads: of queries, of keys (and as many of values), channels of one."""
    num_q, num_k, width = heads
    adds = Bs is not None or bias is not None
    walked = num_q + 2 * num_k if adds else num_q + num_k  # what is not turned is left alone
    assert all(part is None or part.is_contiguous() for part in (qkv, xa, bias, *table, *(Bs or ())))
    if len(qkv) and walked:
        with _on(qkv):
            _rope[(triton.cdiv(len(qkv), _ROWS), triton.cdiv(walked, _HEADS))](
                qkv, xa, *(Bs or (None, None, None)), bias, *table, len(qkv), walked,
                NUM_Q=num_q, NUM_K=num_k, **_sizes(width, table, Bs), HAS_BIAS=bias is not None, ADDS=adds,
                ROWS=_ROWS, HEADS=_HEADS, num_warps=4,
            )  # fmt: skip


def rope_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    table: tuple[Tensor, Tensor],
    Bs: tuple[Tensor, Tensor, Tensor] | None,
    w_scale: Tensor | None,
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
    """(dqkv, dxa where there is LoRA, (values, scales) in 8 bits where `w_scale` is given)."""
    (num_rows, num_q, width), num_k = dq.shape, dk.shape[1]
    sizes = _sizes(width, table, Bs)
    dqkv = torch.empty((num_rows, (num_q + 2 * num_k) * width), dtype=dq.dtype, device=dq.device)
    dxa = None if Bs is None else torch.empty((num_rows, 3 * sizes["RANK"]), dtype=dq.dtype, device=dq.device)
    values = scales = None
    if w_scale is not None:
        values = torch.empty(dqkv.shape, dtype=torch.float8_e4m3fn, device=dq.device)
        scales = torch.empty(num_rows, dtype=torch.float32, device=dq.device)
    assert all(d.stride(2) == 1 for d in (dq, dk, dv))
    assert all(part is None or part.is_contiguous() for part in (w_scale, *table, *(Bs or ())))
    if num_rows:
        # The largest magnitude of a row is that of all three parts: one program then has all of it.
        grid = (triton.cdiv(num_rows, _ROWS_BACK), 3 if w_scale is None else 1)
        with _on(dq):
            _rope_backward[grid](
                dq, dk, dv, *table, *(Bs or (None, None, None)), w_scale, dqkv, dxa, values, scales, num_rows,
                *dq.stride()[:2], *dk.stride()[:2], *dv.stride()[:2],
                NUM_Q=num_q, NUM_K=num_k, **sizes, FP8=w_scale is not None,
                ROWS=_ROWS_BACK, CHUNK=_CHUNK, STAGES=3 if sizes["RANK_PAD"] <= 64 else 1, num_warps=4,
            )  # fmt: skip
    return dqkv, dxa, None if values is None or scales is None else (values, scales)


def _sizes(width: int, table: tuple[Tensor, Tensor], Bs: tuple[Tensor, Tensor, Tensor] | None) -> dict[str, int]:
    """Of a head, and of blocks that hold its parts: powers of two, and 16 at least, as tensor cores want."""
    half = table[0].shape[1]
    rest, rank = width - 2 * half, 0 if Bs is None else Bs[0].shape[1]
    assert half > 0 <= rest
    sizes = {"HALF": half, "REST": rest, "RANK": rank}
    pads = {f"{name}_PAD": max(16, 1 << (size - 1).bit_length()) if size else 0 for name, size in sizes.items()}
    return {"WIDTH": width, **sizes, **pads}


def _on(x: Tensor) -> torch.cuda.device | nullcontext[None]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@triton.jit(do_not_specialize=["num_rows"])
def _rope(
    qkv, xa, b_q, b_k, b_v, bias, cos_table, sin_table, num_rows, walked,
    NUM_Q: tl.constexpr, NUM_K: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    RANK: tl.constexpr, HALF_PAD: tl.constexpr, REST_PAD: tl.constexpr, RANK_PAD: tl.constexpr,
    HAS_BIAS: tl.constexpr, ADDS: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first_head = tl.program_id(1) * HEADS
    pair = tl.arange(0, HALF_PAD)
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
        if head < NUM_Q + NUM_K:
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
def _rope_backward(
    dq, dk, dv, cos_table, sin_table, b_q, b_k, b_v, w_scale, dqkv, dxa, values, scales, num_rows,
    q_token, q_head, k_token, k_head, v_token, v_head,
    NUM_Q: tl.constexpr, NUM_K: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    RANK: tl.constexpr, HALF_PAD: tl.constexpr, REST_PAD: tl.constexpr, RANK_PAD: tl.constexpr,
    FP8: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = (NUM_Q + 2 * NUM_K) * WIDTH
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    pair = tl.arange(0, HALF_PAD)
    cos = _tile(cos_table, row, HALF, pair, HALF, num_rows)
    sin = _tile(sin_table, row, HALF, pair, HALF, num_rows)
    amax = tl.zeros([ROWS], tl.float32)
    if FP8 or tl.program_id(1) == 0:
        amax = _part_back(
            dq, q_token, q_head, b_q, cos, sin, w_scale, dqkv, dxa, amax, row, num_rows, 0, 0, NUM_Q, True, N,
            WIDTH, HALF, REST, RANK, HALF_PAD, REST_PAD, RANK_PAD, FP8, ROWS, STAGES,
        )  # fmt: skip
    if FP8 or tl.program_id(1) == 1:
        amax = _part_back(
            dk, k_token, k_head, b_k, cos, sin, w_scale, dqkv, dxa, amax, row, num_rows, 1, NUM_Q, NUM_K, True, N,
            WIDTH, HALF, REST, RANK, HALF_PAD, REST_PAD, RANK_PAD, FP8, ROWS, STAGES,
        )  # fmt: skip
    if FP8 or tl.program_id(1) == 2:
        amax = _part_back(
            dv, v_token, v_head, b_v, cos, sin, w_scale, dqkv, dxa, amax, row, num_rows, 2, NUM_Q + NUM_K, NUM_K,
            False, N, WIDTH, HALF, REST, RANK, HALF_PAD, REST_PAD, RANK_PAD, FP8, ROWS, STAGES,
        )  # fmt: skip
    if FP8:
        scale = amax / 448.0
        scale = tl.where(scale == 0, 1.0, scale)
        tl.store(scales + row, scale, mask=row < num_rows)
        tl.debug_barrier()  # what follows was written by other threads of this program
        # Backwards: what was written last is still in the L2 cache.
        for number in range(tl.cdiv(N, CHUNK)):
            column = (tl.cdiv(N, CHUNK) - 1 - number) * CHUNK + tl.arange(0, CHUNK)
            mask = (row < num_rows)[:, None] & (column < N)[None, :]
            at = row[:, None] * N + column[None, :]
            x = tl.load(dqkv + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
            x = x * tl.load(w_scale + column, mask=column < N, other=0.0)[None, :] / scale[:, None]
            tl.store(values + at, x.to(tl.float8e4nv), mask=mask)


@triton.jit
def _part_back(
    given, token_stride, head_stride, B, cos, sin, w_scale, dqkv, dxa, amax, row, num_rows,
    PART: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr, TURNS: tl.constexpr, N: tl.constexpr,
    WIDTH: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, RANK: tl.constexpr,
    HALF_PAD: tl.constexpr, REST_PAD: tl.constexpr, RANK_PAD: tl.constexpr,
    FP8: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Queries, keys or values; the largest magnitude of each row so far comes back."""
    pair = tl.arange(0, HALF_PAD)
    mask = (row < num_rows)[:, None] & (pair < HALF)[None, :]
    dtype = dqkv.dtype.element_ty
    largest = tl.zeros([ROWS, HALF_PAD], tl.float32)  # reduced once, at the end
    if RANK > 0:
        low = tl.zeros([ROWS, RANK_PAD], tl.float32)
    for head in tl.range(0, COUNT, num_stages=STAGES):
        source = given + row[:, None] * token_stride + head * head_stride + pair[None, :]
        first = tl.load(source, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        second = tl.load(source + HALF, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if TURNS:
            turned = first * cos + second * sin
            second = second * cos - first * sin
            first = turned
        first, second = first.to(dtype), second.to(dtype)
        column = (FIRST + head) * WIDTH + pair
        place = dqkv + row[:, None] * N + column[None, :]
        tl.store(place, first, mask=mask)
        tl.store(place + HALF, second, mask=mask)
        if RANK > 0:
            weight = B + head * WIDTH * RANK
            low = _press(first, weight, pair, HALF, RANK, RANK_PAD, low)
            low = _press(second, weight + HALF * RANK, pair, HALF, RANK, RANK_PAD, low)
        if FP8:
            largest = tl.maximum(largest, _magnitude(first, w_scale + column, pair, HALF))
            largest = tl.maximum(largest, _magnitude(second, w_scale + column + HALF, pair, HALF))
        if REST > 0:
            still = tl.arange(0, REST_PAD)
            still_mask = (row < num_rows)[:, None] & (still < REST)[None, :]
            source = given + row[:, None] * token_stride + head * head_stride + 2 * HALF + still[None, :]
            x = tl.load(source, mask=still_mask, other=0.0, eviction_policy="evict_first")
            still_column = (FIRST + head) * WIDTH + 2 * HALF + still
            tl.store(dqkv + row[:, None] * N + still_column[None, :], x, mask=still_mask)
            if RANK > 0:
                low = _press(x, weight + 2 * HALF * RANK, still, REST, RANK, RANK_PAD, low)
            if FP8:
                amax = tl.maximum(amax, tl.max(_magnitude(x, w_scale + still_column, still, REST), axis=1))
    if RANK > 0:
        rank = tl.arange(0, RANK_PAD)
        place = dxa + row[:, None] * (3 * RANK) + PART * RANK + rank[None, :]
        tl.store(place, low.to(dtype), mask=(row < num_rows)[:, None] & (rank < RANK)[None, :])
    return tl.maximum(amax, tl.max(largest, axis=1))


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


@triton.jit
def _magnitude(x, w_scale, channel, COUNT: tl.constexpr):
    scale = tl.load(w_scale, mask=channel < COUNT, other=0.0)
    return tl.abs(x.to(tl.float32) * scale[None, :])
