"""What a family of tasks is: a way to draw cases, the wordings that ask for them, and a checker that grades answers."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Case:
    """One question and its answer, before it is put into words."""

    slots: Mapping[str, str]
    """What the wordings of the family may mention, by name."""
    answer: str
    key: str
    """What makes it this case whatever the wording: cases are divided between the splits by it."""


def normalise(answer: str) -> str:
    """An answer without what grading ignores: case, spacing, and a full stop at the end."""
    return " ".join(answer.lower().split()).removesuffix(".").rstrip()


def same(reference: str, answer: str) -> bool:
    """Whether two answers are the same after normalising: the checker of most families."""
    return normalise(reference) == normalise(answer)


@dataclass(frozen=True, slots=True)
class Family:
    """A family of tasks. Wordings are format strings over a case's slots; those in `prose` may also use {answer}."""

    name: str
    draw: Callable[[random.Random], Case]
    phrasings: tuple[str, ...]
    """Wordings of the instruction in the training rows."""
    held_out_phrasings: tuple[str, ...]
    """Wordings that neither the training rows nor the corpus use."""
    wordings: tuple[str, ...]
    """Wordings that the corpus uses besides `phrasings`, and the training rows do not."""
    prose: tuple[str, ...]
    """Plain sentences that state the same thing."""
    check: Callable[[str, str], bool] = same
    """(reference, answer) -> whether the answer is right."""
    unseen: bool = False
    """Held out entirely: the corpus states its facts, but no training row asks for it."""
