"""The gradient of a low-rank matrix: a tall matrix transposed, times a thin one."""

import torch
from jaxtyping import Float
from torch import Tensor

from burnish.kernels import has_triton


def outer(x_TN: Float[Tensor, "T N"], z_TR: Float[Tensor, "T R"]) -> Float[Tensor, "N R"]:
    """xᵀ z in fp32 (float64 for float64), summed over T in fp32: the same numbers each time.

    x and z may be slices of columns of wider matrices.
    """
    assert x_TN.dtype == z_TR.dtype
    if not (x_TN.is_cuda and has_triton() and x_TN.dtype in (torch.bfloat16, torch.float16)):
        return reference_outer(x_TN, z_TR)
    from burnish.kernels.outer import outer as kernel

    return kernel(x_TN, z_TR)


def reference_outer(x_TN: Float[Tensor, "T N"], z_TR: Float[Tensor, "T R"]) -> Float[Tensor, "N R"]:
    """`outer` in plain PyTorch: what the kernel is held to."""
    wide = torch.float64 if x_TN.dtype == torch.float64 else torch.float32
    return x_TN.to(wide).T @ z_TR.to(wide)
