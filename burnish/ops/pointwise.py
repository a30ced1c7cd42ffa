"""Maths done element by element or row by row: norms, gates, soft caps."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def rms_norm(
    x: Float[Tensor, "... C"], weight: Float[Tensor, " C"], eps: float, offset: float = 0.0
) -> Float[Tensor, "... C"]:
    """x / rms(x) · (offset + weight), computed in fp32 and returned in the dtype of x (Zhang & Sennrich 2019)."""
    gain = weight.float() + offset if offset else weight.float()
    return F.rms_norm(x.float(), (x.shape[-1],), gain, eps).to(x.dtype)


def gated(gate: Float[Tensor, "... I"], up: Float[Tensor, "... I"], activation: str) -> Float[Tensor, "... I"]:
    """activation(gate) · up: SwiGLU with `silu`, GeGLU with `gelu_tanh` (Shazeer 2020)."""
    opened = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return opened * up


def soft_cap(x: Float[Tensor, "..."], cap: float | None) -> Float[Tensor, "..."]:
    """cap · tanh(x / cap): x itself near 0, never beyond ±cap; no cap leaves x as it is (Gemma 2)."""
    return x if cap is None else torch.tanh(x / cap) * cap
