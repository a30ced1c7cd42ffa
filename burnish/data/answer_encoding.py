"""Rows of compared answers into comparisons: each answer a sequence of its own, prompt included. Imports no torch."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations, islice
from typing import Literal, NamedTuple

from burnish.data.answers import Compared, Turns, answers_of, conversation
from burnish.data.audit import Tally
from burnish.data.chat import Encoded, encode_row, end_ids
from burnish.data.comparisons import Comparisons
from burnish.data.encoding import Progress, Responses
from burnish.data.holdout import ordered, prompt_key
from burnish.data.reading import Source
from burnish.data.templates import ChatTemplate, RefusedConversation
from burnish.data.tokenizer import Tokenizer
from burnish.settings import DataSettings
from burnish.types import Comparison, Judged, Preference
from burnish.types import Sequence as Ids

Kind = Literal["pairs", "labels"]

TRIES = 16
"""Answers to other prompts that are tried before a row counts as unmatched."""


class _Answered(NamedTuple):
    """A row, and the sequence of each of its answers."""

    source: Source[Compared]
    sequences: tuple[Ids, ...]


class ComparisonEncoder:
    """Tokenises rows of compared answers, and keeps count; a row that is too long goes as a whole."""

    def __init__(
        self, data: DataSettings, tokenizer: Tokenizer, template: ChatTemplate, dropped: Tally, budget: int
    ) -> None:
        self._data, self._tokenizer, self._template, self._dropped = data, tokenizer, template, dropped
        self._budget, self._ends = budget, end_ids(tokenizer, template)
        self.responses = Responses()
        self._longest = self._largest = 0

    def encode(
        self, sources: Sequence[Source[Compared]], kind: Kind, seed: int, progress: Progress | None = None
    ) -> Comparisons:
        """The comparisons of these rows: `pairs` of answers, or answers with `labels`.

        With labels, each answer has one beside it that was given to another prompt. The seed decides to which, once and
        for all, so no order of batches is needed to estimate the divergence from such answers.

        Raises ValueError for a template that cannot be used and, where the settings ask for it, for rows that are too
        long or have nothing to train on.
        """
        if self._template.source is None:
            raise ValueError(self._template.missing())
        answered = self._answered(sources, progress)
        comparisons = Comparisons.of(map(_pairs, answered) if kind == "pairs" else self._labelled(answered, seed))
        self._check()
        return comparisons

    def _answered(self, sources: Sequence[Source[Compared]], progress: Progress | None) -> Iterator[_Answered]:
        for source in sources:
            sequences = self._answers(source)
            if sequences is not None:
                yield _Answered(source, sequences)
            if progress:
                progress(1)

    def _answers(self, source: Source[Compared]) -> tuple[Ids, ...] | None:
        """The sequence of each answer; None for a row that is dropped."""
        reading = source.example
        try:
            encoded = [self._encode(reading, answer) for answer in answers_of(reading)]
        except RefusedConversation as refused:
            self._dropped.add("template_refused", source.row, source.place, str(refused))
            return None
        except ValueError as error:
            raise ValueError(f"{source.place}: {error}") from None
        if not all(any(part.weights) for part in encoded):
            self._dropped.add("untrained", source.row, source.place)
            return None
        sequences = tuple(_until_the_end(part, self._ends, source.row) for part in encoded)
        reason, told = self._unfit(reading, sequences)
        if reason:
            self._dropped.add(reason, source.row, source.place, told)
            return None
        for part in encoded:
            self.responses.add(part, source.row, source.place)
        return sequences

    def _encode(self, reading: Compared, answer: Turns) -> Encoded:
        last_only = self._data.train_on == "last_assistant"
        example = conversation(reading, answer, last_only)
        return encode_row(example, self._tokenizer, self._template, self._data.train_on)

    def _unfit(self, reading: Compared, sequences: tuple[Ids, ...]) -> tuple[str, str]:
        """Why a row cannot be used, and more about that; two empty texts when it can."""
        lengths, most = [len(sequence.ids) for sequence in sequences], self._data.max_length
        if max(lengths) > most:
            self._longest = max(self._longest, *lengths)
            prompt = max(next(k for k, weight in enumerate(s.weights) if weight) for s in sequences)
            if prompt >= most:
                return "prompt_too_long", f"{prompt} tokens, data.max_length is {most}"
            return "too_long", f"{max(lengths)} tokens, data.max_length is {most}"
        if sum(lengths) > self._budget:
            self._largest = max(self._largest, sum(lengths))
            return "over_budget", f"{sum(lengths)} tokens, a micro-batch takes {self._budget}"
        ranks = reading.ranks if isinstance(reading, Preference) else ()
        both = combinations(zip(ranks, sequences, strict=False), 2)
        return ("same_tokens", "") if any(a != b and x.ids == y.ids for (a, x), (b, y) in both) else ("", "")

    def _labelled(self, answered: Iterable[_Answered], seed: int) -> Iterator[Comparison]:
        """Each row's answers with their labels, and as many answers to other prompts with label 0."""
        sources: list[Source[Compared]] = []

        def own() -> Iterator[Comparison]:
            for source, sequences in answered:
                sources.append(source)
                yield Comparison(sequences)

        listed = Comparisons.of(own())
        ring = ordered([source.example for source in sources], seed)
        after = {place: number + 1 for number, place in enumerate(ring)}
        keys = [prompt_key(source.example) for source in sources]
        for place, (source, comparison) in enumerate(zip(sources, listed, strict=True)):
            following = (ring[(after[place] + k) % len(ring)] for k in range(len(ring) - 1))
            strangers = (sources[other].example for other in following if keys[other] != keys[place])
            mismatched = self._mismatched(source, comparison.sequences, islice(strangers, TRIES))
            if mismatched is None:
                self._dropped.add("unmatched", source.row, source.place)
            else:
                labels = (*_labels(source.example), *[0] * len(mismatched))
                yield Comparison((*comparison.sequences, *mismatched), (), labels)

    def _mismatched(
        self, source: Source[Compared], own: Sequence[Ids], strangers: Iterable[Compared]
    ) -> tuple[Ids, ...] | None:
        """The row's prompt with the answers of the first stranger that fits: one for each of the row's own answers."""
        room = self._budget - sum(len(sequence.ids) for sequence in own)
        for stranger in strangers:
            others = answers_of(stranger)
            chosen = [others[number % len(others)] for number in range(len(own))]
            try:
                encoded = [self._encode(source.example, answer) for answer in chosen]
            except ValueError:  # this prompt and that answer make no conversation that the template takes
                continue
            sequences = tuple(_until_the_end(part, self._ends, source.row) for part in encoded)
            lengths = [len(sequence.ids) for sequence in sequences]
            if max(lengths) <= self._data.max_length and sum(lengths) <= room:
                return sequences
        return None

    def _check(self) -> None:
        data, found = self._data, self._dropped
        if data.too_long == "error":
            for reason in ("prompt_too_long", "too_long"):
                if reason in found:
                    raise ValueError(
                        f"more tokens than data.max_length={data.max_length} in {found.finding(reason).line()}; "
                        f"write data.max_length={self._longest}, or data.too_long=drop"
                    )
            if "over_budget" in found:
                raise ValueError(
                    f"more tokens than a micro-batch of {self._budget} takes in {found.finding('over_budget').line()}; "
                    f"write run.microbatch_tokens={self._largest}, or data.too_long=drop"
                )
        if not data.allow_untrained and "untrained" in found:
            raise ValueError(
                f"an answer with nothing to train on (every weight is 0) in {found.finding('untrained').line()}; "
                "write data.allow_untrained=true to drop them"
            )


def _pairs(row: _Answered) -> Comparison:
    """The answers of a row in all pairs of which one is better."""
    reading = row.source.example
    assert isinstance(reading, Preference)
    places = list(enumerate(reading.ranks))
    pairs = [(a, b, reading.margin) for a, better in places for b, worse in places if better < worse]
    return Comparison(row.sequences, tuple(pairs))


def _labels(reading: Compared) -> tuple[int, ...]:
    if isinstance(reading, Judged):
        return (1 if reading.wanted else -1,)
    return tuple(1 if rank == min(reading.ranks) else -1 for rank in reading.ranks)


def _until_the_end(encoded: Encoded, ends: frozenset[int], row: int) -> Ids:
    """A sequence without what the template writes after the answer: it stops where generation would.

    That is the first end token of the last stretch that is trained, since some templates write more than one.
    """
    trained = [number for number, weight in enumerate(encoded.weights) if weight]
    last = trained[-1]
    for earlier in reversed(trained):
        if last - earlier > 1:
            break
        last = earlier
    stretch = range(last, trained[-1] + 1)
    count = next((number for number in stretch if encoded.ids[number] in ends), trained[-1]) + 1
    return Ids(tuple(encoded.ids[:count]), tuple(encoded.weights[:count]), row)
