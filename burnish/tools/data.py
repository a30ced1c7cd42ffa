"""Look at data before training on it: `audit` accounts for every row, `preview` shows which tokens are trained on."""

import json
import os
import sys
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from pydantic import Field

from burnish.config import Settings
from burnish.data.prepare import Prepared, check_data, prepare
from burnish.data.templates import ChatTemplate
from burnish.data.tokenizer import Tokenizer
from burnish.model.families import find_model
from burnish.settings import DataSettings, EvaluateSettings, ModelSettings
from burnish.types import Sequence

ACTIONS = ("audit", "preview")
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


def main(config: Config, action: str, as_json: bool) -> None:
    """Prints the audit or the preview."""
    check_data(config.data)
    tokenizer = Tokenizer.load(find_model(config.model.path, config.model.revision))
    template = ChatTemplate.open(config.model.template, tokenizer)
    if action == "audit":
        audit = prepare(config.data, config.evaluate, tokenizer, template, config.seed).audit
        print(json.dumps(audit.as_dict(), ensure_ascii=False) if as_json else "\n".join(audit.lines()))
        return
    # The first rows only: a preview of a large data set should not have to tokenise all of it.
    last = min(config.skip + config.rows, config.data.limit or sys.maxsize)
    data = config.data.model_copy(update={"limit": last, "allow_untrained": True})
    found = prepare(data, EvaluateSettings(fraction=0.0), tokenizer, template, config.seed)
    shown = [sequence for sequence in found.train if sequence.row >= config.skip]
    if as_json:
        print(json.dumps({"rows": [_as_dict(sequence, tokenizer) for sequence in shown]}, ensure_ascii=False))
    else:
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        print("\n".join(_lines(found, shown, tokenizer, colour)))


def parts(sequence: Sequence, tokenizer: Tokenizer) -> Iterator[tuple[str, float]]:
    """The sequence as text with special tokens visible, cut where the weight changes."""
    for weight, run in groupby(zip(sequence.ids, sequence.weights, strict=True), key=lambda pair: pair[1]):
        yield tokenizer.decode([id for id, _ in run], keep_special=True), weight


def _as_dict(sequence: Sequence, tokenizer: Tokenizer) -> dict[str, Any]:
    shown = [{"text": text, "weight": weight} for text, weight in parts(sequence, tokenizer)]
    trained = sum(weight > 0 for weight in sequence.weights)
    return {"row": sequence.row, "tokens": len(sequence.ids), "trained": trained, "parts": shown}


def _lines(found: Prepared, shown: list[Sequence], tokenizer: Tokenizer, colour: bool) -> Iterator[str]:
    audit = found.audit
    yield f"{audit.source} {audit.reading}"
    yield f"template: {audit.template}; trained tokens are {_marked('like this', colour)}"
    for sequence in shown:
        trained = sum(weight > 0 for weight in sequence.weights)
        weights = sorted({weight for weight in sequence.weights if weight not in (0.0, 1.0)})
        own = f", weights {', '.join(f'{weight:g}' for weight in weights)}" if weights else ""
        yield f"\n--- row {sequence.row}: {len(sequence.ids)} tokens, {trained} trained{own}"
        yield "".join(_marked(text, colour) if weight > 0 else text for text, weight in parts(sequence, tokenizer))
    for name, finding in {**audit.dropped, **audit.repaired}.items():
        yield f"\n{'dropped' if name in audit.dropped else 'repaired'} {name}: {finding.line()}"


def _marked(text: str, colour: bool) -> str:
    if not colour:
        return f"«{text}»"
    # A background does not carry over a line break in every terminal.
    return "\n".join(f"{TRAINED}{line}{PLAIN}" for line in text.split("\n"))
