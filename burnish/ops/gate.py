"""The gate of an MLP as one pass over memory, forward and backward, with the low-rank parts of the layers around it.

    g = gate + xa_g Bgᵀ,   u = up + xa_u Buᵀ,   h = act(g) · u,   ha = h A_downᵀ

[gate | up] is what one frozen matrix product gave; the rest is LoRA, with its scale folded into B. ha is the first half
of the low-rank part of the layer that will read h. With all of it done here, LoRA costs no pass over memory of its own.
"""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from burnish.ops import takes_kernel, wide_dtype
from burnish.ops.fp8 import Quantised, quantise_rows

Activation = Literal["silu", "gelu_tanh"]


class Gated(NamedTuple):
    """What the down projection reads."""

    h: Float[Tensor, "T I"] | None
    """act(g) · u; None where it was asked for in 8 bits."""
    h8: Quantised | None
    ha: Float[Tensor, "T R"] | None
    """h A_downᵀ."""


class GateBackward(NamedTuple):
    """What the backward pass of `gate` reads: gradients that arrive, and what the forward pass was given."""

    dh: Float[Tensor, "T I"]
    """The gradient of h by way of the frozen matrix; h is written over it."""
    gu: Float[Tensor, "T 2I"]
    """[gate | up]; its gradient is written over it."""
    dha: Float[Tensor, "T R"] | None = None
    A_down: Float[Tensor, "R I"] | None = None
    xa: Float[Tensor, "T 2r"] | None = None
    Bg: Float[Tensor, "I r"] | None = None
    Bu: Float[Tensor, "I r"] | None = None
    w_scale: Float[Tensor, " 2I"] | None = None
    """One fp32 scale for each column: asks for the gradient in 8 bits too."""


class GateGradient(NamedTuple):
    """The gradients of what `gate` was given, and h once more."""

    dgu: Float[Tensor, "T 2I"]
    """In the memory of `GateBackward.gu`."""
    dxa: Float[Tensor, "T 2r"] | None
    """[dg Bg | du Bu]."""
    h: Float[Tensor, "T I"]
    """In the memory of `GateBackward.dh`."""
    dgu8: Quantised | None
    """dgu · w_scale by rows in 8 bits."""


def gate(
    gu_TJ: Float[Tensor, "T 2I"],
    xa_TR: Float[Tensor, "T 2r"] | None,
    Bg_IR: Float[Tensor, "I r"] | None,
    Bu_IR: Float[Tensor, "I r"] | None,
    A_down_RI: Float[Tensor, "R I"] | None,
    activation: Activation,
    fp8: bool,
) -> Gated:
    """act(g) · u, in 8 bits alone where `fp8`, and its product with A_down.

    g, u and h are computed in fp32, each rounded once to the dtype of gu; ha and the 8 bits are made of the rounded h.
    """
    assert (xa_TR is None) == (Bg_IR is None) == (Bu_IR is None)
    if not takes_kernel(gu_TJ):
        return reference_gate(gu_TJ, xa_TR, Bg_IR, Bu_IR, A_down_RI, activation, fp8)
    from burnish.kernels.gate import gate as kernel

    h_TI, ha_TR = kernel(gu_TJ, xa_TR, Bg_IR, Bu_IR, A_down_RI, activation)
    return Gated(None, quantise_rows(h_TI), ha_TR) if fp8 else Gated(h_TI, None, ha_TR)


def gate_backward(given: GateBackward, activation: Activation) -> GateGradient:
    """The gradients of `gate`, IN PLACE: that of gu is written over gu, and h, which A_down's gradient reads, over dh.

    With d = dh + dha A_down, kept in fp32,

        dg = d · u · act'(g),   du = d · act(g),   dxa = [dg Bg | du Bu]

    dg and du are rounded once; dxa and the 8 bits are made of the rounded ones. h is that of the forward pass. The same
    numbers come out each time.
    """
    assert (given.dha is None) == (given.A_down is None)
    assert (given.xa is None) == (given.Bg is None) == (given.Bu is None)
    if not takes_kernel(given.gu):
        return reference_gate_backward(given, activation)
    from burnish.kernels.gate import gate_backward as kernel

    dxa_TR = kernel(*given[:-1], activation)
    dgu8 = None if given.w_scale is None else quantise_rows(given.gu, given.w_scale)
    return GateGradient(given.gu, dxa_TR, given.dh, dgu8)


def reference_gate(
    gu_TJ: Float[Tensor, "T 2I"],
    xa_TR: Float[Tensor, "T 2r"] | None,
    Bg_IR: Float[Tensor, "I r"] | None,
    Bu_IR: Float[Tensor, "I r"] | None,
    A_down_RI: Float[Tensor, "R I"] | None,
    activation: Activation,
    fp8: bool,
) -> Gated:
    """`gate` in plain PyTorch: what the kernel is held to."""
    wide, dtype = wide_dtype(gu_TJ), gu_TJ.dtype
    g_TI, u_TI = _pair(gu_TJ, xa_TR, Bg_IR, Bu_IR)
    opened_TI, _ = _activate(g_TI, activation)
    h_TI = (opened_TI * u_TI).to(dtype)
    ha_TR = None if A_down_RI is None else (h_TI.to(wide) @ A_down_RI.to(wide).T).to(dtype)
    return Gated(None, quantise_rows(h_TI), ha_TR) if fp8 else Gated(h_TI, None, ha_TR)


def reference_gate_backward(given: GateBackward, activation: Activation) -> GateGradient:
    """`gate_backward` in plain PyTorch, in place too."""
    wide, dtype = wide_dtype(given.gu), given.gu.dtype
    d_TI = given.dh.to(wide)
    if given.dha is not None and given.A_down is not None:
        d_TI = d_TI + given.dha.to(wide) @ given.A_down.to(wide)
    g_TI, u_TI = _pair(given.gu, given.xa, given.Bg, given.Bu)
    opened_TI, slope_TI = _activate(g_TI, activation)
    h_TI, dgu_TJ = opened_TI * u_TI, torch.cat([d_TI * u_TI * slope_TI, d_TI * opened_TI], dim=1)
    given.dh.copy_(h_TI)  # only now: wide numbers may be the given ones themselves
    given.gu.copy_(dgu_TJ)
    dxa_TR = None
    if given.Bg is not None and given.Bu is not None:
        dg_TI, du_TI = given.gu.to(wide).chunk(2, dim=1)
        dxa_TR = torch.cat([dg_TI @ given.Bg.to(wide), du_TI @ given.Bu.to(wide)], dim=1).to(dtype)
    dgu8 = None if given.w_scale is None else quantise_rows(given.gu, given.w_scale)
    return GateGradient(given.gu, dxa_TR, given.dh, dgu8)


def _pair(gu_TJ: Tensor, xa_TR: Tensor | None, Bg_IR: Tensor | None, Bu_IR: Tensor | None) -> tuple[Tensor, Tensor]:
    """g and u: wide numbers, rounded to the dtype of gu."""
    wide, dtype = wide_dtype(gu_TJ), gu_TJ.dtype
    g_TI, u_TI = gu_TJ.to(wide).chunk(2, dim=1)
    if xa_TR is not None and Bg_IR is not None and Bu_IR is not None:
        xg_TR, xu_TR = xa_TR.to(wide).chunk(2, dim=1)
        g_TI, u_TI = g_TI + xg_TR @ Bg_IR.to(wide).T, u_TI + xu_TR @ Bu_IR.to(wide).T
    return g_TI.to(dtype).to(wide), u_TI.to(dtype).to(wide)


def _activate(g: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """act(g) and act'(g), with the logistic function σ: silu is g σ(g), gelu_tanh g σ(z) with z = c (g + 0.044715 g³).

    (1 + tanh(z / 2)) / 2 = σ(z), which is why c is twice √(2/π).
    """
    if activation == "silu":
        open_ = torch.sigmoid(g)
        return g * open_, open_ * (1 + g * (1 - open_))
    c = math.sqrt(8 / math.pi)
    open_ = torch.sigmoid(c * (g + 0.044715 * g * g * g))
    return g * open_, open_ + g * open_ * (1 - open_) * (c * (1 + 3 * 0.044715 * g * g))
