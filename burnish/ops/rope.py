"""Queries, keys and values as a block's attention wants them, made in place, and the way back.

One pass over memory adds what LoRA and a bias give to the three projections and turns queries and keys; the way back
turns their gradients back, lays the three side by side, and takes from them what LoRA's thin matrices want. For an
8-bit matmul a second pass makes their rows in 8 bits; were it the first that held whole rows for this, LoRA would need
another.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from burnish.ops import takes_kernel, wide_dtype
from burnish.ops.attention import rotate
from burnish.ops.fp8 import Quantised, quantise_rows

Table = tuple[Float[Tensor, "T c"], Float[Tensor, "T c"]]
"""cos and sin of the angles of c pairs, in fp32."""

LowRank = tuple[Float[Tensor, "q R"], Float[Tensor, "k R"], Float[Tensor, "v R"]]
"""LoRA's B of queries, keys and values, times its scale."""


class Heads(NamedTuple):
    """What stands side by side in a row: so many heads of queries, of keys, and as many of values."""

    queries: int
    keys: int
    width: int


class RopeGradient(NamedTuple):
    """What goes back from attention."""

    dqkv: Float[Tensor, "T N"]
    """The gradient of the projections' outputs; a bias wants its sum over T."""
    dxa: Float[Tensor, "T R3"] | None
    """[dq Bq | dk Bk | dv Bv], of the rounded gradients; None without LoRA."""
    dqkv8: Quantised | None
    """Rows of dqkv · w_scale in 8 bits; None where no `w_scale` was given."""


def rope(
    qkv: Float[Tensor, "T N"],
    xa: Float[Tensor, "T R3"] | None,
    Bs: LowRank | None,
    bias: Float[Tensor, " N"] | None,
    table: Table,
    heads: Heads,
) -> None:
    """Changes qkv [q | k | v] in place: qkv + xa Bᵀ + bias, with the heads of q and k turned by the table's angles.

    xa is [xa_q | xa_k | xa_v]. The turn is that of `ops.attention.rotate`: pairs (i, i + c), channels from 2c on left
    alone. Sums are in fp32 (float64 for float64) and rounded once.
    """
    assert qkv.shape[1] == (heads.queries + 2 * heads.keys) * heads.width
    assert qkv.is_contiguous()
    if takes_kernel(qkv):
        from burnish.kernels import rope as kernels

        kernels.rope(qkv, xa, Bs, bias, table, heads)
        return
    y = qkv.to(wide_dtype(qkv))
    if xa is not None and Bs is not None:
        parts = zip(xa.to(y.dtype).chunk(3, dim=1), Bs, strict=True)
        y = y + torch.cat([part @ B.to(y.dtype).T for part, B in parts], dim=1)
    if bias is not None:
        y = y + bias.to(y.dtype)
    y_THC = y.unflatten(1, (-1, heads.width))
    turning, still = y_THC.split((heads.queries + heads.keys, heads.keys), dim=1)
    qkv.copy_(torch.cat((rotate(turning, table), still), dim=1).flatten(1))


def rope_backward(
    dq: Float[Tensor, "T H C"],
    dk: Float[Tensor, "T G C"],
    dv: Float[Tensor, "T G C"],
    table: Table,
    Bs: LowRank | None,
    w_scale: Float[Tensor, " N"] | None,
) -> RopeGradient:
    """The gradients of what `rope` was given, from those of what it made.

    The three may have any strides but 1 between channels. Turned in fp32, rounded once.
    """
    if takes_kernel(dq):
        from burnish.kernels import rope as kernels

        dqkv, dxa = kernels.rope_backward(dq, dk, dv, table, Bs)
        return RopeGradient(dqkv, dxa, None if w_scale is None else quantise_rows(dqkv, w_scale))
    cos, sin = table
    turned = [rotate(d.to(wide_dtype(d)), (cos, -sin)).to(d.dtype).flatten(1) for d in (dq, dk)]
    parts = (*turned, dv.flatten(1))
    dqkv, dxa = torch.cat(parts, dim=1), None
    if Bs is not None:
        wide = wide_dtype(dq)
        dxa = torch.cat([d.to(wide) @ B.to(wide) for d, B in zip(parts, Bs, strict=True)], dim=1).to(dq.dtype)
    return RopeGradient(dqkv, dxa, None if w_scale is None else quantise_rows(dqkv, w_scale))
