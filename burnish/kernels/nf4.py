# pyright: basic, reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false
"""NF4 codes to a dense weight in one launch: the twin of `ops.nf4.dequantise`, equal to it bit for bit."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCKS = 32  # blocks of 64 values to a program: 1 KiB of codes in, 4 KiB of bf16 out


def dequantise(
    codes: Tensor,
    scales: Tensor,
    nested: Tensor,
    tables: tuple[Tensor, Tensor],
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """The dense weight; `scales` is fp32 where `nested` is empty, else 8-bit codes into the second of `tables`.

    The tables are the 16 levels of values and the 256 levels of scales, in fp32; `nested` is fp32, the mean last.
    """
    dense = torch.empty(shape, dtype=dtype, device=codes.device)
    blocks = -(-dense.numel() // 64)
    if blocks:
        with torch.cuda.device(codes.device):
            _dequantise[(triton.cdiv(blocks, _BLOCKS),)](
                codes, scales, nested, *tables, dense, codes.numel(), blocks, dense.numel(), max(nested.numel() - 1, 0),
                DOUBLE=nested.numel() > 0, BLOCKS=_BLOCKS, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
    return dense


@triton.jit
def _dequantise(
    codes, scales, nested, levels, scale_levels, dense, num_bytes, num_blocks, count, num_nested,
    DOUBLE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    scale = tl.load(scales + block, mask=block < num_blocks, other=0)
    if DOUBLE:
        step = tl.load(nested + block // 256, mask=block < num_blocks, other=0.0)
        # Product and sum are rounded one after the other (`enable_fp_fusion=False` above): no fused multiply-add.
        scale = tl.load(scale_levels + scale.to(tl.int32)) * step + tl.load(nested + num_nested)
    byte = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    code = tl.load(codes + byte, mask=byte < num_bytes, other=0).to(tl.int32)
    even = tl.load(levels + (code >> 4)) * scale[:, None]
    odd = tl.load(levels + (code & 15)) * scale[:, None]
    place = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(dense + place, tl.interleave(even, odd).to(dense.dtype.element_ty), mask=place < count)
