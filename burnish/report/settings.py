"""Settings and environments of several runs side by side: what differs, and what they share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from burnish.report.units import ABSENT


@dataclass(frozen=True, slots=True)
class Settings:
    """Named values of several runs: those that differ, with a value for each run, and those that all share."""

    different: list[tuple[str, list[str]]]
    shared: list[tuple[str, str]]


def side_by_side(trees: Sequence[Mapping[str, Any]]) -> Settings:
    """The values of nested mappings by dotted name, in the order in which they first come up."""
    flats = [flat(tree) for tree in trees]
    different: list[tuple[str, list[str]]] = []
    shared: list[tuple[str, str]] = []
    for name in dict.fromkeys(name for values in flats for name in values):
        texts = [_text(values[name]) if name in values else ABSENT for values in flats]
        if len(set(texts)) == 1:
            shared.append((name, texts[0]))
        else:
            different.append((name, texts))
    return Settings(different, shared)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as dotted name -> value."""
    pairs: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            pairs |= flat(cast(dict[str, Any], value), f"{prefix}{key}.")
        else:
            pairs[f"{prefix}{key}"] = value
    return pairs


def _text(value: Any) -> str:
    """A value as a setting is written."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(_text(item) for item in cast(list[Any], value)) or "none"
    return "none" if value == {} else str(value)
