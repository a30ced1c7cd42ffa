"""Rows in 8 bits: e4m3 numbers with one fp32 scale to a row, and matrix products of them.

A row is divided by its largest magnitude / 448, so that the largest value is the largest number of the format. Three
bits of mantissa leave a relative error of 2.65 % on Gaussian values.

A frozen weight has one scale per output, w ≈ w8 * w_scale[:, None], and serves both passes: y = x8 w8ᵀ with both
scales, and dx = (dy * w_scale)8 w8, where the scale goes into dy before dy is quantised. Hopper multiplies 8-bit
matrices only where both run along the sum in memory, so the second pass wants the weight transposed.
"""

from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from burnish.ops import runs_kernels
from burnish.ops.nf4 import BLOCK, dequantise, kernel_scales, restore_scales, tables

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
FAST_ACCUMULATION = True
"""Whether Hopper's tensor cores add up in their own 22-bit registers all along the sum, not in fp32 every 128 terms."""

_ZERO = 1e-30  # rows of smaller numbers count as zeros: 448 / amax would overflow near 1e-36
_HALF = (torch.bfloat16, torch.float16)


class Quantised(NamedTuple):
    """A matrix in 8 bits: values * scale[:, None]."""

    values: Float[Tensor, "T K"]
    """float8_e4m3fn, of magnitude at most 448."""
    scale: Float[Tensor, " T"]
    """fp32: the largest magnitude of the row / 448; 1 for a row of zeros."""


def quantise_rows(x_TK: Float[Tensor, "T K"], w_scale_K: Float[Tensor, " K"] | None = None) -> Quantised:
    """x, times `w_scale` by columns where that is given, in 8 bits."""
    if _has_kernels(x_TK.device) and x_TK.dtype in _HALF:
        from burnish.kernels.fp8 import quantise_rows as kernel

        return Quantised(*kernel(x_TK, w_scale_K))
    wide_TK = _wide(x_TK)
    if w_scale_K is not None:
        wide_TK = wide_TK * w_scale_K.to(wide_TK.dtype)
    scale_T = row_scale(wide_TK.abs().amax(dim=1))
    return Quantised((wide_TK * scale_T.to(wide_TK.dtype).reciprocal().unsqueeze(1)).to(FP8), scale_T)


def row_scale(amax_T: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """What rows with these largest magnitudes are divided by, in fp32: 1 where all is (next to) zero."""
    amax_T = amax_T.float()
    return torch.where(amax_T < _ZERO, torch.ones_like(amax_T), amax_T / FP8_MAX)


def scaled_matmul(
    x8: Quantised,
    w8_OK: Float[Tensor, "O K"],
    w_scale_O: Float[Tensor, " O"] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Float[Tensor, "T O"]:
    """x Wᵀ, of a weight in 8 bits with one scale per row, or with none.

    Added up in fp32 and rounded once to `dtype`; on a GPU to bf16 first. There K and O are multiples of 16.
    """
    if _native(w8_OK.device):
        scale_1O = _ones(len(w8_OK), w8_OK.device) if w_scale_O is None else w_scale_O
        y_TO = torch.ops.aten._scaled_mm(
            x8.values, w8_OK.t(), x8.scale.unsqueeze(1), scale_1O.unsqueeze(0),
            out_dtype=torch.bfloat16, use_fast_accum=FAST_ACCUMULATION,
        )  # fmt: skip
        return y_TO.to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    y_TO = (x8.values.to(wide) @ w8_OK.to(wide).T) * x8.scale.to(wide).unsqueeze(1)
    return (y_TO if w_scale_O is None else y_TO * w_scale_O.to(wide)).to(dtype)


def weight_scale(w_OI: Float[Tensor, "O I"]) -> Float[Tensor, " O"]:
    """One scale per output channel."""
    return row_scale(torch.linalg.vector_norm(w_OI, float("inf"), dim=1))


def nf4_weight_scale(
    codes: UInt8[Tensor, " bytes"],
    scales: UInt8[Tensor, " scales"],
    nested: UInt8[Tensor, " nested"],
    shape: tuple[int, int],
) -> Float[Tensor, " O"]:
    """`weight_scale` of what the codes stand for.

    Where rows are whole blocks, a row reaches the largest scale of its blocks, since one value of a block is its
    scale, or stays below it in a block of zeros. No dense weight is made.
    """
    if shape[1] % BLOCK:
        return weight_scale(dequantise(codes, scales, nested, shape, torch.float32))
    return row_scale(restore_scales(scales, nested).view(shape[0], -1).abs().amax(dim=1))


def dense_to_fp8(
    w_OI: Float[Tensor, "O I"],
    w_scale_O: Float[Tensor, " O"],
    transposed: bool,
    out: Float[Tensor, "..."] | None = None,
) -> Float[Tensor, "..."]:
    """The weight over its scales in e4m3, [O, I], or [I, O] where `transposed`; in `out` where that is given.

    A transposed `out` may be columns of a larger matrix.
    """
    shape = (w_OI.shape[0], w_OI.shape[1])
    made = _given(out, shape, transposed, w_OI.device)
    if _has_kernels(w_OI.device) and w_OI.dtype in _HALF and _in_tiles(shape):
        from burnish.kernels.fp8 import dense_to_fp8 as kernel

        return kernel(w_OI, w_scale_O, transposed, made)
    wide_OI = _wide(w_OI)
    values_OI = (wide_OI * w_scale_O.reciprocal().to(wide_OI.dtype).unsqueeze(1)).to(FP8)
    return made.copy_(values_OI.T if transposed else values_OI)


def nf4_to_fp8(
    codes: UInt8[Tensor, " bytes"],
    scales: UInt8[Tensor, " scales"],
    nested: UInt8[Tensor, " nested"],
    shape: tuple[int, int],
    w_scale_O: Float[Tensor, " O"],
    transposed: bool,
    out: Float[Tensor, "..."] | None = None,
) -> Float[Tensor, "..."]:
    """`dense_to_fp8` of what the codes stand for: on a GPU no dense weight lies between rows of whole blocks and it."""
    in_blocks = shape[0] % 16 == 0 and shape[1] % BLOCK == 0
    if _has_kernels(codes.device) and in_blocks and codes.data_ptr() % 16 == 0:
        from burnish.kernels.fp8 import nf4_to_fp8 as kernel

        made = _given(out, shape, transposed, codes.device)
        parts = (codes, *kernel_scales(scales, nested))
        return kernel(parts, tables(codes.device), shape, w_scale_O, transposed, made)
    dense_OI = dequantise(codes, scales, nested, shape, torch.float32)
    return dense_to_fp8(dense_OI, w_scale_O, transposed, out)


def _given(out: Tensor | None, shape: tuple[int, int], transposed: bool, device: torch.device) -> Tensor:
    shape = (shape[1], shape[0]) if transposed else shape
    if out is None:
        return torch.empty(shape, dtype=FP8, device=device)
    assert (out.shape, out.dtype) == (shape, FP8)
    assert out.stride(1) == 1
    assert transposed or out.is_contiguous()
    return out


def _in_tiles(shape: tuple[int, int]) -> bool:
    return shape[0] % 16 == 0 and shape[1] % 16 == 0


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


@cache
def _native(device: torch.device) -> bool:
    """Whether the device multiplies e4m3 numbers."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def _has_kernels(device: torch.device) -> bool:
    return _native(device) and runs_kernels(device)


@cache
def _ones(count: int, device: torch.device) -> Tensor:
    return torch.ones(count, device=device)
