"""Attention over packed rows for transformers' models, by the FlashAttention that PyTorch holds.

TRL packs rows for flash-attn's kernels. That package has no wheel for PyTorch 2.11, and without it transformers masks
one long row, which costs the square of it; PyTorch's own variable-length attention is the same FlashAttention 2. So TRL
is given what it would have where flash-attn is installed.
"""

from typing import Any

NAME = "varlen"


def register() -> None:
    """Make it known under its name, for `attn_implementation`; no mask is made for such a name."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)


class _Last:
    """Where the rows of the last positions start: they are the same in every layer of a pass."""

    positions: Any = None
    starts: Any = None
    longest: int = 0


def attend(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    scaling: float | None = None,
    position_ids: Any = None,
    **given: Any,
) -> tuple[Any, None]:
    """Causal attention of each packed row over itself, from [1, heads, T, channels] to [1, T, heads, channels]."""
    from torch.nn.attention.varlen import varlen_attn

    assert attention_mask is None
    assert query.shape[0] == 1
    if _Last.positions is not position_ids:
        _Last.positions = position_ids
        _Last.starts, _Last.longest = row_starts(position_ids[0])
    groups = query.shape[1] // key.shape[1]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    starts, longest = _Last.starts, _Last.longest
    out = varlen_attn(q, k, v, starts, starts, longest, longest, scale=scaling, window_size=(-1, 0))
    return out[None], None


def row_starts(positions: Any) -> tuple[Any, int]:
    """Where each row starts in the positions of packed rows, with their end (int32); and the longest row."""
    import torch

    starts = torch.nonzero(positions == 0).flatten()
    starts = torch.cat([starts, starts.new_tensor([len(positions)])]).int()
    return starts, int(starts.diff().max())
