"""Look at data before training on it: `audit` accounts for every row, `preview` shows which tokens are trained on.

Rows that compare answers are read as `burnish dpo` and `burnish reward` read them, prompts as `burnish ppo` does.
"""

import json
import os
import sys
from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

from pydantic import Field

from burnish.config import Settings
from burnish.data.audit import Audit
from burnish.data.comparisons import Comparisons
from burnish.data.formats import FORMATS
from burnish.data.preferences import prepare_preferences
from burnish.data.prepare import check_data, prepare
from burnish.data.prompts import prepare_prompts
from burnish.data.reading import format_of
from burnish.data.templates import ChatTemplate
from burnish.data.tokenizer import Tokenizer
from burnish.model.families import find_model
from burnish.settings import DataSettings, EvaluateSettings, ModelSettings
from burnish.types import Sequence

ACTIONS = ("audit", "preview")
NEIGHBOURS = 50
"""Rows read beyond those of a preview, where each is shown with the answer to another row's prompt."""
TRAINED, PLAIN = "\033[30;42m", "\033[0m"
"""Black on green, and back."""


class Config(Settings):
    """Which data, read with which model's tokenizer."""

    model: ModelSettings = ModelSettings.model_construct()
    data: DataSettings = DataSettings.model_construct()
    evaluate: EvaluateSettings = EvaluateSettings.model_construct()
    rows: int = Field(default=3, ge=1, description="preview: how many rows to show.")
    skip: int = Field(default=0, ge=0, description="preview: how many rows to pass over first.")
    seed: int = Field(default=0, ge=0, description="audit: decides which rows are held out, as run.seed does.")


class Shown(NamedTuple):
    """A sequence of a preview, and what it is among the answers to its prompt."""

    sequence: Sequence
    place: str = ""


def main(config: Config, action: str, as_json: bool) -> None:
    """Prints the audit or the preview."""
    check_data(config.data)
    tokenizer = Tokenizer.load(find_model(config.model.path, config.model.revision))
    template = ChatTemplate.open(config.model.template, tokenizer)
    if action == "audit":
        audit, _ = _prepared(config.data, config.evaluate, tokenizer, template, config.seed)
        print(json.dumps(audit.as_dict(), ensure_ascii=False) if as_json else "\n".join(audit.lines()))
        return
    # The first rows only: a preview of a large data set should not have to tokenise all of it.
    last = min(config.skip + config.rows, config.data.limit or sys.maxsize)
    more = NEIGHBOURS if FORMATS[format_of(config.data)].holds == "judged" else 0
    data = config.data.model_copy(update={"limit": last + more, "allow_untrained": True})
    audit, found = _prepared(data, EvaluateSettings(fraction=0.0), tokenizer, template, config.seed)
    shown = [part for part in found if config.skip <= part.sequence.row < last]
    if as_json:
        print(json.dumps({"rows": [_as_dict(part, tokenizer) for part in shown]}, ensure_ascii=False))
    else:
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        print("\n".join(_lines(audit, shown, tokenizer, colour)))


def _prepared(
    data: DataSettings, evaluate: EvaluateSettings, tokenizer: Tokenizer, template: ChatTemplate, seed: int
) -> tuple[Audit, Iterator[Shown]]:
    """The audit and the sequences of a data set, read as what it is: examples, compared answers or prompts."""
    kind = FORMATS[format_of(data)].holds
    if kind == "examples":
        prepared = prepare(data, evaluate, tokenizer, template, seed)
        return prepared.audit, map(Shown, prepared.train)
    if kind == "prompts":
        prompts = prepare_prompts(data, evaluate, tokenizer, template, seed, data.max_length - 1)
        return prompts.audit, map(Shown, prompts.tokens)
    compared = prepare_preferences(
        data, evaluate, tokenizer, template, seed, kind="pairs" if kind == "preferences" else "labels"
    )
    return compared.audit, _answers(compared.train)


def _answers(comparisons: Comparisons) -> Iterator[Shown]:
    """The answers of each comparison with their places, the best first."""
    for comparison in comparisons:
        if comparison.labels:
            names = {1: "wanted", -1: "unwanted", 0: "an answer to another prompt"}
            for sequence, label in zip(comparison.sequences, comparison.labels, strict=True):
                yield Shown(sequence, names[label])
            continue
        worse = [
            sum(better == number for better, _, _ in comparison.pairs) for number in range(len(comparison.sequences))
        ]
        names = {count: f"place {place + 1}" for place, count in enumerate(sorted(set(worse), reverse=True))}
        if len(worse) == 2:
            names = {1: "better", 0: "worse"}
        for number in sorted(range(len(worse)), key=lambda number: -worse[number]):
            yield Shown(comparison.sequences[number], names[worse[number]])


def parts(sequence: Sequence, tokenizer: Tokenizer) -> Iterator[tuple[str, float]]:
    """The sequence as text with special tokens visible, cut where the weight changes."""
    for weight, run in groupby(zip(sequence.ids, sequence.weights, strict=True), key=lambda pair: pair[1]):
        yield tokenizer.decode([id for id, _ in run], keep_special=True), weight


def _as_dict(part: Shown, tokenizer: Tokenizer) -> dict[str, Any]:
    sequence, place = part
    shown = [{"text": text, "weight": weight} for text, weight in parts(sequence, tokenizer)]
    trained = sum(weight > 0 for weight in sequence.weights)
    named = {"answer": place} if place else {}
    return {"row": sequence.row, **named, "tokens": len(sequence.ids), "trained": trained, "parts": shown}


def _lines(audit: Audit, shown: list[Shown], tokenizer: Tokenizer, colour: bool) -> Iterator[str]:
    yield f"{audit.source} {audit.reading}"
    yield f"template: {audit.template}; trained tokens are {_marked('like this', colour)}"
    for sequence, place in shown:
        trained = sum(weight > 0 for weight in sequence.weights)
        weights = sorted({weight for weight in sequence.weights if weight not in (0.0, 1.0)})
        own = f", weights {', '.join(f'{weight:g}' for weight in weights)}" if weights else ""
        which = f", {place}" if place else ""
        yield f"\n--- row {sequence.row}{which}: {len(sequence.ids)} tokens, {trained} trained{own}"
        yield "".join(_marked(text, colour) if weight > 0 else text for text, weight in parts(sequence, tokenizer))
    for name, finding in {**audit.dropped, **audit.repaired}.items():
        yield f"\n{'dropped' if name in audit.dropped else 'repaired'} {name}: {finding.line()}"


def _marked(text: str, colour: bool) -> str:
    if not colour:
        return f"«{text}»"
    # A background does not carry over a line break in every terminal.
    return "\n".join(f"{TRAINED}{line}{PLAIN}" for line in text.split("\n"))
