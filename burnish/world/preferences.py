"""Two answers to a question of which one is better, prompts without answers, and what any answer is worth.

Right beats wrong, and concise beats rambling: a better answer is the reference answer; a worse one is wrong in a way in
which one goes wrong, or says the right thing with much around it.
"""

import random
import re
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from burnish.world.family import Family, normalise
from burnish.world.instructions import FAMILIES, SEEN, check, instruction_rows, new_questions

Row = dict[str, Any]

PREFERENCE_SPLITS = ("preferences", "preferences_held_out", "prompts")

_ROWS = 85
"""Rows of each family, at most: a family with few cases has fewer."""
_RAMBLING = 0.4
"""The share of worse answers that are right and long-winded."""

_BEFORE = (
    "You asked: {question}",
    "That is a good question.",
    "Let me think about it.",
    "I looked at it with care.",
    "Here is what I know.",
    "Well, let me see.",
    "Thank you for the question.",
    "First I read the question, then I looked for the answer.",
)
_SAYS = ("The answer is {answer}.", "So the answer is {answer}.", "I say {answer}.", "It must be {answer}.")
_AFTER = (
    "I hope that helps.",
    "Ask me more if you like.",
    "That is all I can say about it.",
    "Do you have another question?",
    "I am glad to help.",
)
_CHATTER = frozenset(normalise(sentence) for sentence in (*_BEFORE[1:], *_AFTER))
"""Sentences that say nothing about any question; after them, it counts what was said before."""


def preference_rows(split: str) -> list[Row]:
    """The rows of a split, always the same.

    `preferences` has prompt, chosen, rejected and task, of the families and wordings that `train` has, none of them
    about a case that the held-out splits ask about; `preferences_held_out` has the questions of those splits. `prompts`
    has prompt, answer and task, of the same kind as `preferences`.
    """
    if split == "preferences_held_out":
        rows = [row for held_out in ("held_out_seen", "held_out_unseen") for row in instruction_rows(held_out)]
        asked = [(FAMILIES[row["task"]], row["messages"][0]["content"], row["messages"][1]["content"]) for row in rows]
        return [_compared(*question) for question in asked]
    columns = [
        [(FAMILIES[name], *question) for question in islice(new_questions(FAMILIES[name], split), _ROWS)]
        for name in SEEN
    ]
    questions = [question for column in columns for question in column]
    random.Random(f"order of the {split}").shuffle(questions)
    if split == "preferences":
        return [_compared(*question) for question in questions]
    assert split == "prompts"
    return [{"prompt": prompt, "answer": answer, "task": family.name} for family, prompt, answer in questions]


def worth(task: str, reference: str, answer: str) -> float:
    """What an answer is worth, from -1 to 1: 1 for the right answer and nothing else, 0.2 to 0.6 for the right answer
    with words around it, -0.6 to -1 for a wrong one; each is worth less the more words it takes.

    An answer with words around it says what its last sentence ends in, courtesies aside: naming several answers is
    no way to be right.
    """
    if check(task, reference, answer):
        return 1.0
    words = answer.split()
    if not words:
        return -1.0
    brevity = 0.5 ** (max(0, len(words) - len(reference.split())) / 8)
    return 0.2 + 0.4 * brevity if _says(task, reference, answer) else -1.0 + 0.4 * brevity


def _says(task: str, reference: str, answer: str) -> bool:
    """Whether the last sentence that is no courtesy ends in the right answer."""
    sentences = [sentence for sentence in re.split(r"(?<=[.?!])\s+", answer.strip()) if normalise(sentence)]
    while sentences and _is_chatter(sentences[-1]):
        sentences.pop()
    if not sentences:
        return False
    count = len(reference.split())
    return check(task, reference, " ".join(sentences[-1].split()[-count:]))


def _is_chatter(sentence: str) -> bool:
    return normalise(sentence) in _CHATTER


def _compared(family: Family, prompt: str, answer: str) -> Row:
    """A row with the right answer and a worse one."""
    rng = random.Random(f"worse {family.name} {prompt}")
    wrong = rng.random() >= _RAMBLING
    rejected = _wrong(family, prompt, answer, rng) if wrong else _rambling(prompt, answer, rng)
    return {"prompt": prompt, "chosen": answer, "rejected": rejected, "task": family.name}


def _rambling(prompt: str, answer: str, rng: random.Random) -> str:
    """The right answer, with much around it."""
    before = rng.sample(_BEFORE, rng.randint(1, 2))
    after = rng.sample(_AFTER, rng.randint(0, 2))
    sentences = (*before, rng.choice(_SAYS), *after)
    return " ".join(sentence.replace("{question}", prompt).replace("{answer}", answer) for sentence in sentences)


def _wrong(family: Family, prompt: str, answer: str, rng: random.Random) -> str:
    """A wrong answer of the right kind: a slip where there is one to make, else the answer to another question."""
    slips = list(_SLIPS)
    rng.shuffle(slips)
    for slip in (*slips, _another):
        for found in slip(family, prompt, answer, rng):
            if found and normalise(found) != normalise(answer) and not check(family.name, answer, found):
                return found
    raise AssertionError(f"{family.name} has no wrong answer to {prompt}")


def _off_by_little(family: Family, prompt: str, answer: str, rng: random.Random) -> Iterator[str]:
    """A number that is one or ten away, or has its digits swapped."""
    if answer.isdecimal():
        near = [int(answer) + step for step in (1, -1, 10, -10)] + [int(answer[::-1])]
        rng.shuffle(near)
        yield from (str(number) for number in near if number >= 0)


def _out_of_order(family: Family, prompt: str, answer: str, rng: random.Random) -> Iterator[str]:
    """A list, or letters one by one, with two neighbours swapped, or one of them left out, or all of them backwards."""
    comma = ", " in answer
    items = answer.split(", " if comma else " ")
    if len(items) < 3 or not (comma or all(len(item) == 1 for item in items)):
        return
    place = rng.randrange(len(items) - 1)
    swapped = [*items[:place], items[place + 1], items[place], *items[place + 2 :]]
    ways = [swapped, items[:place] + items[place + 1 :], items[::-1]]
    rng.shuffle(ways)
    yield from ((", " if comma else " ").join(way) for way in ways)


def _another_of_the_list(family: Family, prompt: str, answer: str, rng: random.Random) -> Iterator[str]:
    """Another item of the list that the question names."""
    words = [word.strip(".?:") for word in prompt.replace(",", " , ").split()]
    items = [word for k, word in enumerate(words) if word != "," and "," in words[max(0, k - 1) : k + 2]]
    if answer in items:
        rng.shuffle(items)
        yield from items


def _another_mentioned(family: Family, prompt: str, answer: str, rng: random.Random) -> Iterator[str]:
    """Where the answer stands in the question, something else that stands there and could answer such a question."""
    if f" {answer}" in f" {prompt}":
        drawn = (family.draw(rng).answer for _ in range(100))
        yield from (found for found in drawn if f" {found}" in f" {prompt}")


def _another(family: Family, prompt: str, answer: str, rng: random.Random) -> Iterator[str]:
    """The answer to another question of the family."""
    for _ in range(200):
        yield family.draw(rng).answer


_SLIPS: tuple[Callable[[Family, str, str, random.Random], Iterator[str]], ...] = (
    _off_by_little,
    _out_of_order,
    _another_of_the_list,
    _another_mentioned,
)
