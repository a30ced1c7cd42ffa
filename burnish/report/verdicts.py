"""What models answered, side by side: accuracy by task, and samples to read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from burnish.report.units import decimal
from burnish.world import UNSEEN

LONGEST_TEXT = 1200
"""Characters of a prompt or an answer that the page shows."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model that the page speaks of: a base before training, or a run after it."""

    label: str
    style: str
    """The class of its colour."""
    verdict: dict[str, Any]


@dataclass(frozen=True, slots=True)
class TaskGroup:
    """Tasks under one heading, each with the accuracy of every model (None: not measured)."""

    title: str
    """Empty for the only group."""
    tasks: list[tuple[str, list[float | None]]]
    mean: list[float | None]
    """Over the tasks; None for a single task, and for a model that was not measured on all of them."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What one model answered to a prompt."""

    model: Model
    text: str
    correct: bool | None
    """None where there was nothing to compare it with."""
    reward: str = ""
    """What it was worth, where answers were scored."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt, the answer wanted, and what each model that was asked answered."""

    task: str | None
    prompt: str
    reference: str | None
    answers: list[Answer]


def task_groups(models: Sequence[Model]) -> list[TaskGroup]:
    """Accuracy by task, in two groups where the judge told families that were trained on from those that were not."""
    names = sorted({task for model in models for task in model.verdict.get("by_task") or {}})
    told_apart = any("eval_exact_match_unseen" in (model.verdict.get("metrics") or {}) for model in models)
    unseen = set(UNSEEN if told_apart else ())
    if not unseen & set(names):
        return [_group("", names, models)] if names else []
    seen = [task for task in names if task not in unseen]
    groups = [_group("Families seen in training", seen, models)] if seen else []
    return [*groups, _group("Families never seen in training", [task for task in names if task in unseen], models)]


def pair_samples(models: Sequence[Model]) -> list[Sample]:
    """The prompts of all verdicts, each once and in order, with the answers of every model that was asked."""
    answers: dict[tuple[str, str], list[Answer]] = {}
    first: dict[tuple[str, str], dict[str, Any]] = {}
    for model in models:
        for given in model.verdict.get("samples") or ():
            key = (str(given.get("task")), given["prompt"])
            first.setdefault(key, given)
            worth = given.get("reward")
            reward = "" if worth is None else decimal(worth, 2)
            answers.setdefault(key, []).append(Answer(model, clipped(given["answer"]), given["correct"], reward))
    return [
        Sample(
            given.get("task"),
            clipped(given["prompt"]),
            None if given.get("reference") is None else clipped(given["reference"]),
            answers[key],
        )
        for key, given in first.items()
    ]


def clipped(text: str, longest: int = LONGEST_TEXT) -> str:
    """A text cut to a length that can be read, which says how much is left out."""
    if len(text) <= longest:
        return text
    return f"{text[:longest]} … [{len(text) - longest:,} more characters]"


def _group(title: str, tasks: Sequence[str], models: Sequence[Model]) -> TaskGroup:
    by_task = [model.verdict.get("by_task") or {} for model in models]
    lines = [(task, [shares.get(task) for shares in by_task]) for task in tasks]
    mean: list[float | None] = []
    for shares in by_task:
        known = [shares[task] for task in tasks if task in shares]
        mean.append(sum(known) / len(known) if len(known) == len(tasks) > 1 else None)
    return TaskGroup(title, lines, mean)
