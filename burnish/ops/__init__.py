"""Tensor maths: the reference in plain PyTorch, then the choice of kernel."""

import torch
from torch import Tensor

from burnish.kernels import has_triton


def runs_kernels(device: torch.device) -> bool:
    """Whether half-precision work on this device goes to the Triton twins."""
    return device.type == "cuda" and has_triton()


def takes_kernel(x: Tensor) -> bool:
    """Whether what is done with x is done by a Triton twin."""
    return x.dtype in (torch.bfloat16, torch.float16) and runs_kernels(x.device)


def wide_dtype(x: Tensor) -> torch.dtype:
    """What sums over x are made in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
