"""Instruction rows of the world: questions in chat form, answers that can be graded, splits that do not overlap."""

import random
import zlib
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from burnish.world import knowledge, letters, numbers, stories
from burnish.world.family import Case, Family, same

FAMILIES: Mapping[str, Family] = {
    family.name: family for module in (numbers, letters, knowledge, stories) for family in module.FAMILIES
}
SEEN: tuple[str, ...] = tuple(name for name, family in FAMILIES.items() if not family.unseen)
UNSEEN: tuple[str, ...] = tuple(name for name, family in FAMILIES.items() if family.unseen)

INSTRUCTION_SPLITS = ("train", "held_out_seen", "held_out_unseen")

Row = dict[str, Any]

_TRAIN_ROWS, _SEEN_ROWS, _UNSEEN_ROWS = 150, 10, 18
"""Rows of each family, at most: a family with few cases has fewer training rows."""
_TRIES = 12
"""Cases drawn for each row wanted, before a family counts as exhausted."""


def instruction_rows(split: str) -> list[Row]:
    """The rows of a split, always the same: messages, task (the family) and phrasing (`seen` or `held_out`).

    `held_out_seen` asks new questions of the families that `train` has, half of them in wordings that `train` does not
    use; `held_out_unseen` asks questions of families that `train` does not have. Rows of the families take turns, so
    that the first N rows of a split are a fair sample of it.
    """
    if split == "train":
        columns = [list(islice(_train(FAMILIES[name]), _TRAIN_ROWS)) for name in SEEN]
        together = [row for column in columns for row in column]
        random.Random("order of the training rows").shuffle(together)
        return together
    if split == "held_out_seen":
        return _in_turns([list(islice(_held_out(FAMILIES[name]), _SEEN_ROWS)) for name in SEEN])
    assert split == "held_out_unseen"
    return _in_turns([list(islice(_held_out(FAMILIES[name]), _UNSEEN_ROWS)) for name in UNSEEN])


def check(task: str, reference: str, answer: str) -> bool:
    """Whether an answer is right, given the reference answer of its row; the task's own checker decides."""
    return FAMILIES[task].check(reference, answer) if task in FAMILIES else same(reference, answer)


def is_held_out(family: Family, case: Case) -> bool:
    """Whether a case is kept for the held-out splits: one in five is, whatever wording asks for it."""
    return zlib.crc32(f"{family.name} {case.key}".encode()) % 5 == 0


def new_questions(family: Family, name: str) -> Iterator[tuple[str, str]]:
    """Questions and answers of a family that no held-out split asks about, none twice, until it has hardly any more.

    The name decides which come: one set of rows has others than the next.
    """
    rng = random.Random(f"{name} {family.name}")
    prompts: set[str] = set()
    for _ in range(_TRIES * _TRAIN_ROWS):
        case = family.draw(rng)
        prompt = rng.choice(family.phrasings).format(**case.slots)
        if prompt not in prompts and not is_held_out(family, case):
            prompts.add(prompt)
            yield prompt, case.answer


def _train(family: Family) -> Iterator[Row]:
    return (_row(family, prompt, answer, "seen") for prompt, answer in new_questions(family, "train"))


def _held_out(family: Family) -> Iterator[Row]:
    rng = random.Random(f"held out {family.name}")
    prompts: set[str] = set()
    for _ in range(100 * _TRIES):
        case = family.draw(rng)
        # Wordings take turns, the other one each time a row is found.
        held_out = len(prompts) % 2 == 1
        prompt = rng.choice(family.held_out_phrasings if held_out else family.phrasings).format(**case.slots)
        if prompt not in prompts and (family.unseen or is_held_out(family, case)):
            prompts.add(prompt)
            yield _row(family, prompt, case.answer, "held_out" if held_out else "seen")


def _row(family: Family, prompt: str, answer: str, phrasing: str) -> Row:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "task": family.name, "phrasing": phrasing}


def _in_turns(columns: list[list[Row]]) -> list[Row]:
    longest = max(map(len, columns))
    return [column[i] for i in range(longest) for column in columns if i < len(column)]
