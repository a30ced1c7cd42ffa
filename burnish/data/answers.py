"""Compared answers made clean: each is repaired as the end of its conversation, or the whole row is dropped.

Imports no torch.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, takewhile

from burnish.data.repair import Repaired, is_empty, repair
from burnish.types import Example, Judged, Message, Preference

Turns = tuple[Message, ...]
Compared = Preference | Judged

DROPS = {
    "no_shared_prompt": "the answers do not begin with the same prompt",
    "few_answers": "there are fewer than two answers to compare",
    "empty_answer": "an answer says nothing",
    "identical_answers": "two answers are the same word for word, and one is called better",
    "tied": "no answer is called better than another",
}
"""Why a row with compared answers cannot be used."""


_ASKED = -1.0
"""Marks the turns of a prompt while a conversation is repaired: a weight that no turn has, so none joins the answer."""


def repair_answers(reading: Compared) -> Repaired[Compared]:
    """The row after every rule that applies to one of its conversations: a prompt with an answer after it."""
    answers = answers_of(reading)
    if isinstance(reading, Preference) and len(answers) < 2:
        return Repaired(None, (), "few_answers")
    if not reading.prompt:
        return Repaired(None, (), "no_shared_prompt")
    rules: dict[str, None] = {}
    tools = reading.tools
    clean: list[tuple[Turns, Turns]] = []
    for answer in answers:
        last = next((turn for turn in reversed(answer) if turn.role == "assistant"), None)
        if last is None or is_empty(last):
            return Repaired(None, tuple(rules), "empty_answer")
        repaired = repair(Example((*(replace(turn, weight=_ASKED) for turn in reading.prompt), *answer), reading.tools))
        rules |= dict.fromkeys(repaired.rules)
        if not isinstance(repaired.example, Example):
            return Repaired(None, tuple(rules), repaired.dropped)
        clean.append(_apart(repaired.example.messages))
        tools = repaired.example.tools
    prompts, cleaned = zip(*clean, strict=True)
    if any(prompt != prompts[0] for prompt in prompts):
        return Repaired(None, tuple(rules), "no_shared_prompt")
    dropped = _incomparable(reading.ranks, cleaned) if isinstance(reading, Preference) else None
    if dropped:
        return Repaired(None, tuple(rules), dropped)
    if isinstance(reading, Preference):
        return Repaired(replace(reading, prompt=prompts[0], answers=cleaned, tools=tools), tuple(rules))
    return Repaired(replace(reading, prompt=prompts[0], answer=cleaned[0], tools=tools), tuple(rules))


def answers_of(reading: Compared) -> tuple[Turns, ...]:
    """All answers of a row."""
    return reading.answers if isinstance(reading, Preference) else (reading.answer,)


def conversation(reading: Compared, answer: Turns, last_only: bool = False) -> Example:
    """The prompt and an answer as one conversation of which the answer alone is trained on: what the assistant says.

    The weight of prompt turns is 0; the assistant's turns in the answer have the weight that the data gives them,
    else 1. With `last_only`, only the last of them counts.
    """
    spoken = [number for number, turn in enumerate(answer) if turn.role == "assistant"]
    counted = spoken[-1:] if last_only else spoken

    def weight(number: int, turn: Message) -> float | None:
        if turn.role != "assistant":
            return None
        return (1.0 if turn.weight is None else turn.weight) if number in counted else 0.0

    weighted = (replace(turn, weight=weight(number, turn)) for number, turn in enumerate(answer))
    return Example((*(replace(turn, weight=0.0) for turn in reading.prompt), *weighted), reading.tools)


def _apart(messages: Sequence[Message]) -> tuple[Turns, Turns]:
    """The prompt, found by the mark that its turns carry, and the answer."""
    prompt = tuple(takewhile(lambda turn: turn.weight == _ASKED, messages))
    return tuple(replace(turn, weight=None) for turn in prompt), tuple(messages[len(prompt) :])


def _incomparable(ranks: Sequence[int], answers: Sequence[Turns]) -> str | None:
    """Why answers with these places say nothing about each other, or contradict each other; None when they do not."""
    if len(set(ranks)) < 2:
        return "tied"
    pairs = combinations(zip(ranks, answers, strict=True), 2)
    return "identical_answers" if any(a != b and said == too for (a, said), (b, too) in pairs) else None
