"""Queries, keys and values as a block's attention wants them, made in place, and the way back.

One pass over memory adds what LoRA and a bias give to the three projections and turns queries and keys; the way back
turns their gradients back, lays the three side by side, and takes from them what LoRA's thin matrices want. For an
8-bit matmul a second pass makes their rows in 8 bits; were it the first that held whole rows for this, LoRA would need
another.

Where a norm of each head stands between projection and rotation, the way back wants the heads as they were before it:
from the turned ones they could not be found where a gain is 0, nor well where it is small. So qkv is left as it is,
`norm_rope` makes queries and keys of it in memory of their own, again for the backward pass, and nothing more is kept:
the root mean square of a head is found wherever its channels are.
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


class HeadNorms(NamedTuple):
    """RMS norms over the channels of each head, of queries and of keys."""

    queries: Float[Tensor, " C"]
    keys: Float[Tensor, " C"]
    eps: float
    offset: float
    """Added to the weights: 1 for families that store them minus one."""


class BeforeNorm(NamedTuple):
    """What the way back through the norms of heads reads."""

    qkv: Float[Tensor, "T N"]
    """What `norm_rope` was given."""
    norms: HeadNorms
    wants_weights: bool


class RopeGradient(NamedTuple):
    """What goes back from attention."""

    dqkv: Float[Tensor, "T N"]
    """The gradient of the projections' outputs; a bias wants its sum over T."""
    dxa: Float[Tensor, "T R3"] | None
    """[dq Bq | dk Bk | dv Bv], of the rounded gradients; None without LoRA."""
    dqkv8: Quantised | None
    """Rows of dqkv · w_scale in 8 bits; None where no `w_scale` was given."""
    dnorms: tuple[Float[Tensor, " C"], Float[Tensor, " C"]] | None
    """Of the norms' weights, in fp32 (float64 for float64); None where they were not asked for."""


def rope(
    qkv: Float[Tensor, "T N"],
    xa: Float[Tensor, "T R3"] | None,
    Bs: LowRank | None,
    bias: Float[Tensor, " N"] | None,
    table: Table | None,
    heads: Heads,
) -> None:
    """Changes qkv [q | k | v] in place: qkv + xa Bᵀ + bias, with the heads of q and k turned by the table's angles.

    Without a table they are not turned: so it is for layers without positions, and for those that go on with
    `norm_rope`. xa is [xa_q | xa_k | xa_v]. The turn is that of `ops.attention.rotate`: pairs (i, i + c), channels from
    2c on left alone. Sums are in fp32 (float64 for float64) and rounded once.
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
    if table is not None:
        y_THC = y.unflatten(1, (-1, heads.width))
        turning, still = y_THC.split((heads.queries + heads.keys, heads.keys), dim=1)
        y = torch.cat((rotate(turning, table), still), dim=1).flatten(1)
    qkv.copy_(y)


def norm_rope(
    qkv: Float[Tensor, "T N"], norms: HeadNorms, table: Table, heads: Heads
) -> tuple[Float[Tensor, "T H C"], Float[Tensor, "T G C"]]:
    """The heads of queries and keys in qkv, divided by their root mean squares, times the gains, and turned.

    Made in fp32 (float64 for float64) and rounded once. All channels must turn. The same numbers come out each time.
    """
    assert 2 * table[0].shape[1] == heads.width
    assert qkv.is_contiguous()
    if takes_kernel(qkv):
        from burnish.kernels import rope as kernels

        turned = kernels.norm_rope(qkv, norms, table, heads)
        made_THC = turned.unflatten(1, (-1, heads.width))
    else:
        units = [unit * gain for unit, _, gain in _units(qkv, norms, heads)]
        made_THC = rotate(torch.cat(units, dim=1), table).to(qkv.dtype)
    return made_THC[:, : heads.queries], made_THC[:, heads.queries :]


def rope_backward(
    dq: Float[Tensor, "T H C"],
    dk: Float[Tensor, "T G C"],
    dv: Float[Tensor, "T G C"],
    table: Table | None,
    Bs: LowRank | None,
    w_scale: Float[Tensor, " N"] | None,
    before: BeforeNorm | None = None,
) -> RopeGradient:
    """The gradients of what `rope` was given, from those of what it made; `before` where `norm_rope` came after it.

    The three may have any strides but 1 between channels. With d the gradient of a head, turned back, x the head before
    its norm, x̂ = x / rms(x) and means over its channels,

        dx = (d gain - x̂ · mean(d gain x̂)) / rms(x),   dweight = Σ d x̂ over tokens and heads

    All in fp32, and dx rounded once. The same numbers come out each time.
    """
    assert before is None or (table is not None and before.qkv.is_contiguous())
    if takes_kernel(dq):
        from burnish.kernels import rope as kernels

        dqkv, dxa, dnorms = kernels.rope_backward(dq, dk, dv, table, Bs, before)
        return RopeGradient(dqkv, dxa, None if w_scale is None else quantise_rows(dqkv, w_scale), dnorms)
    wide, dnorms = wide_dtype(dq), None
    turned = [d.to(wide) if table is None else rotate(d.to(wide), (table[0], -table[1])) for d in (dq, dk)]
    if before is not None:
        heads, sums = Heads(dq.shape[1], dk.shape[1], dq.shape[2]), list[Tensor]()
        for place, (unit, rstd, gain) in enumerate(_units(before.qkv, before.norms, heads)):
            scaled = turned[place] * gain
            sums.append((turned[place] * unit).sum((0, 1)))
            turned[place] = rstd * (scaled - unit * (scaled * unit).mean(-1, keepdim=True))
        dnorms = (sums[0], sums[1]) if before.wants_weights else None
    parts = (*(d.to(dq.dtype).flatten(1) for d in turned), dv.flatten(1))
    dqkv, dxa = torch.cat(parts, dim=1), None
    if Bs is not None:
        dxa = torch.cat([d.to(wide) @ B.to(wide) for d, B in zip(parts, Bs, strict=True)], dim=1).to(dq.dtype)
    return RopeGradient(dqkv, dxa, None if w_scale is None else quantise_rows(dqkv, w_scale), dnorms)


def _units(qkv: Tensor, norms: HeadNorms, heads: Heads) -> list[tuple[Tensor, Tensor, Tensor]]:
    """x / rms(x), 1 / rms(x) and the gain, of the heads of queries and of keys."""
    wide = wide_dtype(qkv)
    q, k, _ = qkv.unflatten(1, (-1, heads.width)).split((heads.queries, heads.keys, heads.keys), dim=1)
    made: list[tuple[Tensor, Tensor, Tensor]] = []
    for x, weight in ((q.to(wide), norms.queries), (k.to(wide), norms.keys)):
        rstd = (x.square().mean(-1, keepdim=True) + norms.eps).rsqrt()
        made.append((x * rstd, rstd, weight.to(wide) + norms.offset))
    return made
