"""Optimizer state in 8 bits (Dettmers et al. 2022, arXiv 2110.02861), in the layout of bitsandbytes.

A state is flattened and cut into blocks of 256. A block keeps its largest magnitude, and for each value the nearest
of the 256 levels of a dynamic map after division by it: 1.016 bytes a value in place of 4. The map's levels are dense
near 0, over seven powers of ten; the one for the second moment, never negative, has twice as many above 0.
"""

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from burnish.ops.nf4 import dynamic_map

BLOCK = 256
SMALLEST = 4096
"""A tensor of fewer values keeps 32-bit states: norms and biases are sensitive, and cost nothing."""
LOWEST = 0x3400
"""The upper half of the bits of 2^-23, below the first midpoint between levels: where the search begins."""


class Search(NamedTuple):
    """How the nearest level to a magnitude is found by two look-ups: see `search`."""

    guess: UInt8[Tensor, " buckets"]
    middles: Float32[Tensor, " levels"]


def signed_map(device: torch.device) -> Float[Tensor, " 256"]:
    """The levels of the first moment, from -0.993 to 1."""
    return _levels(device, True)


def unsigned_map(device: torch.device) -> Float[Tensor, " 256"]:
    """The levels of the second moment, from 0 to 1: decade i of seven, 10^(i-6), is cut into 2^(i+1) parts."""
    return _levels(device, False)


def num_blocks(count: int) -> int:
    """How many blocks a state of so many values has."""
    return -(-count // BLOCK)


def dequantise(
    codes: UInt8[Tensor, " N"], absmax: Float32[Tensor, " blocks"], levels: Float[Tensor, " 256"]
) -> Float32[Tensor, " N"]:
    """The values that the codes stand for."""
    return levels.index_select(0, codes.int()) * absmax.repeat_interleave(BLOCK)[: codes.numel()]


def quantise(
    values: Float32[Tensor, " N"], levels: Float[Tensor, " 256"]
) -> tuple[UInt8[Tensor, " N"], Float32[Tensor, " blocks"]]:
    """The code of the nearest level for each value, and the largest magnitude of each block.

    Of the second moment no value above 0 becomes 0, where bitsandbytes takes the nearest level there as well: divided
    by a root of 0, what is left of the first moment would be an update of any size. (bitsandbytes' CPU backend looks
    codes up in 65,536 bins and is one off in about 1 of 1,000; its CUDA backend is exact, but moves a first moment
    just below 0 to the level below it.)
    """
    blocks = F.pad(values, (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1)
    inverse = torch.where(absmax > 0, 1.0 / absmax, 0.0)  # of a block of zeros, which stay zeros
    unit = (blocks * inverse.unsqueeze(1)).flatten()[: values.numel()]
    codes = torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2, out_int32=True)
    if levels[0] == 0:
        codes = codes.maximum((unit > 0).int())
    return codes.to(torch.uint8), absmax


@cache
def search(device: torch.device, signed: bool) -> Search:
    """Tables for a kernel: how many midpoints of levels lie below a magnitude, which is the number of its level.

    The upper 16 bits of a magnitude's fp32 name a bucket so narrow that it holds at most one midpoint: `guess` counts
    those below the bucket, `middles` has the one to compare with.
    """
    levels = _levels(torch.device("cpu"), signed)
    levels = levels[levels >= 0]
    middles = (levels[1:] + levels[:-1]) / 2
    edges = (torch.arange(LOWEST, 0x3F81, dtype=torch.int32) << 16).view(torch.float32)
    edges[0] = 0.0
    guess = torch.bucketize(edges, middles).to(torch.uint8)
    return Search(guess.to(device), F.pad(middles, (0, 1), value=float("inf")).to(device))


@cache
def _levels(device: torch.device, signed: bool) -> Tensor:
    if signed:
        return dynamic_map().to(device)
    decades: list[Tensor] = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i + 1) + 1, dtype=torch.float32, device="cpu")
        decades.append(10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2))
    return torch.cat([*decades, torch.tensor([0.0, 1.0], device="cpu")]).sort().values.to(device)
