# pyright: basic, reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
"""AdamW over any number of tensors in one launch, their addresses in a table: the twin of `optim.adamw`, bit for bit.

A table has a row per tensor, or per piece of one whose moments lie in several places: the addresses of weight, gradient
and both moments, and with 8-bit moments those of their scales, each where the tensor's first value has its own or would
have it. A gradient at 0 is none, and its tensor is left alone. Each program takes one chunk of one tensor, and a launch
as many programs of the table as it is told to.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHUNK = 16384  # values to a program: a tensor of a LoRA has a few, and 7e9 weights have 4e5
_BLOCK = 1024  # of them at once, 4 to a thread: with 8 the 8-bit update takes 230 registers


class Table(NamedTuple):
    """Tensors of one dtype and kind of state, for one launch."""

    addresses: Tensor
    """int64 [rows, 4], or 6 with 8-bit moments: weight, gradient, moments, their scales."""
    facts: Tensor
    """int64 [all rows, 2]: how many values, and the tensor's number, which its random numbers hang on."""
    chunks: Tensor
    """int32 [all programs, 2]: which row, and which chunk of its tensor."""
    half: bool
    """Weights and gradients are bf16, else fp32."""
    aligned: bool
    """Every address is a multiple of 16."""
    row: int
    """Of which row the first addresses are."""
    programs: range
    """Those whose rows have addresses."""


def chunks_of(spans: Sequence[tuple[int, int]]) -> Tensor:
    """The chunks of rows that begin and end at these values of their tensors, for a table."""
    assert all(first % _CHUNK == 0 for first, _ in spans)
    programs = torch.tensor([triton.cdiv(last - first, _CHUNK) for first, last in spans])
    row = torch.arange(len(spans)).repeat_interleave(programs)
    before = programs.cumsum(0) - programs - torch.tensor([first // _CHUNK for first, _ in spans])
    return torch.stack([row, torch.arange(len(row)) - before.repeat_interleave(programs)], dim=1).int()


def squares(table: Table) -> Tensor:
    """The sum of squares of each chunk of the gradients, in fp32."""
    sums = torch.empty(len(table.programs), dtype=torch.float32, device=table.chunks.device)
    if len(table.programs):
        with _on(sums.device):
            _squares[(len(table.programs),)](
                table.addresses, table.facts, table.chunks, sums, table.programs.start, table.row,
                WIDTH=table.addresses.shape[1], HALF=table.half, ALIGNED=table.aligned, CHUNK=_CHUNK, BLOCK=_BLOCK,
                num_warps=8,
            )  # fmt: skip
    return sums


def update(
    table: Table, scale: Tensor, numbers: Sequence[float], seed: int, step: int, maps: Sequence[Tensor], lowest: int
) -> None:
    """One step: the gradient times `scale`, one fp32 number on the device, into moments and weights.

    `numbers` are, in this order: what decay leaves, the step size, the inverse root of the second bias correction,
    eps, and each beta with 1 minus it. `maps` are the 8-bit levels of both moments and the tables that find the
    nearest of them (`optim.eight_bit`), or none where moments are fp32.
    """
    if not len(table.programs):
        return
    with _on(scale.device):
        _update[(len(table.programs),)](
            table.addresses, table.facts, table.chunks, scale, *numbers, seed, step, *(maps or [scale] * 6),
            table.programs.start, table.row,
            WIDTH=table.addresses.shape[1], HALF=table.half, EIGHT=bool(maps), ALIGNED=table.aligned,
            LOWEST=lowest, CHUNK=_CHUNK, BLOCK=_BLOCK, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip


def _on(device: torch.device):
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@triton.jit
def _place(chunks, facts, first_program, CHUNK: tl.constexpr):
    """Which row a program works on, from which value of its tensor, and up to which."""
    program = tl.program_id(0) + first_program
    row = tl.load(chunks + 2 * program).to(tl.int64)
    first = tl.load(chunks + 2 * program + 1).to(tl.int64) * CHUNK
    return row, first, tl.minimum(first + CHUNK, tl.load(facts + 2 * row))


@triton.jit
def _pointer(address, dtype: tl.constexpr, start, ALIGNED: tl.constexpr):
    """The address of value `start`, a multiple of a block, of a tensor of this dtype."""
    pointer = address.to(tl.pointer_type(dtype)) + start
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _offsets(start, last, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """Where a block's values are from its start, in rows of 256, and which of them there are."""
    offset = tl.arange(0, BLOCK // 256)[:, None] * 256 + tl.arange(0, 256)[None, :]
    # Known to be true, a mask is no mask: then loads and stores take 16 bytes at once.
    return offset, tl.full((BLOCK // 256, 256), 1, tl.int1) if WHOLE else start + offset < last


@triton.jit
def _gradient(address, start, offset, mask, HALF: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = _pointer(address, tl.bfloat16 if HALF else tl.float32, start, ALIGNED)
    return tl.load(pointer + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["first_program", "first_row"])
def _squares(
    addresses, facts, chunks, sums, first_program, first_row,
    WIDTH: tl.constexpr, HALF: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, first, last = _place(chunks, facts, first_program, CHUNK)
    address = tl.load(addresses + (row - first_row) * WIDTH + 1)
    total = tl.zeros((BLOCK // 256, 256), tl.float32)
    if address != 0:
        for part in range(0, CHUNK, BLOCK):
            start = first + part
            if start + BLOCK <= last:
                offset, mask = _offsets(start, last, True, BLOCK)
                gradient = _gradient(address, start, offset, mask, HALF, ALIGNED)
                total += gradient * gradient
            elif start < last:
                offset, mask = _offsets(start, last, False, BLOCK)
                gradient = _gradient(address, start, offset, mask, HALF, ALIGNED)
                total += gradient * gradient
    tl.store(sums + tl.program_id(0), tl.sum(tl.sum(total, axis=1), axis=0))


@triton.jit(do_not_specialize=["seed", "step", "first_program", "first_row"])
def _update(
    addresses, facts, chunks, scale, decay, size, inverse_root, eps, beta1, rest1, beta2, rest2, seed, step,
    levels1, levels2, guess1, middles1, guess2, middles2, first_program, first_row,
    WIDTH: tl.constexpr, HALF: tl.constexpr, EIGHT: tl.constexpr, ALIGNED: tl.constexpr, LOWEST: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place, first, last = _place(chunks, facts, first_program, CHUNK)
    number = tl.load(facts + 2 * place + 1)
    row = addresses + (place - first_row) * WIDTH
    factor = tl.load(scale)
    # A gradient that is no number leaves everything as it was: whoever asked for the step hears of it later.
    if (tl.load(row + 1) != 0) & (factor == factor):
        for part in range(0, CHUNK, BLOCK):
            start = first + part
            if start + BLOCK <= last:
                _update_block(
                    row, start, last, number, factor, decay, size, inverse_root, eps, beta1, rest1, beta2, rest2,
                    seed, step, levels1, levels2, guess1, middles1, guess2, middles2,
                    HALF, EIGHT, ALIGNED, LOWEST, BLOCK, True,
                )  # fmt: skip
            elif start < last:
                _update_block(
                    row, start, last, number, factor, decay, size, inverse_root, eps, beta1, rest1, beta2, rest2,
                    seed, step, levels1, levels2, guess1, middles1, guess2, middles2,
                    HALF, EIGHT, ALIGNED, LOWEST, BLOCK, False,
                )  # fmt: skip


@triton.jit
def _update_block(
    row, start, last, number, factor, decay, size, inverse_root, eps, beta1, rest1, beta2, rest2, seed, step,
    levels1, levels2, guess1, middles1, guess2, middles2,
    HALF: tl.constexpr, EIGHT: tl.constexpr, ALIGNED: tl.constexpr, LOWEST: tl.constexpr, BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    offset, mask = _offsets(start, last, WHOLE, BLOCK)
    state: tl.constexpr = tl.uint8 if EIGHT else tl.float32
    weights = _pointer(tl.load(row), tl.bfloat16 if HALF else tl.float32, start, ALIGNED) + offset
    firsts = _pointer(tl.load(row + 2), state, start, ALIGNED) + offset
    seconds = _pointer(tl.load(row + 3), state, start, ALIGNED) + offset
    gradient = _gradient(tl.load(row + 1), start, offset, mask, HALF, ALIGNED) * factor
    weight = tl.load(weights, mask=mask, other=0.0).to(tl.float32)
    first = tl.load(firsts, mask=mask, other=0)
    second = tl.load(seconds, mask=mask, other=0)
    if EIGHT:
        block = start // 256 + tl.arange(0, BLOCK // 256)
        exists = block * 256 < last
        absmax1 = tl.load(row + 4).to(tl.pointer_type(tl.float32)) + block
        absmax2 = tl.load(row + 5).to(tl.pointer_type(tl.float32)) + block
        first = tl.load(levels1 + first.to(tl.int32)) * tl.load(absmax1, mask=exists, other=0.0)[:, None]
        second = tl.load(levels2 + second.to(tl.int32)) * tl.load(absmax2, mask=exists, other=0.0)[:, None]
    first = beta1 * first + rest1 * gradient
    second = beta2 * second + rest2 * (gradient * gradient)
    root = tl.sqrt_rn(second) * inverse_root + eps
    weight = weight * decay - size * tl.div_rn(first, root)
    if HALF:
        weight = _round_by_chance(weight, start, number, seed, step, BLOCK)
    tl.store(weights, weight, mask=mask)
    if EIGHT:
        # What lies beyond the tensor's end must not make a scale: a code of 0 stands for the lowest level there.
        first, second = tl.where(mask, first, 0.0), tl.where(mask, second, 0.0)
        top, unit = _unit(first)
        tl.store(absmax1, top, mask=exists)
        tl.store(firsts, _nearest_signed(unit, guess1, middles1, LOWEST), mask=mask)
        top, unit = _unit(second)
        tl.store(absmax2, top, mask=exists)
        level, _ = _nearest(unit, guess2, middles2, LOWEST, True)
        level = tl.maximum(level, (unit > 0).to(tl.int32))  # never 0 where there was something: see `optim.eight_bit`
        tl.store(seconds, level.to(tl.uint8), mask=mask)
    else:
        tl.store(firsts, first, mask=mask)
        tl.store(seconds, second, mask=mask)


@triton.jit
def _unit(values):
    """The largest magnitude of each row, and the row divided by it."""
    top = tl.max(tl.abs(values), axis=1)
    inverse = tl.where(top > 0, tl.div_rn(tl.zeros_like(top) + 1.0, tl.where(top > 0, top, 1.0)), 0.0)
    return top, values * inverse[:, None]


@triton.jit
def _nearest(unit, guess, middles, LOWEST: tl.constexpr, POSITIVE: tl.constexpr):
    """How many midpoints lie below a magnitude; `optim.eight_bit.search` explains the tables."""
    magnitude = tl.abs(unit)
    bucket = (magnitude.to(tl.int32, bitcast=True) >> 16) - LOWEST
    level = tl.load(guess + tl.minimum(tl.maximum(bucket, 0), 0x3F80 - LOWEST)).to(tl.int32)
    middle = tl.load(middles + level)
    negative = unit < 0
    # On a midpoint both levels are as near: the lower one is taken, which has the greater magnitude below 0.
    above = magnitude > middle if POSITIVE else tl.where(negative, magnitude >= middle, magnitude > middle)
    return level + above.to(tl.int32), negative


@triton.jit
def _nearest_signed(unit, guess, middles, LOWEST: tl.constexpr):
    level, negative = _nearest(unit, guess, middles, LOWEST, False)
    return tl.where(negative, 127 - tl.minimum(level, 127), 127 + level).to(tl.uint8)  # there is no level of -1


@triton.jit
def _round_by_chance(values, start, number, seed, step, BLOCK: tl.constexpr):
    """bf16, up as often as a value lies above its lower neighbour: the twin of `optim.rounding`, bit for bit."""
    group = (start // 8 + tl.arange(0, BLOCK // 8)).to(tl.int32)
    second, third = tl.zeros_like(group) + number.to(tl.int32), tl.zeros_like(group) + step
    a, b, c, d = tl.philox(seed, group, second, third, tl.zeros_like(group))
    # Eight numbers of 16 bits to a group, laid side by side: a's lower half is the first, d's upper half the last.
    lower = tl.join(tl.join(a & 0xFFFF, c & 0xFFFF), tl.join(b & 0xFFFF, d & 0xFFFF))
    upper = tl.join(tl.join(a >> 16, c >> 16), tl.join(b >> 16, d >> 16))
    chance = tl.reshape(tl.join(lower, upper), (BLOCK // 256, 256)).to(tl.int32, bitcast=True)
    bits = (values.to(tl.int32, bitcast=True) + chance) >> 16
    return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
