"""From settings to sequences: read, recognise, repair, hold out, tokenise, and account for every row.

Imports no torch.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from burnish.data.audit import PLAIN, Audit, HeldOut, Tally, measure, total
from burnish.data.cache import Prepared as Prepared  # part of this module's interface
from burnish.data.cache import default_folder, key_of, remembered
from burnish.data.corpus import Corpus
from burnish.data.encoding import Encoder, token_names
from burnish.data.files import EMBEDDED, digest
from burnish.data.formats import FORMATS, belongs_elsewhere, check_format
from burnish.data.holdout import Kept, choose_prompts, duplicates, evaluation_split, hold_out, reasons, to_prompt
from burnish.data.packing import efficiency
from burnish.data.reading import Source, joined, read_sources
from burnish.data.reading import check_data as check_data  # part of this module's interface
from burnish.data.templates import ChatTemplate
from burnish.data.tokenizer import Tokenizer
from burnish.settings import DataSettings, EvaluateSettings
from burnish.types import Example, Prompt, Text

EMBEDDED_HELD_OUT = ("held_out_seen", "held_out_unseen")
"""The splits of the embedded data that evaluation uses."""

Progress = Callable[[int, int], None]


def prepare(
    data: DataSettings,
    evaluate: EvaluateSettings,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    seed: int,
    cache: Path | None = None,
    budget: int | None = None,
    progress: Progress | None = None,
) -> Prepared[Corpus]:
    """Everything that training and evaluation read, with the audit of it.

    `cache` is the folder that keeps tokenised data (None: one in the user's cache folder); `budget` is the tokens of a
    micro-batch, for the packing in the audit (None: data.max_length); `progress` hears how many rows of how many are
    tokenised. Raises ValueError, in one line, for every kind of bad input.
    """
    check_format(data.format)
    budget = max(budget or 0, data.max_length)
    key = data_key("examples", data, evaluate, (tokenizer.fingerprint, template.fingerprint), seed, budget)
    return remembered(
        cache or default_folder(),
        key,
        Corpus,
        lambda: _prepare(data, evaluate, (tokenizer, template), seed, budget, progress),
    )


def prepare_evaluation(
    data: DataSettings, tokenizer: Tokenizer, template: ChatTemplate, prompts: int, seed: int
) -> tuple[Corpus, list[Prompt]]:
    """All rows of a data set for evaluation alone: sequences, and so many prompts; the embedded data's held-out rows.

    Raises ValueError as `prepare` does.
    """
    dropped = Tally()
    splits = EMBEDDED_HELD_OUT if data.path == EMBEDDED and data.split == "train" else (data.split,)
    sources: list[Source[Example | Text]] = []
    asked: list[Prompt] = []
    for split in splits:
        rows = read_sources(data.path, split, data, dropped, Tally(), data.format)
        if FORMATS[rows.format].compares:
            raise ValueError(belongs_elsewhere(joined(data.path), rows.format, "conversations or text to score"))
        sources += rows.sources
        asked += [source.example for source in rows.prompts]
    encoder = Encoder(data, tokenizer, template, dropped)
    encoder.encode(sources)
    if not encoder.rows and not asked:
        raise ValueError(f"no row of {joined(data.path)} is left to evaluate on: {reasons(dropped)}")
    asked += [to_prompt(source.example, source.task) for source in sources if isinstance(source.example, Example)]
    return encoder.corpus(), choose_prompts(asked, prompts, seed)


def _prepare(
    data: DataSettings,
    evaluate: EvaluateSettings,
    text: tuple[Tokenizer, ChatTemplate],
    seed: int,
    budget: int,
    progress: Progress | None,
) -> Prepared[Corpus]:
    dropped, repaired, held_out_dropped = Tally(), Tally(), Tally()
    rows = read_sources(data.path, data.split, data, dropped, repaired, data.format)
    if FORMATS[rows.format].holds != "examples":
        raise ValueError(belongs_elsewhere(joined(data.path), rows.format, "examples to learn from"))
    train, kept = hold_out(rows.sources, data, evaluate, seed, held_out_dropped, EMBEDDED_HELD_OUT)
    reserved, prompted = _evaluated(kept, evaluate)
    step = stepper(progress, len(train) + len(reserved))
    encoder = Encoder(data, *text, dropped)
    encoder.encode(train, step)
    if not encoder.rows:
        raise ValueError(f"no row of {joined(data.path)} is left to train on: {reasons(dropped)}")
    evaluation = Encoder(data, *text, held_out_dropped)
    evaluation.encode(reserved, step)
    asked = [to_prompt(source.example, source.task) for source in reserved if isinstance(source.example, Example)]
    prompts = choose_prompts(asked + prompted, evaluate.prompts, seed)
    trained, scored = encoder.corpus(), evaluation.corpus()
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
        duplicates=duplicates(train),
        split=encoder.split.finding("split"),
        lengths=measure(trained, budget, efficiency(trained.lengths, budget)),
        responses=encoder.responses.count,
        ended=encoder.responses.ended,
        end_tokens=tuple(text[0].token(id) for id in sorted(encoder.responses.ends)),
        held_out=HeldOut(
            how=kept.how,
            shared=kept.others is None,
            rows=evaluation.rows,
            sequences=len(scored),
            tokens=len(scored.ids),
            trained=int((scored.weights > 0).sum()),
            prompts=len(prompts),
            dropped=held_out_dropped.findings(),
        ),
        notes=tuple(_notes(data, encoder, text[0], train)),
    )
    assert audit.rows_in == encoder.rows + total(audit.dropped) + len(kept.sources)
    return Prepared(trained, scored, prompts, audit)


def _evaluated(
    kept: Kept[Example | Text], evaluate: EvaluateSettings
) -> tuple[list[Source[Example | Text]], list[Prompt]]:
    """The rows to score and the prompts among what is held out. Raises ValueError for rows of compared answers."""
    others = kept.others
    if others is None:
        return kept.sources, []
    if FORMATS[others.format].compares:
        raise ValueError(belongs_elsewhere(f"evaluate.path={evaluate.path}", others.format, "examples or prompts"))
    return others.sources, [source.example for source in others.prompts]


def _notes(
    data: DataSettings, encoder: Encoder, tokenizer: Tokenizer, sources: Sequence[Source[Example | Text]]
) -> Iterator[str]:
    """What a user should know besides the numbers."""
    yield from encoder.responses.notes(tokenizer)
    if any(isinstance(source.example, Text) for source in sources):
        start = (
            token_names(tokenizer, [tokenizer.bos_id]) if tokenizer.adds_bos and tokenizer.bos_id is not None else ""
        )
        ends = token_names(tokenizer, encoder.responses.ends)
        yield f"plain texts: {f'{start} goes before and ' if start else ''}{ends} after each"
    if encoder.split.finding("split").count:
        yield "split rows: every token is predicted once, but a continuation does not see what came before its piece"
    if encoder.idle_pieces:
        yield f"{encoder.idle_pieces} pieces of split rows held context alone and were left out"
    if ".txt" in joined(data.path):
        yield "a .txt file is one document for each paragraph between blank lines"


def stepper(progress: Progress | None, rows: int) -> Callable[[int], None] | None:
    """What counts rows on the way to so many, and tells `progress`."""
    if progress is None:
        return None
    done = 0

    def step(more: int) -> None:
        nonlocal done
        done += more
        progress(done, rows)

    return step


def data_key(
    kind: str, data: DataSettings, evaluate: EvaluateSettings, texts: tuple[str, str], seed: int, budget: int
) -> str:
    """The cache's name for what these settings lead to, by what is read and as what."""
    held_out = None
    if evaluate.path is not None:
        held_out = digest(evaluate.path, evaluation_split(evaluate.path, data.split, (data.split,))[0])
    # Rows of embedded data are held out by split, so a seed decides nothing about examples unless prompts are chosen.
    decides = kind != "examples" or data.path != EMBEDDED or evaluate.prompts
    return key_of(
        {
            "kind": kind,
            "data": data.model_dump(),
            "bytes": digest(data.path, data.split),
            "held_out": held_out,
            "evaluate": [evaluate.path, evaluate.fraction, evaluate.prompts],
            "seed": seed if decides else None,
            "text": texts,
            "budget": budget,
        }
    )
