"""From settings to comparisons: rows that say which answers are wanted, read, held out, tokenised, accounted for.

Imports no torch.
"""

from burnish.data.answer_encoding import ComparisonEncoder, Kind
from burnish.data.answers import Compared
from burnish.data.audit import Audit, HeldOut, Tally, compare, measure, total
from burnish.data.cache import Prepared, default_folder, remembered
from burnish.data.comparisons import Comparisons
from burnish.data.files import EMBEDDED
from burnish.data.formats import FORMATS, belongs_elsewhere, check_format
from burnish.data.holdout import asked_once, choose_prompts, duplicates, hold_out, reasons, to_prompt
from burnish.data.packing import efficiency
from burnish.data.prepare import Progress, data_key, stepper
from burnish.data.reading import Rows, Source, joined, read_sources
from burnish.data.templates import ChatTemplate
from burnish.data.tokenizer import Tokenizer
from burnish.settings import DataSettings, EvaluateSettings
from burnish.types import Example, Preference, Prompt

PreparedPreferences = Prepared[Comparisons]

EMBEDDED_TRAIN = "preferences"
EMBEDDED_HELD_OUT = ("preferences_held_out",)
"""The splits of the embedded data that compare answers."""

WANTED = {
    "pairs": "pairs of answers of which one is better",
    "labels": "answers with labels, or pairs of a wanted and an unwanted one",
}


def prepare_preferences(
    data: DataSettings,
    evaluate: EvaluateSettings,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    seed: int,
    budget: int | None = None,
    progress: Progress | None = None,
    kind: Kind = "pairs",
) -> PreparedPreferences:
    """Everything that training on preferences and its evaluation read, with the audit of it.

    `pairs` are for reward models and DPO: ranked answers in all pairs. `labels` are for KTO: answers that are wanted or
    not, and pairs as one of each. `budget` is the tokens of a micro-batch, which no comparison may exceed (None: two
    of data.max_length). What was tokenised before comes from the cache.

    Raises ValueError, in one line, for every kind of bad input.
    """
    check_format(data.format)
    _check(data)
    if data.path == EMBEDDED and data.split == "train":
        data = data.model_copy(update={"split": EMBEDDED_TRAIN})
    most = budget or 2 * data.max_length
    key = data_key(kind, data, evaluate, (tokenizer.fingerprint, template.fingerprint), seed, most)
    return remembered(
        default_folder(),
        key,
        Comparisons,
        lambda: _prepare(data, evaluate, (tokenizer, template), seed, most, kind, progress),
    )


def _prepare(
    data: DataSettings,
    evaluate: EvaluateSettings,
    text: tuple[Tokenizer, ChatTemplate],
    seed: int,
    budget: int,
    kind: Kind,
    progress: Progress | None,
) -> PreparedPreferences:
    dropped, repaired, held_out_dropped = Tally(), Tally(), Tally()
    rows = read_sources(data.path, data.split, data, dropped, repaired, data.format)
    train, kept = hold_out(
        _comparable(rows, joined(data.path), kind), data, evaluate, seed, held_out_dropped, EMBEDDED_HELD_OUT
    )
    reserved, prompted = kept.sources, [to_prompt(source.example, source.task) for source in kept.sources]
    if kept.others is not None:
        reserved, prompted = _evaluated(kept.others, evaluate, kind)
    step = stepper(progress, len(train) + len(reserved))
    encoder = ComparisonEncoder(data, *text, dropped, budget)
    trained = encoder.encode(train, kind, seed, step)
    if not len(trained):
        raise ValueError(f"no row of {joined(data.path)} is left to train on: {reasons(dropped)}")
    scored = ComparisonEncoder(data, *text, held_out_dropped, budget).encode(reserved, kind, seed, step)
    prompts = choose_prompts(asked_once(prompted), evaluate.prompts, seed)
    sizes, answers = trained.sizes(share_prefix=True), compare(trained)
    audit = Audit(
        source=joined(data.path),
        format=rows.format,
        reading=rows.reading,
        template=text[1].name,
        train_on=data.train_on,
        rows_in=rows.count,
        rows_out=len(trained),
        dropped=dropped.findings(),
        repaired=repaired.findings(),
        duplicates=duplicates(train),
        split=Tally().finding("split"),
        lengths=measure(trained.sequences, budget, efficiency(sizes, budget)),
        responses=encoder.responses.count,
        ended=encoder.responses.ended,
        end_tokens=tuple(text[0].token(id) for id in sorted(encoder.responses.ends)),
        held_out=HeldOut(
            how=kept.how,
            shared=kept.others is None,
            rows=len(scored),
            sequences=len(scored.sequences),
            tokens=len(scored.sequences.ids),
            trained=int((scored.sequences.weights > 0).sum()),
            prompts=len(prompts),
            dropped=held_out_dropped.findings(),
        ),
        notes=(*encoder.responses.notes(text[0]), *answers.bias()),
        answers=answers,
    )
    assert audit.rows_in == len(trained) + total(audit.dropped) + len(kept.sources)
    return Prepared(trained, scored, prompts, audit)


def _check(data: DataSettings) -> None:
    """Raises ValueError for settings that make no sense where answers are compared."""
    if data.too_long == "split":
        raise ValueError("data.too_long=split would cut answers that are compared: write data.too_long=drop or error")
    if data.train_on == "everything":
        raise ValueError(
            "data.train_on=everything: where answers are compared, prompts are not trained on; write "
            "data.train_on=all_assistant or last_assistant"
        )


def _comparable(rows: Rows, source: str, kind: Kind) -> list[Source[Compared]]:
    """The rows that compare answers. Raises ValueError when they do not, or not in the way that is needed."""
    held = FORMATS[rows.format].holds
    if held != "preferences" and (held != "judged" or kind == "pairs"):
        raise ValueError(belongs_elsewhere(source, rows.format, WANTED[kind]))
    for row in rows.compared if kind == "labels" else ():
        if isinstance(row.example, Preference) and len(row.example.answers) > 2:
            raise ValueError(
                f"{row.place}: {len(row.example.answers)} ranked answers do not say which of them are wanted: write "
                "rows of `prompt`, `completion` and `label`"
            )
    return rows.compared


def _evaluated(others: Rows, evaluate: EvaluateSettings, kind: Kind) -> tuple[list[Source[Compared]], list[Prompt]]:
    """The comparisons and the prompts of evaluate.path, which may hold prompts or examples alone."""
    compares = FORMATS[others.format].compares
    compared = _comparable(others, f"evaluate.path={evaluate.path}", kind) if compares else []
    asked = [to_prompt(source.example, source.task) for source in compared]
    asked += [to_prompt(row.example, row.task) for row in others.sources if isinstance(row.example, Example)]
    return compared, asked + [source.example for source in others.prompts]
