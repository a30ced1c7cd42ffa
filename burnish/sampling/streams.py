"""A stream of random numbers for every sample: a hash of its seed and of the place in it, which has no state."""

from jaxtyping import Float, Int
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio: by how much SplitMix64 steps (Steele, Lea & Flood 2014)."""
_MASK = (1 << 64) - 1
_MIXING = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))


def seed_of(*numbers: int) -> int:
    """One seed, of 63 bits, made of several whole numbers: any change of one, or of their order, gives another."""
    seed = 0
    for number in numbers:
        seed = _mixed((seed + GOLDEN) & _MASK) ^ (number & _MASK)
    return _mixed((seed + GOLDEN) & _MASK) >> 1


def uniforms(seeds_S: Int[Tensor, " S"], places_S: Int[Tensor, " S"]) -> Float[Tensor, " S"]:
    """Numbers in [0, 1) in float64, each decided by a seed and a place: the same on every device.

    They are the outputs of SplitMix64 whose state starts at a hash of the seed: with the seed itself, seeds that differ
    by a multiple of its step would give one stream, shifted.
    """
    states_S = hashed(seeds_S * as_int64(GOLDEN) + 1) + (places_S + 1) * as_int64(GOLDEN)
    return _shifted(hashed(states_S), 11).double() * 2.0**-53


def hashed(states_S: Int[Tensor, " S"]) -> Int[Tensor, " S"]:
    """What SplitMix64 gives in each of these states: 64 random bits. Products wrap around."""
    for shift, factor in _MIXING:
        states_S = (states_S ^ _shifted(states_S, shift)) * as_int64(factor)
    return states_S


def _shifted(bits: Tensor, count: int) -> Tensor:
    """The bits moved to the right, zeros coming after them: PyTorch's own shift repeats the sign."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def as_int64(number: int) -> int:
    """The number that int64 has the same 64 bits for."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def _mixed(state: int) -> int:
    for shift, factor in _MIXING:
        state = (state ^ (state >> shift)) * factor & _MASK
    return state
