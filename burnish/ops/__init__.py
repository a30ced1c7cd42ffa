"""Tensor maths: the reference in plain PyTorch, then the choice of kernel."""

import torch

from burnish.kernels import has_triton


def runs_kernels(device: torch.device) -> bool:
    """Whether half-precision work on this device goes to the Triton twins."""
    return device.type == "cuda" and has_triton()
