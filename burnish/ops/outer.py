"""The gradients of low-rank matrices: a tall matrix transposed, times a thin one."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from burnish.ops import takes_kernel, wide_dtype


def outer(x_TN: Float[Tensor, "T N"], z_TK: Float[Tensor, "T K"], widths: Sequence[int]) -> Float[Tensor, "N R"]:
    """xᵀ z in fp32 (float64 for float64), summed over T in fp32: the same numbers each time.

    x is matrices of these widths side by side, and z has R columns for each: they are multiplied with those alone.
    x and z may be slices of columns of wider matrices.
    """
    assert x_TN.dtype == z_TK.dtype
    assert x_TN.shape[1] == sum(widths)
    assert z_TK.shape[1] % len(widths) == 0
    if not takes_kernel(x_TN) or len(widths) > 3:
        return reference_outer(x_TN, z_TK, widths)
    from burnish.kernels.outer import outer as kernel

    return kernel(x_TN, z_TK, widths)


def reference_outer(
    x_TN: Float[Tensor, "T N"], z_TK: Float[Tensor, "T K"], widths: Sequence[int]
) -> Float[Tensor, "N R"]:
    """`outer` in plain PyTorch: what the kernel is held to."""
    wide = wide_dtype(x_TN)
    parts = zip(x_TN.split(list(widths), dim=1), z_TK.chunk(len(widths), dim=1), strict=True)
    return torch.cat([x.to(wide).T @ z.to(wide) for x, z in parts])
