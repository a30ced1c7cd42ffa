"""What sequences read of a batch whose prompts are shared: each its prefix, which stands in another one, then its own.

A token's key and value are copied to the place of each sequence that reads it, and on the way back the gradients of all
copies are added up in one order, the same each time: additions that race for their turn, as those of `index_add` do
on a GPU, would make other numbers of the same step. Our own attention kernels on Hopper read prompts where they stand
and need none of this (`ops/blocks.py`).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from burnish.ops import takes_kernel, wide_dtype
from burnish.types import Batch


class Keys(NamedTuple):
    """What each sequence reads, prefix and then its own tokens, laid end to end."""

    position: Int[Tensor, " keys"]
    """The position whose key and value are copied here."""
    starts: Int[Tensor, " S+1"]
    copies: Int[Tensor, " keys"]
    """The places of the copies: first those of position 0, in order, then those of the next."""
    copy_starts: Int[Tensor, " T+1"]
    """Where in `copies` those of each position start."""


def keys_of(batch: Batch) -> Keys:
    """Made on the device from what the host knows, without waiting for it."""
    device, own_starts = batch.starts.device, batch.starts
    total = len(batch.tokens) + sum(length for _, length in batch.prefixes)
    first_S, length_S = (
        torch.tensor(part, dtype=own_starts.dtype).to(device, non_blocking=True)
        for part in zip(*batch.prefixes, strict=True)
    )
    starts = own_starts + F.pad(length_S.cumsum(0, dtype=own_starts.dtype), (1, 0))
    sequence, place = places(starts, total)
    before = length_S[sequence]
    position = torch.where(place < before, first_S[sequence] + place, own_starts[sequence] + place - before)
    in_order, copies = position.sort(stable=True)
    copy_starts = torch.searchsorted(in_order, torch.arange(len(batch.tokens) + 1, device=device))
    return Keys(position, starts, copies, copy_starts)


def places(starts: Int[Tensor, " S+1"], total: int) -> tuple[Int[Tensor, " keys"], Int[Tensor, " keys"]]:
    """Which sequence each of the keys belongs to, and its place within it."""
    numbers_S = torch.arange(len(starts) - 1, device=starts.device)
    sequence = torch.repeat_interleave(numbers_S, starts.diff(), output_size=total)
    return sequence, torch.arange(total, device=starts.device) - starts[sequence]


def padded(keys: Keys, num_sequences: int, num_keys: int, num_tokens: int) -> Keys:
    """The same for a batch padded to so many; the next sequence reads the last token in all that is added.

    Those copies are in no list: whatever gradient they get, no token gets it.
    """
    missing = num_keys - len(keys.position)
    return Keys(
        F.pad(keys.position, (0, missing), value=num_tokens - 1),
        F.pad(keys.starts, (0, num_sequences + 1 - len(keys.starts)), value=num_keys),
        F.pad(keys.copies, (0, missing)),
        F.pad(keys.copy_starts, (0, num_tokens + 1 - len(keys.copy_starts)), value=len(keys.position)),
    )


def copy_out(
    k_TGC: Float[Tensor, "T G C"], v_TGC: Float[Tensor, "T G C"], keys: Keys
) -> tuple[Float[Tensor, "keys G C"], Float[Tensor, "keys G C"]]:
    """The key and the value of each position, wherever they are read. k and v may be column slices of one buffer."""
    if not takes_kernel(k_TGC):
        return k_TGC.index_select(0, keys.position), v_TGC.index_select(0, keys.position)
    from burnish.kernels.keys import copy_out as kernel

    return kernel(k_TGC, v_TGC, keys.position)


def add_up(
    dk: Float[Tensor, "keys G C"], dv: Float[Tensor, "keys G C"], keys: Keys
) -> tuple[Float[Tensor, "T G C"], Float[Tensor, "T G C"]]:
    """The gradients of what `copy_out` read, from those of what it gave: sums in fp32, always in the same order."""
    if not takes_kernel(dk):
        return _reference_add_up(dk, keys), _reference_add_up(dv, keys)
    from burnish.kernels.keys import add_up as kernel

    return kernel(dk, dv, keys.copies, keys.copy_starts)


def _reference_add_up(d: Tensor, keys: Keys) -> Tensor:
    in_order = d.flatten(1).index_select(0, keys.copies).to(wide_dtype(d))
    sums = torch.segment_reduce(in_order, "sum", offsets=keys.copy_starts, unsafe=True)  # no look at where they end
    return sums.to(d.dtype).unflatten(1, d.shape[1:])
