"""Weights in 4 bits: the NF4 format of QLoRA (arXiv 2305.14314, section 3), bit for bit as bitsandbytes stores it.

A weight is flattened row by row and cut into blocks of 64. A block keeps its largest magnitude, its scale, and for
each value the nearest of 16 levels after division by that scale, two to a byte, the even one in the high nibble. With
double quantisation the scales themselves are kept in 8 bits: their mean is taken off, and blocks of 256 of them share
one fp32 scale. That is 4.127 bits per parameter in place of 4.5.

All three parts are bytes, fp32 numbers among them, so that no mixed-precision policy can cast them.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from burnish.ops import runs_kernels

BLOCK = 64
NESTED_BLOCK = 256

# The quantiles of a normal distribution, scaled to [-1, 1], with an exact zero (arXiv 2305.14314, appendix E).
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)

_SLICE = 2**14  # blocks worked on at once: a million values, so that temporaries stay at a few MB whatever the weight
_TINY = 1e-38  # in place of the scale of a block of zeros, whose reciprocal would be infinite


class Quantised(NamedTuple):
    """A weight in NF4. Every part is a vector of bytes."""

    codes: UInt8[Tensor, " bytes"]
    """Two levels to a byte, the even value in the high nibble."""
    scales: UInt8[Tensor, " scales"]
    """One per block: 8-bit codes of the dynamic map, or fp32 as bytes where `nested` is empty."""
    nested: UInt8[Tensor, " nested"]
    """With double quantisation, fp32 as bytes: one scale per 256 scales, then their mean. Without it empty."""


def quantise(weight: Float[Tensor, "..."], double: bool = True) -> Quantised:
    """The weight in NF4, with its scales in 8 bits when `double`.

    Raises ValueError for a weight that holds NaN or infinity.
    """
    flat = weight.detach().reshape(-1)
    midpoints = _midpoints(weight.device)
    codes = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8, device=weight.device)
    absmax_N = torch.empty(num_blocks(flat.numel()), dtype=torch.float32, device=weight.device)
    for first, last in _slices(absmax_N.numel()):
        values = flat[first * BLOCK : last * BLOCK].float()
        full = values.numel() // BLOCK * BLOCK
        blocks = values[:full].view(-1, BLOCK)
        absmax_N[first : first + len(blocks)] = blocks.abs().amax(dim=1)
        unit = (blocks * (1.0 / absmax_N[first : first + len(blocks)].clamp(min=_TINY)).unsqueeze(1)).reshape(-1)
        if full < values.numel():
            # bitsandbytes divides in an incomplete last block, where it multiplies by the reciprocal in the others.
            absmax_N[last - 1] = values[full:].abs().amax().clamp(min=_TINY)
            unit = torch.cat([unit, values[full:] / absmax_N[last - 1]])
        unit = F.pad(unit, (0, unit.numel() % 2))
        level = torch.bucketize(unit.clamp_(-1, 1), midpoints, out_int32=True).to(torch.uint8)
        codes[first * BLOCK // 2 : last * BLOCK // 2] = (level[0::2] << 4) | level[1::2]
    if not bool(absmax_N.isfinite().all()):
        raise ValueError("the weight holds NaN or infinity, which 4 bits cannot: mend the checkpoint")
    if not double:
        return Quantised(codes, absmax_N.view(torch.uint8), codes.new_empty(0))
    return Quantised(codes, *_quantise_scales(absmax_N))


def dequantise(
    codes: UInt8[Tensor, " bytes"],
    scales: UInt8[Tensor, " scales"],
    nested: UInt8[Tensor, " nested"],
    shape: tuple[int, int],
    dtype: torch.dtype,
    out: Float[Tensor, "O I"] | None = None,
) -> Float[Tensor, "O I"]:
    """The dense weight: level * scale in fp32, rounded once to `dtype`.

    With `out`, contiguous and of this shape and dtype, it is written there: rows of a larger weight, say.
    """
    if runs_kernels(codes.device):
        from burnish.kernels.nf4 import dequantise as kernel

        dense = _given(out, shape, dtype, codes.device)
        return kernel(codes, *kernel_scales(scales, nested), tables(codes.device), dense)
    return reference_dequantise(codes, scales, nested, shape, dtype, out)


def reference_dequantise(
    codes: UInt8[Tensor, " bytes"],
    scales: UInt8[Tensor, " scales"],
    nested: UInt8[Tensor, " nested"],
    shape: tuple[int, int],
    dtype: torch.dtype,
    out: Float[Tensor, "O I"] | None = None,
) -> Float[Tensor, "O I"]:
    """`dequantise` in plain PyTorch, a slice at a time: what the kernel is held to."""
    absmax_N = restore_scales(scales, nested)
    pairs = _pairs(codes.device)
    dense = _given(out, shape, dtype, codes.device).view(-1)
    for first, last in _slices(absmax_N.numel()):
        values = pairs.index_select(0, codes[first * BLOCK // 2 : last * BLOCK // 2].int()).view(torch.float32)
        if values.numel() < (last - first) * BLOCK:
            values = F.pad(values, (0, -values.numel() % BLOCK))
        values = values.view(-1, BLOCK).mul_(absmax_N[first:last].unsqueeze(1))
        target = dense[first * BLOCK : last * BLOCK]
        target.copy_(values.view(-1)[: target.numel()])
    return dense.view(shape)


def nf4_linear(
    x: Float[Tensor, "*T I"],
    codes: UInt8[Tensor, " bytes"],
    scales: UInt8[Tensor, " scales"],
    nested: UInt8[Tensor, " nested"],
    rows: int,
) -> Float[Tensor, "*T O"]:
    """x times the transposed weight of `rows` rows, in the dtype of x.

    The dense weight lives only inside the multiplication: autograd keeps the codes, and the backward pass
    (grad @ weight) dequantises them again. The weight itself gets no gradient.
    """
    return _nf4_linear(x, codes, scales, nested, rows)


def num_blocks(count: int) -> int:
    """How many blocks, and so scales, a weight of `count` values has."""
    return -(-count // BLOCK)


def restore_scales(scales: UInt8[Tensor, " scales"], nested: UInt8[Tensor, " nested"]) -> Float[Tensor, " N"]:
    """The fp32 scale of each block."""
    if not nested.numel():
        return as_float32(scales)
    values = as_float32(nested)
    scale_N = values[:-1].repeat_interleave(NESTED_BLOCK)[: scales.numel()]
    # Two roundings, of the product and of the sum: a fused multiply-add would differ in the last bit.
    return _dynamic_map(scales.device).index_select(0, scales.int()) * scale_N + values[-1]


def kernel_scales(scales: UInt8[Tensor, " scales"], nested: UInt8[Tensor, " nested"]) -> tuple[Tensor, Tensor]:
    """The scales and their scales as kernels read them: fp32 but for 8-bit codes."""
    return scales if nested.numel() else as_float32(scales), as_float32(nested)


def tables(device: torch.device) -> tuple[Float[Tensor, " 16"], Float[Tensor, " 256"]]:
    """The levels of values and of scales that codes stand for."""
    return _levels(device), _dynamic_map(device)


def as_float32(raw: UInt8[Tensor, " bytes"]) -> Float[Tensor, " N"]:
    """The fp32 numbers that the bytes hold."""
    if raw.storage_offset() % 4:
        raw = raw.clone()  # a view must start on a whole number
    return raw.view(torch.float32)


def dynamic_map() -> Float[Tensor, " 256"]:
    """The 256 levels of the signed 8-bit dynamic map (arXiv 2110.02861), from -0.993 to 1.

    Decade i of seven, 10^(i-6), is cut into 2^i equal parts; their middles, the same negated, 0 and 1 are the levels.
    """
    positive: list[Tensor] = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        positive.append(10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2))
    magnitudes = torch.cat(positive)
    return torch.cat([-magnitudes, magnitudes, torch.tensor([0.0, 1.0], device="cpu")]).sort().values


def _quantise_scales(absmax_N: Tensor) -> tuple[Tensor, Tensor]:
    """The scales as 8-bit codes, and the bytes of the fp32 scales and mean that they go with.

    Each code is the nearest one. (bitsandbytes' CPU backend looks codes up in 65,536 bins and is one off in about
    1 of 1,000; its CUDA backend is exact.)
    """
    mean = absmax_N.mean()
    rest = absmax_N - mean
    blocks = F.pad(rest, (0, -rest.numel() % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    scale = blocks.abs().amax(dim=1)
    levels = _dynamic_map(absmax_N.device)
    unit = (blocks / scale.clamp(min=_TINY).unsqueeze(1)).reshape(-1)[: rest.numel()]
    scales = torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8)
    return scales, torch.cat([scale, mean.unsqueeze(0)]).view(torch.uint8)


def _given(out: Tensor | None, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    assert (out.shape, out.dtype) == (shape, dtype)
    assert out.is_contiguous()
    return out


def _slices(blocks: int) -> Iterator[tuple[int, int]]:
    return ((first, min(first + _SLICE, blocks)) for first in range(0, blocks, _SLICE))


@cache
def _levels(device: torch.device) -> Tensor:
    return torch.tensor(LEVELS, device=device)


@cache
def _midpoints(device: torch.device) -> Tensor:
    levels = _levels(device)
    return (levels[:-1] + levels[1:]) / 2


@cache
def _pairs(device: torch.device) -> Tensor:
    """The two levels that each of the 256 bytes stands for, as one 64-bit number: one look-up finds both."""
    levels = _levels(device)
    return torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1).view(torch.float64).squeeze(1)


@cache
def _dynamic_map(device: torch.device) -> Tensor:
    return dynamic_map().to(device)


@torch.library.custom_op("burnish::nf4_dequantise", mutates_args=())
def nf4_dequantise(
    codes: Tensor, scales: Tensor, nested: Tensor, rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """`dequantise` as one opaque operator, so that torch.compile need not look inside."""
    return dequantise(codes, scales, nested, (rows, columns), dtype)


@torch.library.custom_op("burnish::nf4_linear", mutates_args=())
def _nf4_linear(x: Tensor, codes: Tensor, scales: Tensor, nested: Tensor, rows: int) -> Tensor:
    return F.linear(x, dequantise(codes, scales, nested, (rows, x.shape[-1]), x.dtype))


@torch.library.custom_op("burnish::nf4_linear_backward", mutates_args=())
def _nf4_linear_backward(grad: Tensor, codes: Tensor, scales: Tensor, nested: Tensor, columns: int) -> Tensor:
    return grad @ dequantise(codes, scales, nested, (grad.shape[-1], columns), grad.dtype)


@nf4_dequantise.register_fake
def _(codes: Tensor, scales: Tensor, nested: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty((rows, columns), dtype=dtype)


@_nf4_linear.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, nested: Tensor, rows: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


@_nf4_linear_backward.register_fake
def _(grad: Tensor, codes: Tensor, scales: Tensor, nested: Tensor, columns: int) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], columns))


def _keep_codes(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scales, nested, _ = inputs
    ctx.save_for_backward(codes, scales, nested)
    ctx.columns = x.shape[-1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    return _nf4_linear_backward(grad, *ctx.saved_tensors, ctx.columns), None, None, None, None


_nf4_linear.register_autograd(_backward, setup_context=_keep_codes)
