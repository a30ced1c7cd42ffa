"""Which rows are kept for evaluation, and which of them become prompts. Imports no torch."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

from burnish.data.answers import answers_of
from burnish.data.audit import Finding, Tally
from burnish.data.files import EMBEDDED, has_split
from burnish.data.formats import Reading
from burnish.data.reading import Rows, Said, Source, is_remote, read_sources
from burnish.settings import DataSettings, EvaluateSettings
from burnish.types import Example, Judged, Message, Preference, Prompt, Text

Other = TypeVar("Other", bound=Reading)


@dataclass(frozen=True, slots=True)
class Kept(Generic[Said]):
    """Rows kept for evaluation, and where they come from."""

    sources: list[Source[Said]]
    """A share of the rows, where they are held out of those."""
    others: Rows | None
    """The rows of another data set, where they come from one."""
    how: str
    """The same in words."""


def hold_out(
    sources: Sequence[Source[Said]],
    data: DataSettings,
    evaluate: EvaluateSettings,
    seed: int,
    dropped: Tally,
    embedded: tuple[str, ...],
) -> tuple[list[Source[Said]], Kept[Said]]:
    """The rows to train on, and those held out: a data set of their own, or a share of these.

    `embedded` are the splits of the embedded data that hold such rows for evaluation.
    """
    own = data.path == EMBEDDED and evaluate.path is None and evaluate.fraction > 0
    if evaluate.path is not None or own:
        path = evaluate.path or EMBEDDED
        splits = evaluation_split(path, data.split, embedded)
        return list(sources), _other_rows(path, splits, sources, data, dropped)
    chosen = choose_held_out([source.example for source in sources], evaluate.fraction, seed)
    if not chosen:
        how = f"nothing: evaluate.fraction={evaluate.fraction:g} of {len(sources)} rows"
        if wanted := round(evaluate.fraction * len(sources)):
            how += f" would be {wanted}, but more than that ask each question: write a larger one, or evaluate.path="
        return list(sources), Kept([], None, how)
    held = [source for place, source in enumerate(sources) if place in chosen]
    how = f"{len(held):,} of these rows, chosen by a hash with seed {seed}; rows that ask the same stay together"
    return [source for place, source in enumerate(sources) if place not in chosen], Kept(held, None, how)


def evaluation_split(path: str, split: str, embedded: tuple[str, ...]) -> tuple[str, ...]:
    """Which splits of evaluate.path to read: of a data set in several files its test split, else validation."""
    if path == EMBEDDED:
        return embedded
    if is_remote(path) or Path(path).is_dir():
        for name in ("test", "validation"):
            if has_split(path, name):
                return (name,)
    return (split,)


def duplicates(sources: Sequence[Source[Said]]) -> Finding:
    """The rows that say what an earlier one says."""
    tally, seen = Tally(), set[str]()
    for source in sources:
        key = content_key(source.example)
        if key in seen:
            tally.add("duplicate", source.row, source.place)
        seen.add(key)
    return tally.finding("duplicate")


def content_key(example: Reading) -> str:
    """A hash of everything a row says: equal for word-for-word repetitions."""
    if isinstance(example, Text):
        return _hash([piece for piece, _ in example.pieces])
    tools = [dict(tool) for tool in example.tools]
    if isinstance(example, Preference | Judged):
        told = example.ranks if isinstance(example, Preference) else example.wanted
        return _hash([_spoken(example.prompt), [_spoken(answer) for answer in answers_of(example)], told, tools])
    if isinstance(example, Prompt):
        return _hash([_spoken(example.messages), example.answer, tools])
    return _hash([_spoken(example.messages), tools])


def ordered(examples: Sequence[Reading], seed: int) -> list[int]:
    """The places of rows in an order that the seed and what they say decide, whatever order they come in."""
    keys = [_hash([seed, content_key(example)]) for example in examples]
    return sorted(range(len(examples)), key=lambda place: keys[place])


def prompt_key(example: Reading) -> str:
    """A hash of what a row asks first: all before its first response, or a text as a whole.

    A conversation of several turns and the pieces of it that other rows may hold, each cut after another response,
    ask the same, so that no piece of a held-out conversation is trained on.
    """
    if isinstance(example, Text):
        asked = "".join(piece for piece, trained in example.pieces if not trained)
        return _hash(asked or "".join(piece for piece, _ in example.pieces))
    messages = example.prompt if isinstance(example, Preference | Judged) else example.messages
    return _hash(_spoken(_asked_first(messages)))


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


def to_prompt(example: Example | Preference | Judged, task: str | None) -> Prompt:
    """The conversation before its last response as a prompt, with that response as the answer.

    Of compared answers the best is meant, and none where the only one is unwanted. An answer that begins with a turn of
    the user, or has more than one turn, is no reference for the next turn.
    """
    if not isinstance(example, Example):
        return _compared_prompt(example, task)
    last = _last_response(example.messages)
    return Prompt(example.messages[:last], example.messages[last].content, task, example.tools)


def asked_once(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts without those that ask again, word for word; of these the first with an answer stays."""
    kept: dict[str, Prompt] = {}
    for prompt in prompts:
        key = _hash(_spoken(prompt.messages))
        if key not in kept or (kept[key].answer is None and prompt.answer is not None):
            kept[key] = prompt
    return list(kept.values())


def choose_prompts(prompts: Sequence[Prompt], count: int, seed: int) -> list[Prompt]:
    """So many of the prompts, the families of tasks in turn, in an order decided by a hash with the seed."""
    by_task: dict[str, list[Prompt]] = defaultdict(list)
    asked = [prompt for prompt in prompts if prompt.answer != ""]  # a tool call alone is no answer to compare with
    for prompt in sorted(asked, key=lambda prompt: _hash([seed, _hash(_spoken(prompt.messages))])):
        by_task[prompt.task or ""].append(prompt)
    queues = [by_task[task] for task in sorted(by_task)]
    rounds = max((len(queue) for queue in queues), default=0)
    return [queue[turn] for turn in range(rounds) for queue in queues if turn < len(queue)][:count]


def _compared_prompt(example: Preference | Judged, task: str | None) -> Prompt:
    answers = answers_of(example)
    best = answers[0] if isinstance(example, Judged) else answers[example.ranks.index(min(example.ranks))]
    wanted = isinstance(example, Preference) or example.wanted
    messages = example.prompt
    while messages and messages[-1].role == "assistant":
        messages = messages[:-1]
    alone = wanted and len(best) == 1 and len(messages) == len(example.prompt)
    return Prompt(messages, best[0].content if alone else None, task, example.tools)


def _other_rows(
    path: str, splits: tuple[str, ...], train: Sequence[Source[Said]], data: DataSettings, dropped: Tally
) -> Kept[Said]:
    """The rows of an evaluation data set, without those that ask what a training row asks."""
    known = {prompt_key(source.example) for source in train}

    def new(sources: list[Source[Other]]) -> list[Source[Other]]:
        kept: list[Source[Other]] = []
        for source in sources:
            if prompt_key(source.example) in known:
                dropped.add("also_in_training", source.row, source.place)
            else:
                kept.append(source)
        return kept

    parts = [read_sources(path, split, data, dropped, Tally()) for split in splits]
    together = replace(
        parts[0],
        sources=new([source for rows in parts for source in rows.sources]),
        prompts=new([source for rows in parts for source in rows.prompts]),
        compared=new([source for rows in parts for source in rows.compared]),
    )
    count = len(together.sources) + len(together.prompts) + len(together.compared)
    if not count:
        raise ValueError(f"no row of evaluate.path={path} is left to evaluate on: {reasons(dropped)}")
    name = path if path != EMBEDDED else f"{path} ({', '.join(splits)})"
    return Kept([], together, f"{count:,} rows of {name}, none asking what a training row asks")


def reasons(dropped: Tally) -> str:
    """Why rows were dropped and where, in one line."""
    return "; ".join(f"{name} {finding.line()}" for name, finding in dropped.findings().items())


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
