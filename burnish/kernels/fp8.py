# pyright: basic, reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
"""Rows and weights to e4m3: the twins of `ops.fp8`."""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from burnish.kernels.bytes import chosen, swapped, turned, word_of
from burnish.kernels.nf4 import block_scales

_LONGEST = 2**15  # values of a row that one program holds in registers
_STAYS = 3 * 2**13  # as many with as many scales of columns beside them


def quantise_rows(x_TK: Tensor, w_scale_K: Tensor | None) -> tuple[Tensor, Tensor]:
    """The values in e4m3 and the scale of each row; x is read once, but twice where a row is longer than 32,768."""
    num_rows, width = x_TK.shape
    values = torch.empty((num_rows, width), dtype=torch.float8_e4m3fn, device=x_TK.device)
    scale = torch.empty(num_rows, dtype=torch.float32, device=x_TK.device)
    if not values.numel():
        return values, scale
    given = (x_TK, w_scale_K, values, scale, width, x_TK.stride(0))
    held, rest = _powers(width)
    with _on(x_TK):
        if w_scale_K is not None and held + rest <= _STAYS:
            # 48 values and 48 scales to a thread at most: 512 threads of them fill the registers of a multiprocessor.
            warps = min(triton.next_power_of_2(triton.cdiv(held + rest, 48 * 32)), 16)
            _quantise_many[(min(_multiprocessors(x_TK) * 16 // warps, num_rows),)](
                *given, num_rows, HELD=held, REST=rest, STAGES=3, num_warps=warps
            )
            return values, scale
        if held + rest > _LONGEST:
            held, rest, warps = _LONGEST, 0, 16
        elif w_scale_K is None and held <= 8192:
            held, rest, warps = held << (rest > 0), 0, min(max(held // 512, 1), 8)
        else:
            warps = min(max(held // 1024, 1), 16)
        _quantise_rows[(num_rows,)](
            *given, WEIGHTED=w_scale_K is not None, HELD=held, REST=rest, WHOLE=held + rest >= width, num_warps=warps
        )
    return values, scale


def _multiprocessors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


def _powers(width: int) -> tuple[int, int]:
    """Two powers of two that hold so many values, or one and 0: 11,008 are 8,192 + 4,096, where one is 16,384."""
    whole = 1 << (width - 1).bit_length()
    if whole == width or width < 64:
        return whole, 0
    return whole // 2, 1 << (width - whole // 2 - 1).bit_length()


def dense_to_fp8(w_OI: Tensor, w_scale_O: Tensor, transposed: bool, made: Tensor) -> Tensor:
    """`made`, filled with w / w_scale[:, None]; its sides are multiples of 16."""
    assert w_OI.stride(1) == 1
    rows, columns = w_OI.shape
    with _on(w_OI):
        if transposed:
            _dense_transposed[(triton.cdiv(rows, 128), triton.cdiv(columns, 64))](
                w_OI,
                w_scale_O,
                made.view(torch.int32),
                rows,
                columns,
                w_OI.stride(0),
                made.stride(0) // 4,
                ROWS=128,
                COLUMNS=64,
                num_warps=4,
            )
        else:
            _dense[(triton.cdiv(columns, 512), triton.cdiv(rows, 8))](
                w_OI, w_scale_O, made, rows, columns, w_OI.stride(0), ROWS=8, COLUMNS=512, num_warps=4
            )
    return made


def nf4_to_fp8(
    parts: tuple[Tensor, Tensor, Tensor],
    tables: tuple[Tensor, Tensor],
    shape: tuple[int, int],
    w_scale_O: Tensor,
    transposed: bool,
    made: Tensor,
) -> Tensor:
    """`made`, filled with the values of the codes / w_scale[:, None].

    `parts` and `tables` are those of `kernels.nf4.dequantise`; a row is whole blocks, and rows are a multiple of 4.
    """
    codes, scales, nested = parts
    rows, blocks = shape[0], shape[1] // 64
    given = (codes.view(torch.int32), scales, nested, *tables, w_scale_O, made.view(torch.int32))
    counts = (rows, blocks, max(nested.numel() - 1, 0))
    double = nested.numel() > 0
    with _on(codes):
        if transposed:
            _nf4_transposed[(triton.cdiv(rows, 64), triton.cdiv(blocks, 4))](
                *given, *counts, made.stride(0) // 4, DOUBLE=double, ROWS=64, BLOCKS=4, num_warps=4,
                enable_fp_fusion=False,
            )  # fmt: skip
        else:
            _nf4[(triton.cdiv(rows * blocks, 128),)](
                *given, *counts, DOUBLE=double, BLOCKS=128, num_warps=4, enable_fp_fusion=False
            )
    return made


def _on(x: Tensor):
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@triton.jit
def row_scale(amax):
    """amax / 448, and 1 for rows of (next to) zeros: the rule of `ops.fp8.row_scale`."""
    return tl.where(amax < 1e-30, 1.0, tl.div_rn(amax, 448.0))


@triton.jit
def reciprocal(w_scale, row, rows):
    """What the values of these rows are multiplied by, in fp32."""
    return tl.div_rn(1.0, tl.load(w_scale + row, mask=row < rows, other=1.0))


@triton.jit
def _quantise_rows(
    x, w_scale, values, scale, width, stride,
    WEIGHTED: tl.constexpr, HELD: tl.constexpr, REST: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    row = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)  # the rows written last are still in the L2 cache
    column = tl.arange(0, HELD)
    held = _weighted(x + row * stride, w_scale, column, width, WEIGHTED)
    amax = tl.max(tl.abs(held), axis=0)
    if REST > 0:
        more_column = HELD + tl.arange(0, REST)
        more = _weighted(x + row * stride, w_scale, more_column, width, WEIGHTED)
        amax = tl.maximum(amax, tl.max(tl.abs(more), axis=0))
    if not WHOLE:
        for first in range(HELD, width, HELD):
            rest = _weighted(x + row * stride, w_scale, first + column, width, WEIGHTED)
            amax = tl.maximum(amax, tl.max(tl.abs(rest), axis=0))
    divisor = row_scale(amax)
    factor = tl.div_rn(1.0, divisor)
    tl.store(values + row * width + column, (held * factor).to(tl.float8e4nv), mask=column < width)
    if REST > 0:
        tl.store(values + row * width + more_column, (more * factor).to(tl.float8e4nv), mask=more_column < width)
    if not WHOLE:
        for first in range(HELD, width, HELD):
            rest = _weighted(x + row * stride, w_scale, first + column, width, WEIGHTED)
            place = first + column
            tl.store(values + row * width + place, (rest * factor).to(tl.float8e4nv), mask=place < width)
    tl.store(scale + row, divisor)


@triton.jit(do_not_specialize=["num_rows"])
def _quantise_many(
    x, w_scale, values, scale, width, stride, num_rows, HELD: tl.constexpr, REST: tl.constexpr, STAGES: tl.constexpr
):
    """A program stays for many rows: it holds the scales of columns, and the next rows are under way meanwhile."""
    column, more_column = tl.arange(0, HELD), HELD + tl.arange(0, REST if REST > 0 else HELD)
    held_scale = tl.load(w_scale + column, mask=column < width, other=0.0)
    if REST > 0:
        more_scale = tl.load(w_scale + more_column, mask=more_column < width, other=0.0)
    for number in tl.range(tl.program_id(0), num_rows, tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(num_rows - 1 - number, tl.int64)  # the rows written last are still in the L2 cache
        held = tl.load(x + row * stride + column, mask=column < width, other=0.0).to(tl.float32) * held_scale
        amax = tl.max(tl.abs(held), axis=0)
        if REST > 0:
            more = tl.load(x + row * stride + more_column, mask=more_column < width, other=0.0).to(tl.float32)
            more = more * more_scale
            amax = tl.maximum(amax, tl.max(tl.abs(more), axis=0))
        divisor = row_scale(amax)
        factor = tl.div_rn(1.0, divisor)
        tl.store(values + row * width + column, (held * factor).to(tl.float8e4nv), mask=column < width)
        if REST > 0:
            tl.store(values + row * width + more_column, (more * factor).to(tl.float8e4nv), mask=more_column < width)
        tl.store(scale + row, divisor)


@triton.jit
def _weighted(x, w_scale, column, width, WEIGHTED: tl.constexpr):
    held = tl.load(x + column, mask=column < width, other=0.0).to(tl.float32)
    if WEIGHTED:
        held = held * tl.load(w_scale + column, mask=column < width, other=0.0)
    return held


@triton.jit
def _dense(w, w_scale, made, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    here = (row < rows)[:, None] & (column < columns)[None, :]
    value = tl.load(w + row.to(tl.int64)[:, None] * stride + column[None, :], mask=here, other=0.0).to(tl.float32)
    value = value * reciprocal(w_scale, row, rows)[:, None]
    place = row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(made + place, value.to(tl.float8e4nv), mask=here)


@triton.jit
def _dense_transposed(w, w_scale, made, rows, columns, stride, pitch, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Four rows at a time become the bytes of one word, so that the tile is turned around in words."""
    four = tl.program_id(0) * (ROWS // 4) + tl.arange(0, ROWS // 4)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = (four * 4 < rows)[:, None] & (column < columns)[None, :]
    packed = tl.zeros((ROWS // 4, COLUMNS), tl.int32)
    for k in tl.static_range(4):
        row = four * 4 + k
        value = tl.load(w + row.to(tl.int64)[:, None] * stride + column[None, :], mask=here, other=0.0).to(tl.float32)
        value = value * reciprocal(w_scale, row, rows)[:, None]
        packed |= _as_byte(value) << (8 * k)
    _store_transposed(packed, made, four, column, rows, columns, pitch)


@triton.jit
def _nf4(
    codes, scales, nested, levels, scale_levels, w_scale, made, rows, blocks, num_nested,
    DOUBLE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """A row is `blocks` blocks of 64 values."""
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    block = tl.arange(0, BLOCKS)
    number = tl.program_id(0) * BLOCKS + block
    here = number < rows * blocks
    place = block[:, None] * 8 + tl.arange(0, 8)[None, :]
    packed = tl.load(codes + first * 8 + place, mask=here[:, None], other=0, eviction_policy="evict_first")
    scale = block_scales(scales, nested, scale_levels, number, here, num_nested, DOUBLE)
    factor = reciprocal(w_scale, number // blocks, rows)
    low, high = _bytes_of(packed, levels, scale[:, None], factor[:, None])
    words = tl.join(swapped(low), swapped(high)).reshape(BLOCKS, 16)
    place = block[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(made + first * 16 + place, words, mask=here[:, None])


@triton.jit
def _nf4_transposed(
    codes, scales, nested, levels, scale_levels, w_scale, made, rows, blocks, num_nested, pitch,
    DOUBLE: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Four rows at a time become the bytes of one word, so that the tile is turned around in words."""
    four = tl.program_id(0) * (ROWS // 4) + tl.arange(0, ROWS // 4)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    given = codes, scales, nested, levels, scale_levels, w_scale
    low_0, high_0 = _row_of_bytes(given, four * 4, block, rows, blocks, num_nested, DOUBLE)
    low_1, high_1 = _row_of_bytes(given, four * 4 + 1, block, rows, blocks, num_nested, DOUBLE)
    low_2, high_2 = _row_of_bytes(given, four * 4 + 2, block, rows, blocks, num_nested, DOUBLE)
    low_3, high_3 = _row_of_bytes(given, four * 4 + 3, block, rows, blocks, num_nested, DOUBLE)
    w1, w0, w3, w2 = turned(low_0, low_1, low_2, low_3)
    w5, w4, w7, w6 = turned(high_0, high_1, high_2, high_3)
    even = tl.join(tl.join(w0, w4), tl.join(w2, w6))
    odd = tl.join(tl.join(w1, w5), tl.join(w3, w7))
    packed = tl.join(even, odd).reshape(ROWS // 4, BLOCKS * 64)
    column = tl.program_id(1) * (BLOCKS * 64) + tl.arange(0, BLOCKS * 64)
    _store_transposed(packed, made, four, column, rows, blocks * 64, pitch)


@triton.jit
def _row_of_bytes(given, row, block, rows, blocks, num_nested, DOUBLE: tl.constexpr):
    """`_bytes_of` the words [rows, blocks, 8] of these blocks."""
    codes, scales, nested, levels, scale_levels, w_scale = given
    here = (row < rows)[:, None] & (block < blocks)[None, :]
    number = row.to(tl.int64)[:, None] * blocks + block[None, :]
    place = number[:, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    packed = tl.load(codes + place, mask=here[:, :, None], other=0, eviction_policy="evict_first")
    scale = block_scales(scales, nested, scale_levels, number, here, num_nested, DOUBLE)
    return _bytes_of(packed, levels, scale[:, :, None], reciprocal(w_scale, row, rows)[:, None, None])


@triton.jit
def _bytes_of(packed, levels, scale, factor):
    """The e4m3 bytes of the 8 codes of each word, four to a word. In each byte of codes the first is the high half:
    bytes 0 and 1 are exchanged, and so are 2 and 3.

    A block has 16 values. They are made once, by two threads, which then pick theirs.
    """
    t0, t1 = _four_levels(levels, scale, factor), _four_levels(levels + 4, scale, factor)
    t2, t3 = _four_levels(levels + 8, scale, factor), _four_levels(levels + 12, scale, factor)
    return chosen(packed, t0, t1, t2, t3)


@triton.jit
def _four_levels(levels, scale, factor):
    a, b = tl.load(levels) * scale * factor, tl.load(levels + 1) * scale * factor
    c, d = tl.load(levels + 2) * scale * factor, tl.load(levels + 3) * scale * factor
    return word_of(a, b, c, d)


@triton.jit
def _as_byte(value):
    return value.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)


@triton.jit
def _store_transposed(packed, made, four, column, rows, columns, pitch):
    """Words [rows / 4, columns] to [columns, rows / 4] in memory, rows of it `pitch` words apart."""
    place = column.to(tl.int64)[:, None] * pitch + four[None, :]
    here = (column < columns)[:, None] & (four < rows // 4)[None, :]
    tl.store(made + place, tl.trans(packed), mask=here)
