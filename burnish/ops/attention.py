"""Causal attention over packed sequences, and over a cache; rotary embeddings.

Under autograd there are two ways to the same numbers: `varlen_attn` (FlashAttention) for packed half-precision tensors
on the GPU; elsewhere sequences are laid into padded rows, where causality alone keeps the padding on the right out of
every score.

A sequence with a prefix reads tokens of another one before its own (`Batch.prefixes`). But for our own kernels, its
keys and values are copied from there (`ops/keys.py`), and what all readers of a prompt want of it is added up. The
kernel aligns the last query with the last key, as FlashAttention's causal mask does since 2.1; padded rows are as long
as the whole sequence, and their queries at the prefix, which nobody reads, stay 0.

`attention_forward` and `attention_backward` are the same without autograd, and use cuDNN's kernels from Hopper on,
which need 0.6 of FlashAttention 2's time there. cuDNN makes a plan for every shape, which takes 170 ms: only sequences
of one length go to it, a multiple of 64, so that shapes are few. Its ragged form is left alone: PyTorch 2.11 makes the
plan anew at every call (pytorch/pytorch#191576), and the backward pass reads beyond its memory
(pytorch/pytorch#186142). On Hopper all other batches go to our own kernels (`kernels/attention.py`), which need 0.67
of FlashAttention 2's time for heads of 128 channels, read the prompts that sequences share where they stand, and add
up in one order; heads of less than 64 channels, or between 128 and 256, stay with FlashAttention 2.
"""

import functools
import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from burnish.ops import runs_kernels, wide_dtype
from burnish.ops.blocks import Blocks, backward_by_blocks, blocks_of, forward_by_blocks, takes_blocks
from burnish.ops.keys import Keys, add_up, copy_out, keys_of, places
from burnish.ops.pointwise import soft_cap
from burnish.types import Batch

GROUP_RATIO = 0.6
"""Sequences at least so long, relative to the longest of their group, are padded to it rather than grouped apart."""
PLANNED_LENGTHS = 64
"""cuDNN is asked for sequences whose length is a multiple of this."""


class Group(NamedTuple):
    """Rows of one padded length in the padded layout: `num_rows` · `length` places from `offset` on."""

    offset: int
    num_rows: int
    length: int


@dataclass(slots=True, eq=False)
class Rows:
    """The padded layout of a batch. Not a tuple: compiled code would look into it and be made anew for every batch."""

    place: Int[Tensor, " T"] | None
    """Where each position goes; None if it is there already."""
    groups: tuple[Group, ...]
    key_place: Int[Tensor, " keys"] | None = None
    """Where each key goes, where prefixes are shared."""


class Layout(NamedTuple):
    """Where packed sequences stand for attention: made once per forward pass, used by every block."""

    starts: Int[Tensor, " S+1"]
    longest: int
    """A bound on the longest sequence: a power of two, so that compiled code sees few different values."""
    rows: Rows | None
    """How to pad; None where a variable-length kernel does the work."""
    kernel_shares_heads: bool
    """Whether that kernel serves several query heads from one key-value head by itself, which depends on PyTorch."""
    keys: Keys | None = None
    """What is read besides a sequence's own tokens; None where every sequence is whole."""
    even: bool = False
    """Whether the sequences are whole and all of one length, a multiple of `PLANNED_LENGTHS`."""
    blocks: Blocks | None = None
    """What our own kernels go by; None where they have no part."""

    def blocks_for(self, width: int) -> Blocks | None:
        """The blocks, where our own kernels take heads so wide."""
        return self.blocks if takes_blocks(width) else None

    def reach(self, window: int | None) -> int | None:
        """The window, if anything is beyond it."""
        return None if window is None or window >= self.longest else window


def packed_layout(batch: Batch, padded: bool) -> Layout:
    """How `attention` will read the batch; `padded` for everything but variable-length kernels."""
    longest = 1 << (batch.longest - 1).bit_length()
    keys = keys_of(batch) if any(length for _, length in batch.prefixes) else None
    if padded:
        return Layout(batch.starts, longest, _padded_rows(batch, keys), kernel_shares_heads=False, keys=keys)
    of_one_length = keys is None and batch.num_sequences * batch.longest == len(batch.tokens)
    even = of_one_length and batch.longest % PLANNED_LENGTHS == 0
    blocks = blocks_of(batch) if _wants_blocks(batch.starts.device) else None
    return Layout(batch.starts, longest, None, _kernel_shares_heads(), keys, even, blocks)


def wants_padding(device: torch.device, dtype: torch.dtype, head_dim: int, softcap: float | None) -> bool:
    """Whether attention of this kind is out of reach of the variable-length kernels."""
    kernel = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0
    return not kernel or head_dim > 256 or softcap is not None


def attention(
    q_THC: Float[Tensor, "T H C"],
    k_TGC: Float[Tensor, "T G C"],
    v_TGC: Float[Tensor, "T G C"],
    layout: Layout,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "T H C"]:
    """softmax(scale · q kᵀ) v of each position over its sequence, up to itself and at most `window` keys back.

    `softcap` bends the scores by cap · tanh(score / cap) first. Each key-value head serves H / G query heads.
    """
    if layout.keys is not None:
        k_TGC, v_TGC = (x.index_select(0, layout.keys.position) for x in (k_TGC, v_TGC))
    if layout.rows is None:
        return _varlen(q_THC, k_TGC, v_TGC, layout, scale, window)
    place, key_place = layout.rows.place, layout.rows.place if layout.keys is None else layout.rows.key_place
    given = ((q_THC, place), (k_TGC, key_place), (v_TGC, key_place))
    q, k, v = (_into_rows(x, places, layout.rows) for x, places in given)
    outputs: list[Tensor] = []
    for offset, num_rows, length in layout.rows.groups:
        rows = slice(offset, offset + num_rows * length)
        q_SHLC, k_SGLC, v_SGLC = (x[rows].view(num_rows, length, -1, x.shape[-1]).transpose(1, 2) for x in (q, k, v))
        out_SHLC = _padded(q_SHLC, k_SGLC, v_SGLC, scale, window, softcap)
        outputs.append(out_SHLC.transpose(1, 2).reshape(num_rows * length, *q_THC.shape[1:]))
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return out if layout.rows.place is None else out.index_select(0, layout.rows.place)


@torch.no_grad()
def attention_forward(
    q_THC: Float[Tensor, "T H C"],
    k_TGC: Float[Tensor, "T G C"],
    v_TGC: Float[Tensor, "T G C"],
    layout: Layout,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Float[Tensor, "T H C"], tuple[Tensor, ...]]:
    """`attention` without autograd, and what its backward pass wants besides: the log-sum-exp of each row, or nothing.

    q, k and v may be column slices of one buffer.
    """
    if layout.rows is not None:
        return attention(q_THC, k_TGC, v_TGC, layout, scale, window, softcap), ()
    assert softcap is None
    if _suits_cudnn(q_THC, layout, window):
        return _cudnn_forward(q_THC, k_TGC, v_TGC, len(layout.starts) - 1, scale)
    if (blocks := layout.blocks_for(q_THC.shape[-1])) is not None:
        return forward_by_blocks(q_THC, k_TGC, v_TGC, blocks, scale, layout.reach(window))
    if layout.keys is not None:
        k_TGC, v_TGC = copy_out(k_TGC, v_TGC, layout.keys)
    return _flash_forward(q_THC, k_TGC, v_TGC, layout, scale, window)


@torch.no_grad()
def attention_backward(
    dout_THC: Float[Tensor, "T H C"],
    given: tuple[Float[Tensor, "T H C"], Float[Tensor, "T G C"], Float[Tensor, "T G C"]],
    out_THC: Float[Tensor, "T H C"],
    saved: tuple[Tensor, ...],
    layout: Layout,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Float[Tensor, "T H C"], Float[Tensor, "T G C"], Float[Tensor, "T G C"]]:
    """The gradients of q, k and v, the `given`, from what `attention_forward` returned. Padded rows are run again."""
    if layout.rows is not None:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in given]
            out = attention(leaves[0], leaves[1], leaves[2], layout, scale, window, softcap)
            dq, dk, dv = torch.autograd.grad(out, leaves, dout_THC)
        return dq, dk, dv
    q, k, v = given
    (lse,) = saved
    if lse.ndim > 2:  # by heads alone where FlashAttention or our own kernels made it
        return _cudnn_backward(dout_THC, given, out_THC, lse, len(layout.starts) - 1, scale)
    if (blocks := layout.blocks_for(q.shape[-1])) is not None:
        return backward_by_blocks(dout_THC, given, out_THC, lse, blocks, scale, layout.reach(window))
    if layout.keys is None:
        return _flash_backward(dout_THC, given, out_THC, lse, layout, scale, window)
    read = (q, *copy_out(k, v, layout.keys))
    dq, dk, dv = _flash_backward(dout_THC, read, out_THC, lse, layout, scale, window)
    return dq, *add_up(dk, dv, layout.keys)


def cached_attention(
    q_SHC: Float[Tensor, "S H C"],
    k_SGMC: Float[Tensor, "S G M C"],
    v_SGMC: Float[Tensor, "S G M C"],
    seen_SM: Bool[Tensor, "S M"],
    scale: float,
    softcap: float | None = None,
) -> Float[Tensor, "S H C"]:
    """Attention of one new query per slot over the cached keys that `seen_SM` allows."""
    num_slots, num_heads, width = q_SHC.shape
    # The query heads that share a key-value head stand where queries at several positions would: no key is copied.
    q = q_SHC.view(num_slots, k_SGMC.shape[1], -1, width)
    out = _masked(q, k_SGMC, v_SGMC, seen_SM[:, None, None], scale, softcap)
    return out.reshape(num_slots, num_heads, width)


def rotary_table(
    positions_T: Int[Tensor, " T"], frequencies: Sequence[float], scale: float = 1.0
) -> tuple[Float[Tensor, "T C/2"], Float[Tensor, "T C/2"]]:
    """(cos, sin) of position · frequency in fp32, both times `scale`."""
    angles = positions_T[:, None].float() * _on_device(tuple(frequencies), positions_T.device)
    return angles.cos() * scale, angles.sin() * scale


@functools.cache
def _on_device(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """The numbers in fp32, copied to the device once: a CUDA graph cannot copy from the host."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=torch.float32, device=device)


def rotate(
    x_THC: Float[Tensor, "T H C"], table: tuple[Float[Tensor, "T c"], Float[Tensor, "T c"]]
) -> Float[Tensor, "T H C"]:
    """x with its pairs (i, i + c) turned by the table's angles (Su et al. 2021); channels from 2c on are left alone."""
    cos, sin = (part[:, None, :] for part in table)
    half = cos.shape[-1]
    first, second = (x.to(wide_dtype(x_THC)) for x in (x_THC[..., :half], x_THC[..., half : 2 * half]))
    rest = x_THC[..., 2 * half :]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_THC.dtype)
    return turned if rest.shape[-1] == 0 else torch.cat((turned, rest), dim=-1)


def _padded_rows(batch: Batch, keys: Keys | None) -> Rows:
    ends = batch.starts if keys is None else keys.starts
    lengths = [end - start for start, end in itertools.pairwise(ends.tolist())]
    if keys is None and len(set(lengths)) == 1:
        return Rows(None, (Group(0, len(lengths), lengths[0]),))
    groups, offsets = _group_rows(lengths)
    first_place_S = torch.tensor(offsets, device=batch.positions.device)
    key_place = None
    if keys is not None:
        sequence, place = places(keys.starts, len(keys.position))
        key_place = first_place_S[sequence] + place
    return Rows(first_place_S[batch.sequence] + batch.positions, groups, key_place)


def _group_rows(lengths: list[int]) -> tuple[tuple[Group, ...], list[int]]:
    """Groups of similar length, longest first, and the first place of each sequence in the padded layout."""
    order = sorted(range(len(lengths)), key=lambda s: -lengths[s])
    groups: list[Group] = []
    offsets = [0] * len(lengths)
    for s in order:
        if not groups or lengths[s] < GROUP_RATIO * groups[-1].length:
            end = groups[-1].offset + groups[-1].num_rows * groups[-1].length if groups else 0
            groups.append(Group(end, 0, lengths[s]))
        offset, num_rows, length = groups[-1]
        offsets[s] = offset + num_rows * length
        groups[-1] = Group(offset, num_rows + 1, length)
    return tuple(groups), offsets


def _into_rows(x: Tensor, place: Tensor | None, rows: Rows) -> Tensor:
    if place is None:
        return x
    offset, num_rows, length = rows.groups[-1]
    return x.new_zeros(offset + num_rows * length, *x.shape[1:]).index_copy(0, place, x)


def _padded(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None) -> Tensor:
    """[S, H, L, C] rows; what a row holds beyond its sequence is later than all of it, so causality hides it."""
    length, num_groups = q.shape[2], q.shape[1] // k.shape[1]
    if softcap is None and (window is None or window >= length):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=num_groups > 1)
    place = torch.arange(length, device=q.device)
    back_LL = place[:, None] - place
    seen_LL = (back_LL >= 0) & (back_LL < (length if window is None else window))
    if softcap is not None and num_groups > 1:
        k, v = k.repeat_interleave(num_groups, 1), v.repeat_interleave(num_groups, 1)
    return _masked(q, k, v, seen_LL, scale, softcap)


def _masked(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float | None) -> Tensor:
    if softcap is None:
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=grouped)
    scores = soft_cap(q @ k.transpose(-1, -2) * scale, softcap)
    return torch.where(seen, scores, float("-inf")).softmax(-1, dtype=wide_dtype(q)).to(v.dtype) @ v


def _varlen(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, window: int | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # 2 s of imports that a CPU does without

    num_groups = q.shape[1] // k.shape[1]
    shared: dict[str, Any] = {}
    if num_groups > 1 and layout.kernel_shares_heads:
        shared["enable_gqa"] = True
    elif num_groups > 1:
        k, v = k.repeat_interleave(num_groups, 1), v.repeat_interleave(num_groups, 1)
    sides = (-1 if window is None else window - 1, 0)
    starts, longest = layout.starts, layout.longest
    key_starts = starts if layout.keys is None else layout.keys.starts
    out = varlen_attn(q, k, v, starts, key_starts, longest, longest, scale=scale, window_size=sides, **shared)
    assert isinstance(out, Tensor)
    return out


@functools.cache
def _kernel_shares_heads() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _wants_blocks(device: torch.device) -> bool:
    """Whether our own kernels take what is ragged: they are written for Hopper."""
    return runs_kernels(device) and torch.cuda.get_device_capability(device)[0] == 9


def _suits_cudnn(q: Tensor, layout: Layout, window: int | None) -> bool:
    return layout.even and layout.reach(window) is None and q.shape[-1] <= 128 and _has_hopper_kernels(q.device)


@functools.cache
def _has_hopper_kernels(device: torch.device) -> bool:
    """Before Hopper, FlashAttention 2 is as fast."""
    return torch.backends.cudnn.is_available() and torch.cuda.get_device_capability(device) >= (9, 0)


def _cudnn_forward(
    q: Tensor, k: Tensor, v: Tensor, num_sequences: int, scale: float
) -> tuple[Tensor, tuple[Tensor, ...]]:
    rows = (_as_rows(x, num_sequences) for x in (q, k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *rows, None, compute_log_sumexp=True, is_causal=True, scale=scale
    )
    return out.transpose(1, 2).flatten(0, 1), (lse,)


def _cudnn_backward(
    dout: Tensor, given: tuple[Tensor, Tensor, Tensor], out: Tensor, lse: Tensor, num_sequences: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    length = len(out) // num_sequences
    # Plans are kept by the shapes and strides of q, k and v alone: those of the other two must never vary.
    dout, q, k, v, out = (_as_rows(x, num_sequences) for x in (dout.contiguous(), *given, out.contiguous()))
    unused = lse.new_empty((), dtype=torch.int64)  # the seeds of dropout
    gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, out, lse, unused, unused, None, None, None, length, length, 0.0, True, scale=scale
    )
    dq, dk, dv = (x.transpose(1, 2).flatten(0, 1) for x in gradients)
    return dq, dk, dv


def _as_rows(x: Tensor, num_sequences: int) -> Tensor:
    """[S, H, L, C], without a copy."""
    return x.unflatten(0, (num_sequences, -1)).transpose(1, 2)


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, window: int | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    starts, sides = _flash_options(layout, window)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, *starts, dropout_p=0.0, is_causal=window is None, return_debug_mask=False, scale=scale, **sides
    )
    return out, (lse,)


def _flash_backward(
    dout: Tensor,
    given: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    lse: Tensor,
    layout: Layout,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    starts, sides = _flash_options(layout, window)
    seeds, unused = lse.new_empty(2, dtype=torch.uint64), lse.new_empty(0)  # of dropout
    return torch.ops.aten._flash_attention_backward(
        dout, *given, out, lse, *starts, 0.0, window is None, seeds, unused, scale=scale, **sides
    )


def _flash_options(layout: Layout, window: int | None) -> tuple[tuple[Tensor, Tensor, int, int], dict[str, int]]:
    """Where sequences start and how long they are, for queries and keys; how far a query sees to either side."""
    key_starts = layout.starts if layout.keys is None else layout.keys.starts
    sides = {"window_size_left": -1 if window is None else window - 1, "window_size_right": 0}
    return (layout.starts, key_starts, layout.longest, layout.longest), sides
