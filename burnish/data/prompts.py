"""Prompts for reinforcement learning, out of rows of any format, and the order in which a run sees them.

Imports no torch.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy
from numpy.typing import NDArray

from burnish.data.audit import Audit, HeldOut, Tally, measure, total
from burnish.data.chat import prompt_ids
from burnish.data.corpus import Corpus
from burnish.data.files import EMBEDDED
from burnish.data.formats import check_format
from burnish.data.holdout import choose_prompts, duplicates, hold_out, reasons, to_prompt
from burnish.data.prepare import EMBEDDED_HELD_OUT
from burnish.data.reading import Rows, Source, joined, read_sources
from burnish.data.templates import ChatTemplate, RefusedConversation
from burnish.data.tokenizer import Tokenizer
from burnish.settings import DataSettings, EvaluateSettings
from burnish.types import Message, Prompt, Text
from burnish.types import Sequence as Ids

EMBEDDED_TRAIN = "prompts"
"""The split of the embedded data that asks without answering."""


@dataclass(frozen=True, slots=True)
class PreparedPrompts:
    """Prompts ready for a run, and the account of how they came about."""

    train: list[Prompt]
    held_out: list[Prompt]
    """The families of tasks in turn, so that the first of them are a fair sample."""
    audit: Audit
    tokens: Corpus
    """The prompts of `train` as the model reads them, for previews."""


def prepare_prompts(
    data: DataSettings,
    evaluate: EvaluateSettings,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    seed: int,
    max_prompt_tokens: int,
) -> PreparedPrompts:
    """What the policy is to answer, and what is held out of it, with the audit.

    A conversation is cut before its last response, which becomes the reference answer; of compared answers the best is
    the reference. Prompts of more than `max_prompt_tokens` are dropped, or an error with data.too_long=error.

    Raises ValueError, in one line, for every kind of bad input.
    """
    check_format(data.format)
    if max_prompt_tokens < 1:
        raise ValueError("the longest answer leaves no room for a prompt: write a larger data.max_length")
    if data.path == EMBEDDED and data.split == "train":
        data = data.model_copy(update={"split": EMBEDDED_TRAIN})
    if template.source is None:
        raise ValueError(template.missing())
    dropped, repaired, held_out_dropped = Tally(), Tally(), Tally()
    rows = read_sources(data.path, data.split, data, dropped, repaired, data.format)
    asked, kept = hold_out(_prompts_of(rows), data, evaluate, seed, held_out_dropped, EMBEDDED_HELD_OUT)
    reserved = kept.sources if kept.others is None else _prompts_of(kept.others)
    room = _Room(data, tokenizer, template, max_prompt_tokens)
    train, tokens = room.fitting(asked, dropped)
    if not train:
        raise ValueError(f"no row of {joined(data.path)} is left to answer: {reasons(dropped)}")
    evaluated, scored = room.fitting(reserved, held_out_dropped)
    held_out = choose_prompts([source.example for source in evaluated], len(evaluated), seed)
    audit = Audit(
        source=joined(data.path),
        format=rows.format,
        reading=rows.reading,
        template=template.name,
        train_on="answers that the policy will write",
        rows_in=rows.count,
        rows_out=len(train),
        dropped=dropped.findings(),
        repaired=repaired.findings(),
        duplicates=duplicates(train),
        split=Tally().finding("split"),
        lengths=measure(tokens, 0, (0, 1.0)),
        responses=0,
        ended=0,
        end_tokens=(),
        held_out=HeldOut(
            how=kept.how,
            shared=kept.others is None,
            rows=len(evaluated),
            sequences=len(evaluated),
            tokens=len(scored.ids),
            prompts=len(held_out),
            dropped=held_out_dropped.findings(),
        ),
        notes=(f"{sum(source.example.answer is not None for source in train):,} prompts have a reference answer",),
    )
    assert audit.rows_in == len(train) + total(audit.dropped) + len(kept.sources)
    return PreparedPrompts([source.example for source in train], held_out, audit, tokens)


class PromptStream:
    """The prompts of each step, epoch after epoch, each in an order of its own.

    What a step holds depends on its number alone. Epochs run into each other: the step in which one ends takes the
    rest of its prompts from the next.
    """

    def __init__(self, prompts: Sequence[Prompt], per_step: int, seed: int, rank: int = 0, world: int = 1) -> None:
        assert 0 <= rank < world
        if not prompts:
            raise ValueError("there are no prompts to train on")
        if per_step < world:
            raise ValueError(f"rollout.prompts={per_step} is less than one for each of {world} ranks")
        self._prompts, self._per_step, self._seed = prompts, per_step, seed
        self._rank, self._world = rank, world
        self._epoch: tuple[int, NDArray[numpy.int64]] | None = None

    def steps_in(self, epochs: float) -> int:
        """Steps until so many passes over the prompts are complete."""
        return math.ceil(epochs * len(self._prompts) / self._per_step)

    @property
    def fingerprint(self) -> str:
        """A name for everything that decides what a step holds: the prompts, how many a step takes, the seed."""
        known = hashlib.sha256(f"{self._seed} {self._per_step}".encode())
        for prompt in self._prompts:
            known.update(json.dumps(asdict(prompt), sort_keys=True, default=str).encode())
        return known.hexdigest()[:16]

    def step(self, index: int) -> list[tuple[int, Prompt]]:
        """This rank's prompts at a step, counted from 0, each with its number in the data."""
        first = index * self._per_step
        numbers = [self._number(place) for place in range(first + self._rank, first + self._per_step, self._world)]
        return [(number, self._prompts[number]) for number in numbers]

    def _number(self, place: int) -> int:
        epoch, number = divmod(place, len(self._prompts))
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, numpy.random.default_rng((self._seed, epoch)).permutation(len(self._prompts))
        return int(self._epoch[1][number])


class _Room:
    """Tells prompts that leave room for an answer from those that do not."""

    def __init__(self, data: DataSettings, tokenizer: Tokenizer, template: ChatTemplate, most: int) -> None:
        self._data, self._tokenizer, self._template, self._most = data, tokenizer, template, most

    def fitting(self, sources: Sequence[Source[Prompt]], dropped: Tally) -> tuple[list[Source[Prompt]], Corpus]:
        """The prompts that fit, and their tokens. Raises ValueError where the settings ask for it."""
        fitting: list[Source[Prompt]] = []
        tokens: list[Ids] = []
        for source in sources:
            prompt = source.example
            try:
                ids = prompt_ids(prompt.messages, self._tokenizer, self._template, prompt.tools)
            except RefusedConversation as refused:
                dropped.add("template_refused", source.row, source.place, str(refused))
                continue
            except ValueError as error:
                raise ValueError(f"{source.place}: {error}") from None
            if len(ids) > self._most:
                told = f"{len(ids)} tokens, {self._most} leave room for an answer"
                dropped.add("prompt_too_long", source.row, source.place, told)
            else:
                fitting.append(source)
                tokens.append(Ids(tuple(ids), (0.0,) * len(ids), source.row))
        if self._data.too_long == "error" and "prompt_too_long" in dropped:
            raise ValueError(
                f"more than {self._most} tokens, which leave no room for an answer, in "
                f"{dropped.finding('prompt_too_long').line()}; write a larger data.max_length, or data.too_long=drop"
            )
        return fitting, Corpus.of(tokens)


def _prompts_of(rows: Rows) -> list[Source[Prompt]]:
    """What each row asks, in the order of the file. Raises ValueError for plain text, which asks nothing."""
    asked = list(rows.prompts)
    for source in rows.sources:
        said = source.example
        prompt = (
            to_prompt(said, source.task)
            if not isinstance(said, Text)
            else _text_prompt(said, source.place, source.task)
        )
        asked.append(Source(source.row, source.place, prompt, source.task))
    asked += [Source(row.row, row.place, to_prompt(row.example, row.task), row.task) for row in rows.compared]
    return sorted(asked, key=lambda source: source.row)


def _text_prompt(text: Text, place: str, task: str | None) -> Prompt:
    asked = "".join(piece for piece, trained in text.pieces if not trained).strip()
    if not asked:
        raise ValueError(f"{place}: text asks nothing that could be answered: write rows with a `prompt` column")
    answer = "".join(piece for piece, trained in text.pieces if trained).strip()
    return Prompt((Message("user", asked),), answer, task)
