"""Rows in 8 bits: e4m3 numbers with one fp32 scale to a row, and matrix products of them.

A row is divided by its largest magnitude / 448, so that the largest value is the largest number of the format. Three
bits of mantissa leave a relative error of 2.65 % on Gaussian values.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


class Quantised(NamedTuple):
    """A matrix in 8 bits: values * scale[:, None]."""

    values: Float[Tensor, "T K"]
    """float8_e4m3fn, of magnitude at most 448."""
    scale: Float[Tensor, " T"]
    """fp32: the largest magnitude of the row / 448; 1 for a row of zeros."""


def quantise_rows(x_TK: Float[Tensor, "T K"], w_scale_K: Float[Tensor, " K"] | None = None) -> Quantised:
    """x, times `w_scale` by columns where that is given, in 8 bits."""
    wide = torch.float64 if x_TK.dtype == torch.float64 else torch.float32
    x_TK = x_TK.to(wide)
    if w_scale_K is not None:
        x_TK = x_TK * w_scale_K.to(wide)
    scale_T = row_scale(x_TK.abs().amax(dim=1))
    return Quantised((x_TK / scale_T.unsqueeze(1)).to(FP8), scale_T)


def row_scale(amax_T: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """What rows with these largest magnitudes are divided by, in fp32: 1 where all is zero."""
    scale_T = amax_T.float() / FP8_MAX
    return torch.where(scale_T == 0, torch.ones_like(scale_T), scale_T)
