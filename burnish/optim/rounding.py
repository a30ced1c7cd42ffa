"""fp32 to bf16 by chance, so that on average nothing is lost, and the random numbers that decide it.

A bf16 weight has 8 bits: rounded to the nearest, a change of less than 1/512 of it is lost, and a learning rate of 1e-5
changes nothing at all. Rounded up as often as the value lies above the lower neighbour, the mean over many steps is
that of fp32 weights.
"""

import torch
from jaxtyping import BFloat16, Float32, Int64
from torch import Tensor

_MASK = 0xFFFFFFFF
_KEYS = (0x9E3779B9, 0xBB67AE85)
_FACTORS = (0xD2511F53, 0xCD9E8D57)


def round_by_chance(
    values: Float32[Tensor, " N"], key: int, counter: tuple[int, int], first: int
) -> BFloat16[Tensor, " N"]:
    """Each value as one of its two bf16 neighbours, the upper one with a probability of its distance from the lower.

    `key` and `counter` choose the random numbers, and `first`, a multiple of 8, is the place of the first value among
    those that share them: a value rounds the same however a tensor is cut into calls.
    """
    assert first % 8 == 0
    groups = torch.arange(first // 8, (first + values.numel() + 7) // 8, device=values.device)
    words = philox((key & _MASK, key >> 32 & _MASK), groups, *counter)
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    chance = torch.stack(halves, dim=1).flatten()[: values.numel()].int()
    # A float's bits below the 16 that bf16 keeps are how far it lies above the lower neighbour, in units of 2^-16.
    return ((values.view(torch.int32) + chance) >> 16).to(torch.int16).view(torch.bfloat16)


def philox(
    key: tuple[int, int], first: Int64[Tensor, " N"], second: int, third: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random 32-bit numbers for each counter (first, second, third, 0): Philox4x32-10 (Salmon et al. 2011)."""
    a, d = first & _MASK, torch.zeros_like(first)
    b, c = d + second, d + third
    keys = list(key)
    for _ in range(10):
        low, high = a * _FACTORS[0], c * _FACTORS[1]  # int64 keeps all 64 bits of a product: its sign is one of them
        a, b = _upper(high) ^ b ^ keys[0], high & _MASK
        c, d = _upper(low) ^ d ^ keys[1], low & _MASK
        keys = [(k + step) & _MASK for k, step in zip(keys, _KEYS, strict=True)]
    return a, b, c, d


def _upper(product: Tensor) -> Tensor:
    return (product >> 32) & _MASK
