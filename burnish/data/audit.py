"""What happened to the data before step 0: every row accounted for, in numbers and in lines for a terminal.

Imports no torch.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy
from numpy.typing import NDArray
from pydantic import TypeAdapter

from burnish.data.answers import DROPS as ANSWER_DROPS
from burnish.data.comparisons import Comparisons
from burnish.data.corpus import Corpus
from burnish.data.repair import DROPS, REPAIRS

PLACES_SHOWN = 10
"""How many rows a finding names."""
PLAIN = "none (plain text)"
"""What the audit names as the template of data without conversations."""
BAR = 40
"""The width of the longest bar of the histogram."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that happened to rows: how often, to which first, and one of them to look at."""

    count: int
    rows: tuple[int, ...]
    """The first rows, counted from 0."""
    places: tuple[str, ...]
    """The same rows as file and line."""
    example: str = ""

    def line(self) -> str:
        """The count and the places, as in `3 rows: a.jsonl:4, a.jsonl:9, ...`."""
        more = ", ..." if self.count > len(self.places) else ""
        return f"{self.count} {'row' if self.count == 1 else 'rows'}: {', '.join(_short(self.places))}{more}"


MEANINGS = {
    **REPAIRS,
    **DROPS,
    **ANSWER_DROPS,
    "too_long": "more tokens than data.max_length",
    "untrained": "no token has a weight",
    "template_refused": "the chat template does not take such a conversation",
    "also_in_training": "a training row asks the same",
    "same_tokens": "two answers are the same tokens, and one is called better",
    "prompt_too_long": "the prompt leaves no room for an answer",
    "over_budget": "the answers together have more tokens than a micro-batch takes",
    "unmatched": "no answer to another prompt fits beside it",
}
"""What the names of findings mean."""


class Tally:
    """Findings by name, while they are being counted."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[list[int], list[str], list[str]]] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, row: int, place: str, example: str = "") -> None:
        """Count one row."""
        self._counts[name] = self._counts.get(name, 0) + 1
        rows, places, examples = self._found.setdefault(name, ([], [], []))
        if len(rows) < PLACES_SHOWN:
            rows.append(row)
            places.append(place)
        if example and not examples:
            examples.append(shortened(example))

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def findings(self) -> dict[str, Finding]:
        """Everything counted, the most frequent first."""
        names = sorted(self._counts, key=lambda name: -self._counts[name])
        return {name: self.finding(name) for name in names}

    def finding(self, name: str) -> Finding:
        """One name's count, 0 when nothing was counted."""
        rows, places, examples = self._found.get(name, ([], [], []))
        return Finding(self._counts.get(name, 0), tuple(rows), tuple(places), examples[0] if examples else "")


@dataclass(frozen=True, slots=True)
class Lengths:
    """How many tokens there are, in sequences of what length, and how well they pack."""

    sequences: int
    tokens: int
    trained: int
    """Tokens whose weight in the loss is not 0."""
    shortest: int
    longest: int
    mean: float
    histogram: tuple[tuple[int, int], ...]
    """(upper bound, sequences of at most so many tokens and more than the bound before)."""
    budget: int
    packs: int
    efficiency: float
    """The share of the packs' room that tokens fill."""

    @property
    def context(self) -> int:
        """Tokens that are read but not trained on."""
        return self.tokens - self.trained


LOPSIDED = 2 / 3
"""The share of pairs whose better answer is longer (or shorter) from which length alone may be what is learned."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What there is to say about compared answers; lengths are in trained tokens."""

    pairs: int
    margins: int
    """Pairs with a margin."""
    better_length: float
    """Of the better (or wanted) answers, on average."""
    worse_length: float
    longer: float
    """The share of pairs whose better answer is the longer one."""
    shorter: float
    stored: int
    """Tokens in batches, where shared prompts stand once."""
    wanted: int = 0
    unwanted: int = 0
    mismatched: int = 0
    """Answers to other prompts."""

    def lines(self, tokens: int) -> Iterator[str]:
        """The numbers for a terminal; `tokens` are those of all sequences, whole."""
        means = f"{self.better_length:,.1f} tokens on average, {self.worse_length:,.1f}"
        if self.pairs:
            some = f", {self.margins:,} with a margin" if self.margins else ""
            yield f"pairs       {self.pairs:,}{some}; better answers have {means} the others"
            yield f"            the better one is longer in {self.longer:.1%}, shorter in {self.shorter:.1%}"
        else:
            kinds = f"{self.wanted:,} wanted and {self.unwanted:,} unwanted"
            yield f"labels      {kinds} answers; {means} the unwanted ones"
            yield f"            {self.mismatched:,} answers to other prompts, for the estimate of the divergence"
        saved = 1 - self.stored / tokens if tokens else 0.0
        yield f"sharing     {self.stored:,} tokens where shared prompts stand once, {saved:.1%} fewer"

    def bias(self) -> Iterator[str]:
        """A remark when one glance at the lengths would tell better from worse."""
        longer, share = ("longer", self.longer) if self.longer > self.shorter else ("shorter", self.shorter)
        if self.pairs and share >= LOPSIDED:
            yield f"length bias: the better answer is {longer} in {share:.1%} of pairs, so length alone tells much"


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The rows kept for evaluation."""

    how: str
    """Where they come from, in words."""
    shared: bool = False
    """Whether they are a share of the rows of data.path."""
    rows: int = 0
    sequences: int = 0
    tokens: int = 0
    trained: int = 0
    prompts: int = 0
    dropped: Mapping[str, Finding] = field(default_factory=dict[str, Finding])


@dataclass(frozen=True, slots=True)
class Audit:
    """The account of a data set on its way into training."""

    source: str
    format: str
    reading: str
    template: str
    train_on: str
    rows_in: int
    rows_out: int
    """Rows of which something is trained on."""
    dropped: Mapping[str, Finding]
    repaired: Mapping[str, Finding]
    duplicates: Finding
    """Rows that repeat an earlier one word for word; they are kept."""
    split: Finding
    """Rows cut into several sequences because they were too long."""
    lengths: Lengths
    responses: int
    """Responses (or plain texts) that are trained on."""
    ended: int
    """Responses whose end token is trained."""
    end_tokens: tuple[str, ...]
    held_out: HeldOut
    notes: tuple[str, ...] = ()
    answers: Answers | None = None
    """Where answers are compared."""

    def as_dict(self) -> dict[str, Any]:
        """The audit as a JSON object."""
        tree = asdict(self)
        tree["lengths"]["context"] = self.lengths.context
        tree["ended_share"] = self.ended / self.responses if self.responses else 0.0
        return tree

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> "Audit":
        """The audit that `as_dict` wrote."""
        return TypeAdapter(cls).validate_python(tree)

    def lines(self) -> list[str]:
        """The audit for a terminal, at most some forty lines."""
        return list(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"data        {self.source}"
        yield f"            {self.reading}"
        dropped = total(self.dropped)
        kept = self.held_out.rows + total(self.held_out.dropped) if self.held_out.shared else 0
        sides = f"{self.rows_out:,} to train on + {kept:,} held out + {dropped:,} dropped"
        yield f"rows        {self.rows_in:,} in = {sides}"
        yield from _told("dropped", self.dropped)
        yield from _told("repaired", self.repaired)
        if self.split.count:
            yield f"  split     {self.split.line()}"
        if self.duplicates.count:
            yield f"  repeated  {self.duplicates.line()} (kept)"
        yield f"held out    {self.held_out.how}"
        yield from _told("dropped", self.held_out.dropped)
        yield from self._token_lines()
        yield from (f"note        {note}" for note in self.notes)

    def _token_lines(self) -> Iterator[str]:
        lengths = self.lengths
        share = lengths.trained / lengths.tokens if lengths.tokens else 0.0
        trained = f"{lengths.trained:,} trained on ({share:.1%})"
        yield f"tokens      {lengths.tokens:,} = {trained} + {lengths.context:,} context"
        if self.responses:
            ends = f"{self.ended / self.responses:.1%} end in {' or '.join(self.end_tokens) or 'an end token'}"
            what = "texts" if self.template == PLAIN else "answers" if self.answers else "responses"
            yield f"{what:<11} {self.responses:,} trained on ({self.train_on}), {ends}"
            yield f"template    {self.template}"
        if self.answers is not None:
            yield from self.answers.lines(lengths.tokens)
        spread = f"{lengths.shortest:,} to {lengths.longest:,} tokens, {lengths.mean:,.1f} on average"
        yield f"lengths     {spread}, {lengths.sequences:,} sequences"
        most = max((count for _, count in lengths.histogram), default=0)
        for bound, count in lengths.histogram:
            yield f"  <= {bound:<7,} {'#' * (-(-count * BAR // most)) or '.':<{BAR}} {count:,}"
        if lengths.budget:
            yield f"packing     {lengths.packs:,} packs of {lengths.budget:,} tokens, {lengths.efficiency:.1%} full"


def measure(corpus: Corpus, budget: int, packing: tuple[int, float]) -> Lengths:
    """The numbers about sequences and about their packing, as `efficiency` found it."""
    lengths = corpus.lengths
    if not len(lengths):
        return Lengths(0, 0, 0, 0, 0, 0.0, (), budget, 0, 1.0)
    return Lengths(
        sequences=len(lengths),
        tokens=len(corpus.ids),
        trained=int(numpy.count_nonzero(corpus.weights)),
        shortest=int(lengths.min()),
        longest=int(lengths.max()),
        mean=float(lengths.mean()),
        histogram=_histogram(lengths),
        budget=budget,
        packs=packing[0],
        efficiency=packing[1],
    )


def compare(comparisons: Comparisons) -> Answers:
    """The numbers about compared answers."""
    counted = numpy.concatenate([[0], numpy.cumsum(comparisons.sequences.weights > 0)])
    lengths = numpy.diff(counted[comparisons.sequences.starts]).astype(numpy.float64)
    pairs = comparisons.pairs + numpy.repeat(comparisons.units[:-1], numpy.diff(comparisons.pair_starts))[:, None]
    labels = comparisons.labels
    better, worse = (
        lengths[pairs[:, side]] if len(pairs) else lengths[: len(labels)][labels == label]
        for side, label in ((0, 1), (1, -1))
    )
    return Answers(
        pairs=len(pairs),
        margins=int(numpy.count_nonzero(comparisons.margins)),
        better_length=_mean(better),
        worse_length=_mean(worse),
        longer=_mean(better > worse) if len(pairs) else 0.0,
        shorter=_mean(better < worse) if len(pairs) else 0.0,
        stored=int(comparisons.sizes(share_prefix=True).sum()),
        wanted=int((labels == 1).sum()),
        unwanted=int((labels == -1).sum()),
        mismatched=int((labels == 0).sum()),
    )


def shortened(text: str, width: int = 100) -> str:
    """A text on one line, cut to a width."""
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 3]}..."


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else 0.0


def _histogram(lengths: NDArray[numpy.int64]) -> tuple[tuple[int, int], ...]:
    """Counts by powers of two, from the one that holds the shortest to the one that holds the longest; at most 12."""
    first = max(0, int(lengths.min() - 1).bit_length())
    last = max(first, int(lengths.max() - 1).bit_length())
    bounds = [2**power for power in range(max(first, last - 11), last + 1)]
    places = numpy.searchsorted(bounds, lengths)
    counts = numpy.bincount(places, minlength=len(bounds)).tolist()
    return tuple(zip(bounds, counts, strict=True))


def _short(places: tuple[str, ...]) -> list[str]:
    """Places without the file's name where it is that of the place before: `a.jsonl:4, :9`."""
    files = [place.rstrip("0123456789]").rstrip(":[") for place in places]
    return [
        place[len(file) :] if number and file == files[number - 1] else place
        for number, (place, file) in enumerate(zip(places, files, strict=True))
    ]


def _told(fate: str, findings: Mapping[str, Finding]) -> Iterator[str]:
    for name, finding in findings.items():
        yield f"  {fate:<9} {name}: {MEANINGS.get(name, name)}"
        yield f"            {finding.line()}" + (f' ("{finding.example}")' if finding.example else "")


def total(findings: Mapping[str, Finding]) -> int:
    """How many rows some findings are about, one finding to a row."""
    return sum(finding.count for finding in findings.values())
