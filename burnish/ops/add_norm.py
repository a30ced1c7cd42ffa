"""Adding to the residual stream and its norm, as one pass over memory: forward, again, and backward.

    x' = x + y + xa Bᵀ,   h = x' · gain · rstd,   rstd = 1 / √(mean x'² + eps),   gain = offset + weight,   ha = h Aᵀ

xa Bᵀ is the low-rank part of the layer that wrote y, with its scale folded into B; ha is the first half of the
low-rank parts of the layers that will read h. With both done here, LoRA costs no pass over memory of its own.
"""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from burnish.ops import takes_kernel, wide_dtype
from burnish.ops.fp8 import Quantised, quantise_rows


class Gain(NamedTuple):
    """What an RMS norm multiplies by, and what keeps it from dividing by 0."""

    weight: Float[Tensor, " D"]
    eps: float
    offset: float
    """Added to the weight: 1 for families that store the weight minus one."""


class Normed(NamedTuple):
    """The stream after an addition, and its norm."""

    x: Float[Tensor, "T D"]
    rstd: Float[Tensor, " T"]
    """1 / root mean square of x, in fp32."""
    h: Float[Tensor, "T D"] | None
    """The norm; None where it was asked for in 8 bits."""
    h8: Quantised | None
    ha: Float[Tensor, "T R"] | None
    """h Aᵀ."""


class NormBackward(NamedTuple):
    """What the backward pass of `add_norm` reads: gradients that arrive, and what was known before."""

    dh: Float[Tensor, "T D"]
    x: Float[Tensor, "T D"]
    """The stream after the addition: `Normed.x`."""
    rstd: Float[Tensor, " T"]
    dx_new: Float[Tensor, "T D"] | None = None
    """The gradient of the stream itself; None after the last norm, which alone reads the stream."""
    dha: Float[Tensor, "T R"] | None = None
    A: Float[Tensor, "R D"] | None = None
    B: Float[Tensor, "D R"] | None = None
    w_scale: Float[Tensor, " D"] | None = None
    """One fp32 scale for each column: asks for the gradient in 8 bits too."""


class NormGradient(NamedTuple):
    """The gradients of what `add_norm` added, and of the norm's weight."""

    dx: Float[Tensor, "T D"]
    """Of x and of y, which are the same."""
    dxa: Float[Tensor, "T R"] | None
    dx8: Quantised | None
    """dx · w_scale by rows in 8 bits."""
    dweight: Float[Tensor, " D"] | None
    """In fp32."""


def add_norm(
    x_TD: Float[Tensor, "T D"],
    y_TD: Float[Tensor, "T D"] | None,
    xa_TR: Float[Tensor, "T R"] | None,
    B_DR: Float[Tensor, "D R"] | None,
    gain: Gain,
    A_RD: Float[Tensor, "R D"] | None,
    fp8: bool,
) -> Normed:
    """x + y + xa Bᵀ and its norm, which is written in 8 bits alone where `fp8`; without y the stream is x itself.

    Sums are made in fp32 and rounded once to the dtype of x. The norm, ha and the 8 bits are made of rounded numbers.
    """
    assert y_TD is not None or xa_TR is None
    assert (xa_TR is None) == (B_DR is None)
    if not takes_kernel(x_TD):
        return reference_add_norm(x_TD, y_TD, xa_TR, B_DR, gain, A_RD, fp8)
    from burnish.kernels.add_norm import add_norm as kernel

    stream, rstd, h, scale, ha = kernel(x_TD, y_TD, xa_TR, B_DR, *gain, A_RD, fp8)
    if scale is None:
        return Normed(stream, rstd, h, None, ha)
    return Normed(stream, rstd, None, Quantised(h, scale), ha)


def norm_again(
    x_TD: Float[Tensor, "T D"], rstd_T: Float[Tensor, " T"], gain: Gain, fp8: bool
) -> tuple[Float[Tensor, "T D"] | None, Quantised | None]:
    """(h, None), or (None, h in 8 bits): what `add_norm` gave, bit for bit, from what it kept."""
    if not takes_kernel(x_TD):
        return reference_norm_again(x_TD, rstd_T, gain, fp8)
    from burnish.kernels.add_norm import norm_again as kernel

    h, scale = kernel(x_TD, rstd_T, gain.weight, gain.offset, fp8)
    return (h, None) if scale is None else (None, Quantised(h, scale))


def add_norm_backward(given: NormBackward, gain: Gain, wants_weight: bool) -> NormGradient:
    """The gradients of `add_norm`; that of the weight where it is wanted.

    With g = dh + dha A,  x̂ = x' rstd  and means over a row,

        dx = dx' + rstd · (g gain - x̂ · mean(g gain x̂)),   dxa = dx B,   dweight = Σ_t g x̂

    dha A is rounded, and then dx is; dxa and the 8 bits are made of the rounded dx. The same numbers come out each
    time.
    """
    assert (given.dha is None) == (given.A is None)
    if not takes_kernel(given.dh):
        return reference_add_norm_backward(given, gain, wants_weight)
    from burnish.kernels.add_norm import add_norm_backward as kernel

    dx, dxa, dx8, scale, dweight = kernel(*given, gain.weight, gain.offset, wants_weight)
    return NormGradient(dx, dxa, None if dx8 is None or scale is None else Quantised(dx8, scale), dweight)


def reference_add_norm(
    x_TD: Float[Tensor, "T D"],
    y_TD: Float[Tensor, "T D"] | None,
    xa_TR: Float[Tensor, "T R"] | None,
    B_DR: Float[Tensor, "D R"] | None,
    gain: Gain,
    A_RD: Float[Tensor, "R D"] | None,
    fp8: bool,
) -> Normed:
    """`add_norm` in plain PyTorch: what the kernel is held to."""
    wide, dtype = wide_dtype(x_TD), x_TD.dtype
    if y_TD is not None:
        total_TD = x_TD.to(wide) + y_TD.to(wide)
        if xa_TR is not None and B_DR is not None:
            total_TD += xa_TR.to(wide) @ B_DR.to(wide).T
        x_TD = total_TD.to(dtype)
    rstd_T = (x_TD.to(wide).square().mean(dim=1) + gain.eps).rsqrt()
    h_TD = _normed(x_TD, rstd_T, gain)
    ha_TR = None if A_RD is None else (h_TD.to(wide) @ A_RD.to(wide).T).to(dtype)
    if fp8:
        return Normed(x_TD, rstd_T, None, quantise_rows(h_TD), ha_TR)
    return Normed(x_TD, rstd_T, h_TD, None, ha_TR)


def reference_norm_again(
    x_TD: Float[Tensor, "T D"], rstd_T: Float[Tensor, " T"], gain: Gain, fp8: bool
) -> tuple[Float[Tensor, "T D"] | None, Quantised | None]:
    """`norm_again` in plain PyTorch."""
    h_TD = _normed(x_TD, rstd_T, gain)
    return (None, quantise_rows(h_TD)) if fp8 else (h_TD, None)


def reference_add_norm_backward(given: NormBackward, gain: Gain, wants_weight: bool) -> NormGradient:
    """`add_norm_backward` in plain PyTorch: what the kernel is held to."""
    wide = wide_dtype(given.dh)
    g_TD = given.dh.to(wide)
    if given.dha is not None and given.A is not None:
        g_TD = g_TD + (given.dha.to(wide) @ given.A.to(wide)).to(given.dh.dtype)
    rstd_T1 = given.rstd.unsqueeze(1)
    unit_TD = given.x.to(wide) * rstd_T1
    gw_TD = g_TD * (gain.weight.to(wide) + gain.offset)
    dx_TD = rstd_T1 * (gw_TD - unit_TD * (gw_TD * unit_TD).mean(dim=1, keepdim=True))
    if given.dx_new is not None:
        dx_TD = dx_TD + given.dx_new.to(wide)
    dx_TD = dx_TD.to(given.dh.dtype)
    return NormGradient(
        dx=dx_TD,
        dxa=None if given.B is None else (dx_TD.to(wide) @ given.B.to(wide)).to(dx_TD.dtype),
        dx8=None if given.w_scale is None else quantise_rows(dx_TD, given.w_scale),
        dweight=(g_TD * unit_TD).sum(dim=0) if wants_weight else None,
    )


def _normed(x_TD: Tensor, rstd_T: Tensor, gain: Gain) -> Tensor:
    wide = wide_dtype(x_TD)
    # In this order the largest |h| of a row is rstd times its largest |x · gain|, exactly: the kernel knows the scale
    # of the 8 bits before it has made a single h.
    scaled_TD = x_TD.to(wide) * (gain.weight.to(wide) + gain.offset)
    return (scaled_TD * rstd_T.unsqueeze(1)).to(x_TD.dtype)
