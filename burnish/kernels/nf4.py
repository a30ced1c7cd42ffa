# pyright: basic, reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false
"""NF4 codes to a dense weight in one launch: the twin of `ops.nf4.dequantise`, equal to it bit for bit.

A thread takes a word of 8 codes and writes its 8 values, 16 bytes of bf16, so that a warp reads 128 bytes side by side
and writes 512. The 16 levels lie in half a line of the L1 cache, one in each bank: looking 32 of them up is one
access. A scale is decoded once for each word.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCKS = 64  # blocks of 64 values to a program: 2 KiB of codes in, 8 KiB of bf16 out


def dequantise(codes: Tensor, scales: Tensor, nested: Tensor, tables: tuple[Tensor, Tensor], dense: Tensor) -> Tensor:
    """`dense`, filled; `scales` is fp32 where `nested` is empty, else 8-bit codes into the second of `tables`.

    The tables are the 16 levels of values and the 256 levels of scales, in fp32; `nested` is fp32, the mean last.
    """
    count = dense.numel()
    blocks = -(-count // 64)
    whole = count % 64 == 0 and codes.data_ptr() % 16 == 0
    if blocks:
        given = (codes.view(torch.int32) if whole else codes, scales, nested, *tables, dense)
        counts = (codes.numel(), blocks, count, max(nested.numel() - 1, 0))
        with torch.cuda.device(codes.device) if codes.is_cuda else nullcontext():
            _dequantise[(triton.cdiv(blocks, _BLOCKS),)](
                *given, *counts, DOUBLE=nested.numel() > 0, WHOLE=whole, BLOCKS=_BLOCKS, num_warps=4,
                enable_fp_fusion=False,
            )  # fmt: skip
    return dense


@triton.jit
def _dequantise(
    codes, scales, nested, levels, scale_levels, dense, num_bytes, num_blocks, count, num_nested,
    DOUBLE: tl.constexpr, WHOLE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    blocks_left = num_blocks - first
    word = tl.arange(0, BLOCKS * 8)
    here = word // 8 < blocks_left
    if WHOLE:
        packed = tl.load(codes + first * 8 + word, mask=here, other=0, eviction_policy="evict_first")
    else:
        packed = bytes_as_words(codes + first * 32, word, num_bytes - first * 32)
    scale = block_scales(scales, nested, scale_levels, first + word // 8, here, num_nested, DOUBLE)
    value = level_of(packed[:, None], levels) * scale[:, None]
    place = word[:, None] * 8 + tl.arange(0, 8)[None, :]
    mask = here[:, None] if WHOLE else place < count - first * 64
    tl.store(dense + first * 64 + place, value.to(dense.dtype.element_ty), mask=mask)


@triton.jit
def level_of(packed, levels):
    """The 8 levels [N, 8] of words [N, 1], the first in the high half of a word's lowest byte."""
    shift = (tl.arange(0, 8) ^ 1) * 4
    return tl.load(levels + ((packed >> shift[None, :]) & 15))


@triton.jit
def block_scales(scales, nested, scale_levels, block, here, num_nested, DOUBLE: tl.constexpr):
    """The fp32 scales of these blocks.

    Product and sum are rounded one after the other (`enable_fp_fusion=False`): no fused multiply-add.
    """
    scale = tl.load(scales + block, mask=here, other=0)
    if DOUBLE:
        step = tl.load(nested + block // 256, mask=here, other=0.0)
        scale = tl.load(scale_levels + scale.to(tl.int32)) * step + tl.load(nested + num_nested)
    return scale


@triton.jit
def bytes_as_words(codes, word, num_bytes):
    """Words of codes whose number or place is not that of whole words."""
    packed = tl.zeros(word.shape, tl.int32)
    for k in tl.static_range(4):
        byte = tl.load(codes + word * 4 + k, mask=word * 4 + k < num_bytes, other=0)
        packed |= byte.to(tl.int32) << (8 * k)
    return packed
