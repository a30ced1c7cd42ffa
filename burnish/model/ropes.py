"""Rotary embeddings: how fast each pair of a head's dimensions turns. Imports no torch."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Rope:
    """A rotary embedding: pair i of a head turns by position · frequencies[i]; cos and sin are scaled by `scale`."""

    frequencies: tuple[float, ...]
    scale: float = 1.0


def rope_of(raw: Mapping[str, Any]) -> Rope:
    """The rotary embedding from `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling`."""
    given: dict[str, Any] = {**(raw.get("rope_parameters") or raw.get("rope_scaling") or {})}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in _ROPES or (kind != "default" and raw["architectures"][0].startswith("Phi3")):
        supported = ", ".join(_ROPES)
        raise ValueError(f"rope type {kind} is not supported for {raw['architectures'][0]}; supported are {supported}")
    theta = float(given.get("rope_theta", raw.get("rope_theta", 10000.0)))
    partial = raw["architectures"][0].startswith("Phi3")  # transformers reads the factor for no other of our families
    share = float(given.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))) if partial else 1.0
    trained = raw.get("original_max_position_embeddings") or given.get("original_max_position_embeddings")
    given["original_max_position_embeddings"] = trained or raw.get("max_position_embeddings", 2048)
    given["theta"], given["max_position_embeddings"] = theta, raw.get("max_position_embeddings", 2048)
    num_turned = int(head_dim_of(raw) * share)
    plain = tuple(theta ** (-i / num_turned) for i in range(0, num_turned, 2))
    return _ROPES[kind](plain, given)


def head_dim_of(raw: Mapping[str, Any]) -> int:
    """The size of an attention head: as `config.json` says, or the hidden size divided by their number."""
    return int(raw.get("head_dim") or int(raw["hidden_size"]) // int(raw["num_attention_heads"]))


def _plain_rope(plain: tuple[float, ...], given: Mapping[str, Any]) -> Rope:
    return Rope(plain)


def _linear_rope(plain: tuple[float, ...], given: Mapping[str, Any]) -> Rope:
    """Positions divided by the factor (Chen et al. 2023, 2306.15595)."""
    return Rope(tuple(f / given["factor"] for f in plain))


def _llama3_rope(plain: tuple[float, ...], given: Mapping[str, Any]) -> Rope:
    """Long wavelengths are stretched by the factor, short ones kept, those between blended (Llama 3.1)."""
    low, high, trained = (
        float(given[key]) for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )

    def stretched(frequency: float) -> float:
        turns = trained * frequency / (2 * math.pi)
        keep = min(max((turns - low) / (high - low), 0.0), 1.0)
        return keep * frequency + (1 - keep) * frequency / given["factor"]

    return Rope(tuple(stretched(f) for f in plain))


def _yarn_rope(plain: tuple[float, ...], given: Mapping[str, Any]) -> Rope:
    """YaRN (Peng et al. 2023, 2309.00071, eq. 17-22): interpolate slow pairs, keep fast ones, and scale cos and sin."""
    trained, num_turned = float(given["original_max_position_embeddings"]), 2 * len(plain)
    factor = float(given.get("factor") or given["max_position_embeddings"] / trained)

    def pair_turning(turns: float) -> float:
        return num_turned * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(given["theta"]))

    low, high = pair_turning(given.get("beta_fast") or 32), pair_turning(given.get("beta_slow") or 1)
    if given.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, num_turned - 1)
    width = max(high - low, 0.001)
    interpolated = [min(max((i - low) / width, 0.0), 1.0) for i in range(len(plain))]
    frequencies = tuple(f * (1 - s) + f / factor * s for f, s in zip(plain, interpolated, strict=True))
    return Rope(frequencies, _yarn_scale(given, factor))


def _yarn_scale(given: Mapping[str, Any], factor: float) -> float:
    def growth(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])
    if given.get("mscale") and given.get("mscale_all_dim"):
        return growth(given["mscale"]) / growth(given["mscale_all_dim"])
    return growth(1.0)


_ROPES: dict[str, Callable[[tuple[float, ...], Mapping[str, Any]], Rope]] = {
    "default": _plain_rope,
    "linear": _linear_rope,
    "llama3": _llama3_rope,
    "yarn": _yarn_rope,
}
