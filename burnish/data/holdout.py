"""Which rows are kept for evaluation, and which of them become prompts. Imports no torch."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence

from burnish.types import Example, Message, Prompt, Text

Reading = Example | Text


def content_key(example: Reading) -> str:
    """A hash of everything a row says: equal for word-for-word repetitions."""
    if isinstance(example, Text):
        return _hash([piece for piece, _ in example.pieces])
    return _hash([_spoken(example.messages), [dict(tool) for tool in example.tools]])


def prompt_key(example: Reading | Prompt) -> str:
    """A hash of what a row asks first: all before its first response, or a text as a whole.

    A conversation of several turns and the pieces of it that other rows may hold, each cut after another response,
    ask the same, so that no piece of a held-out conversation is trained on.
    """
    if isinstance(example, Text):
        asked = "".join(piece for piece, trained in example.pieces if not trained)
        return _hash(asked or "".join(piece for piece, _ in example.pieces))
    return _hash(_spoken(_asked_first(example.messages)))


def choose_held_out(examples: Sequence[Reading], fraction: float, seed: int) -> set[int]:
    """Places of the rows to hold out: about this fraction, decided by a hash of the seed and of what the row asks
    before its first response.

    Rows that ask the same stay on the same side, so that no held-out row has a twin in training. A question with more
    rows than are to be held out stays in training. The order of the rows does not matter.
    """
    wanted = round(fraction * len(examples))
    groups: dict[str, list[int]] = defaultdict(list)
    for place, example in enumerate(examples):
        groups[prompt_key(example)].append(place)
    chosen: set[int] = set()
    for key in sorted(groups, key=lambda key: _hash([seed, key])):
        if len(chosen) + len(groups[key]) <= wanted:
            chosen.update(groups[key])
        if len(chosen) == wanted:
            break
    return chosen


def to_prompt(example: Example, task: str | None) -> Prompt:
    """The conversation before its last response as a prompt, with that response as the answer."""
    last = _last_response(example.messages)
    return Prompt(example.messages[:last], example.messages[last].content, task, example.tools)


def choose_prompts(prompts: Sequence[Prompt], count: int, seed: int) -> list[Prompt]:
    """So many of the prompts, the families of tasks in turn, in an order decided by a hash with the seed."""
    by_task: dict[str, list[Prompt]] = defaultdict(list)
    asked = [prompt for prompt in prompts if prompt.answer != ""]  # a tool call alone is no answer to compare with
    for prompt in sorted(asked, key=lambda prompt: _hash([seed, _hash(_spoken(prompt.messages))])):
        by_task[prompt.task or ""].append(prompt)
    queues = [by_task[task] for task in sorted(by_task)]
    rounds = max((len(queue) for queue in queues), default=0)
    return [queue[turn] for turn in range(rounds) for queue in queues if turn < len(queue)][:count]


def _asked_first(messages: Sequence[Message]) -> list[Message]:
    """What comes before the first response; a greeting before the first user turn is none, and asks nothing."""
    asked: list[Message] = []
    for message in messages:
        if message.role != "assistant":
            asked.append(message)
        elif any(before.role == "user" for before in asked):
            break
    return asked


def _last_response(messages: Sequence[Message]) -> int:
    return max((k for k, message in enumerate(messages) if message.role == "assistant"), default=len(messages))


def _spoken(messages: Sequence[Message]) -> list[list[object]]:
    return [[message.role, message.content, message.extra.get("tool_calls")] for message in messages]


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]
