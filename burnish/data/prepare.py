"""From settings to sequences: read, recognise, repair, hold out, tokenise, and account for every row.

Imports no torch.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from burnish.data import cache as stored_data
from burnish.data.audit import PLAIN, Audit, Finding, HeldOut, Tally, measure, total
from burnish.data.corpus import Corpus
from burnish.data.encoding import Encoder
from burnish.data.files import EMBEDDED, digest, has_split
from burnish.data.formats import check_format
from burnish.data.holdout import choose_held_out, choose_prompts, content_key, prompt_key, to_prompt
from burnish.data.packing import efficiency
from burnish.data.reading import Source, is_remote, joined, read_sources
from burnish.data.reading import check_data as check_data  # part of this module's interface
from burnish.data.templates import ChatTemplate
from burnish.data.tokenizer import Tokenizer
from burnish.settings import DataSettings, EvaluateSettings
from burnish.types import Example, Prompt, Text

EMBEDDED_HELD_OUT = ("held_out_seen", "held_out_unseen")
"""The splits of the embedded data that evaluation uses."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Prepared:
    """Data ready for a run, and the account of how it came about."""

    train: Corpus
    held_out: Corpus
    prompts: list[Prompt]
    audit: Audit
    cached: bool = False
    """Whether it was found on disk, tokenised before."""


@dataclass(frozen=True, slots=True)
class _Kept:
    """Rows held out, and where they come from."""

    sources: list[Source]
    prompts: list[Prompt]
    how: str
    shared: bool = False


def prepare(
    data: DataSettings,
    evaluate: EvaluateSettings,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    seed: int,
    cache: Path | None = None,
    budget: int | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Everything that training and evaluation read, with the audit of it.

    `cache` is the folder that keeps tokenised data (None: one in the user's cache folder); `budget` is the tokens of a
    micro-batch, for the packing in the audit (None: data.max_length); `progress` hears how many rows of how many are
    tokenised. Raises ValueError, in one line, for every kind of bad input.
    """
    check_format(data.format)
    folder = cache or stored_data.default_folder()
    budget = max(budget or 0, data.max_length)
    key = _key(data, evaluate, (tokenizer.fingerprint, template.fingerprint), seed, budget)
    found = stored_data.load(folder, key)
    if found is not None:
        return Prepared(*found, cached=True)
    made = _prepare(data, evaluate, (tokenizer, template), seed, budget, progress)
    problem = stored_data.store(folder, key, (made.train, made.held_out, made.prompts, made.audit))
    if problem:
        note = f"tokenised data could not be kept in {folder} ({problem}), so the next run tokenises again"
        return replace(made, audit=replace(made.audit, notes=(*made.audit.notes, note)))
    return made


def prepare_evaluation(
    data: DataSettings, tokenizer: Tokenizer, template: ChatTemplate, prompts: int, seed: int
) -> tuple[Corpus, list[Prompt]]:
    """All rows of a data set for evaluation alone: sequences, and so many prompts; the embedded data's held-out rows.

    Raises ValueError as `prepare` does.
    """
    dropped = Tally()
    splits = EMBEDDED_HELD_OUT if data.path == EMBEDDED and data.split == "train" else (data.split,)
    sources: list[Source] = []
    asked: list[Prompt] = []
    for split in splits:
        rows = read_sources(data.path, split, data, dropped, Tally(), data.format)
        sources += rows.sources
        asked += [prompt for _, _, prompt in rows.prompts]
    encoder = Encoder(data, tokenizer, template, dropped)
    encoder.encode(sources)
    if not encoder.rows and not asked:
        raise ValueError(f"no row of {joined(data.path)} is left to evaluate on: {_reasons(dropped)}")
    asked += [to_prompt(source.example, source.task) for source in sources if isinstance(source.example, Example)]
    return encoder.corpus(), choose_prompts(asked, prompts, seed)


def _prepare(
    data: DataSettings,
    evaluate: EvaluateSettings,
    text: tuple[Tokenizer, ChatTemplate],
    seed: int,
    budget: int,
    progress: Progress | None,
) -> Prepared:
    dropped, repaired, held_out_dropped = Tally(), Tally(), Tally()
    rows = read_sources(data.path, data.split, data, dropped, repaired, data.format)
    if rows.prompts:
        raise ValueError(f"{joined(data.path)} {rows.reading}: write it as evaluate.path instead")
    train, kept = _hold_out(rows.sources, data, evaluate, seed, held_out_dropped)
    step = _stepper(progress, len(train) + len(kept.sources))
    encoder = Encoder(data, *text, dropped)
    encoder.encode(train, step)
    if not encoder.rows:
        raise ValueError(f"no row of {joined(data.path)} is left to train on: {_reasons(dropped)}")
    evaluation = Encoder(data, *text, held_out_dropped)
    evaluation.encode(kept.sources, step)
    asked = [to_prompt(source.example, source.task) for source in kept.sources if isinstance(source.example, Example)]
    prompts = choose_prompts(asked + kept.prompts, evaluate.prompts, seed)
    trained, reserved = encoder.corpus(), evaluation.corpus()
    audit = Audit(
        source=joined(data.path),
        format=rows.format,
        reading=rows.reading,
        template=text[1].name if any(isinstance(s.example, Example) for s in train) else PLAIN,
        train_on=data.train_on,
        rows_in=rows.count,
        rows_out=encoder.rows,
        dropped=dropped.findings(),
        repaired=repaired.findings(),
        duplicates=_duplicates(train),
        split=encoder.changed.finding("split"),
        lengths=measure(trained, budget, efficiency(trained.lengths, budget)),
        responses=encoder.responses,
        ended=encoder.ended,
        end_tokens=tuple(text[0].token(id) for id in sorted(encoder.ends)),
        held_out=_described(kept, evaluation, reserved, len(prompts), held_out_dropped),
        notes=tuple(_notes(data, encoder, text[0], train)),
    )
    assert audit.rows_in == encoder.rows + total(audit.dropped) + (len(kept.sources) if kept.shared else 0)
    return Prepared(trained, reserved, prompts, audit)


def _hold_out(
    sources: list[Source], data: DataSettings, evaluate: EvaluateSettings, seed: int, dropped: Tally
) -> tuple[list[Source], _Kept]:
    """The rows to train on, and those held out: a data set of their own, or a share of these."""
    if data.path == EMBEDDED and evaluate.path in (None, EMBEDDED) and evaluate.fraction > 0:
        return sources, _other_rows(EMBEDDED, EMBEDDED_HELD_OUT, sources, data, dropped)
    if evaluate.path is not None:
        splits = _evaluation_split(evaluate.path, data.split)
        return sources, _other_rows(evaluate.path, splits, sources, data, dropped)
    chosen = choose_held_out([source.example for source in sources], evaluate.fraction, seed)
    if not chosen:
        return sources, _Kept([], [], f"nothing: evaluate.fraction={evaluate.fraction:g} of {len(sources)} rows")
    held = [source for place, source in enumerate(sources) if place in chosen]
    how = f"{len(held):,} of these rows, chosen by a hash with seed {seed}; rows that ask the same stay together"
    return [source for place, source in enumerate(sources) if place not in chosen], _Kept(held, [], how, shared=True)


def _other_rows(path: str, splits: tuple[str, ...], train: list[Source], data: DataSettings, dropped: Tally) -> _Kept:
    """The rows of an evaluation data set, without those that ask what a training row asks."""
    known = {prompt_key(source.example) for source in train}
    kept: list[Source] = []
    prompts: list[Prompt] = []
    for split in splits:
        rows = read_sources(path, split, data, dropped, Tally())
        for source in rows.sources:
            if prompt_key(source.example) in known:
                dropped.add("also_in_training", source.row, source.place)
            else:
                kept.append(source)
        for row, place, prompt in rows.prompts:
            if prompt_key(prompt) in known:
                dropped.add("also_in_training", row, place)
            else:
                prompts.append(prompt)
    if not kept and not prompts:
        raise ValueError(f"no row of evaluate.path={path} is left to evaluate on: {_reasons(dropped)}")
    name = path if path != EMBEDDED else f"{path} ({', '.join(splits)})"
    return _Kept(kept, prompts, f"{len(kept) + len(prompts):,} rows of {name}, none asking what a training row asks")


def _evaluation_split(path: str, split: str) -> tuple[str, ...]:
    """Which splits of evaluate.path to read: of a data set in several files its test split, else validation."""
    if path == EMBEDDED:
        return EMBEDDED_HELD_OUT
    if is_remote(path) or Path(path).is_dir():
        for name in ("test", "validation"):
            if has_split(path, name):
                return (name,)
    return (split,)


def _reasons(dropped: Tally) -> str:
    return "; ".join(f"{name} {finding.line()}" for name, finding in dropped.findings().items())


def _described(kept: _Kept, encoder: Encoder, corpus: Corpus, prompts: int, dropped: Tally) -> HeldOut:
    return HeldOut(
        how=kept.how,
        shared=kept.shared,
        rows=encoder.rows,
        sequences=len(corpus),
        tokens=len(corpus.ids),
        trained=int((corpus.weights > 0).sum()),
        prompts=prompts,
        dropped=dropped.findings(),
    )


def _duplicates(sources: Sequence[Source]) -> Finding:
    tally, seen = Tally(), set[str]()
    for source in sources:
        key = content_key(source.example)
        if key in seen:
            tally.add("duplicate", source.row, source.place)
        seen.add(key)
    return tally.finding("duplicate")


def _notes(data: DataSettings, encoder: Encoder, tokenizer: Tokenizer, sources: Sequence[Source]) -> Iterator[str]:
    """What a user should know besides the numbers."""
    ends = _names(tokenizer, encoder.ends)
    for remark, finding in encoder.changed.findings().items():
        if remark != "split":
            yield f"{finding.count} rows: {remark}"
    if encoder.ends_added:
        yield f"the template prints no end token after a response: {ends} was added to {encoder.ends_added} rows"
    if encoder.ends - tokenizer.end_ids:
        names = _names(tokenizer, encoder.ends - tokenizer.end_ids)
        yield f"responses end in {names}, not among the checkpoint's own end tokens: generation must stop there too"
    if encoder.responses > encoder.ended:
        open_ends = encoder.responses - encoder.ended
        yield f"{open_ends} responses are trained without an end token, as the template prints none there"
    if any(isinstance(source.example, Text) for source in sources):
        start = _names(tokenizer, [tokenizer.bos_id]) if tokenizer.adds_bos and tokenizer.bos_id is not None else ""
        yield f"plain texts: {f'{start} goes before and ' if start else ''}{ends} after each"
    if encoder.changed.finding("split").count:
        yield "split rows: every token is predicted once, but a continuation does not see what came before its piece"
    if encoder.idle_pieces:
        yield f"{encoder.idle_pieces} pieces of split rows held context alone and were left out"
    if ".txt" in joined(data.path):
        yield "a .txt file is one document for each paragraph between blank lines"


def _names(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    return " or ".join(tokenizer.token(id) for id in sorted(ids))


def _stepper(progress: Progress | None, rows: int) -> Callable[[int], None] | None:
    if progress is None:
        return None
    done = 0

    def step(more: int) -> None:
        nonlocal done
        done += more
        progress(done, rows)

    return step


def _key(data: DataSettings, evaluate: EvaluateSettings, texts: tuple[str, str], seed: int, budget: int) -> str:
    """The cache's name for what these settings lead to."""
    shared = evaluate.path is None and data.path != EMBEDDED
    held_out = None
    if evaluate.path is not None:
        held_out = digest(evaluate.path, _evaluation_split(evaluate.path, data.split)[0])
    return stored_data.key_of(
        {
            "data": data.model_dump(),
            "bytes": digest(data.path, data.split),
            "held_out": held_out,
            "evaluate": [evaluate.path, evaluate.fraction, evaluate.prompts],
            "seed": seed if shared or evaluate.prompts else None,
            "text": texts,
            "budget": budget,
        }
    )
