"""Rows into sequences, with the policy for rows that are too long or have nothing to train on. Imports no torch."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from burnish.data.audit import Tally
from burnish.data.chat import Encoded, encode_row
from burnish.data.corpus import Corpus, CorpusBuilder
from burnish.data.reading import Source
from burnish.data.templates import ChatTemplate, RefusedConversation
from burnish.data.tokenizer import Tokenizer
from burnish.settings import DataSettings
from burnish.types import Example, Text

Progress = Callable[[int], None]


class Responses:
    """What there is to say about the responses that are trained on."""

    def __init__(self) -> None:
        self.count = self.ended = self.ends_added = 0
        self.ends: set[int] = set()
        self.remarks = Tally()

    def add(self, encoded: Encoded, row: int, place: str) -> None:
        """Count those of one row."""
        self.count += encoded.responses
        self.ended += len(encoded.ends)
        self.ends_added += encoded.end_added
        self.ends.update(encoded.ends)
        for remark in encoded.remarks:
            self.remarks.add(remark, row, place)

    def notes(self, tokenizer: Tokenizer) -> Iterator[str]:
        """What a user should know about them besides the numbers."""
        for remark, finding in self.remarks.findings().items():
            yield f"{finding.count} rows: {remark}"
        if self.ends_added:
            ends = token_names(tokenizer, self.ends)
            yield f"the template prints no end token after a response: {ends} was added to {self.ends_added} rows"
        if self.ends - tokenizer.end_ids:
            names = token_names(tokenizer, self.ends - tokenizer.end_ids)
            yield f"responses end in {names}, not among the checkpoint's own end tokens: generation must stop there too"
        if self.count > self.ended:
            open_ends = self.count - self.ended
            yield f"{open_ends} responses are trained without an end token, as the template prints none there"


def token_names(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """Tokens by name, in one line."""
    return " or ".join(tokenizer.token(id) for id in sorted(ids))


class Encoder:
    """Tokenises rows one after the other, and keeps count."""

    def __init__(self, data: DataSettings, tokenizer: Tokenizer, template: ChatTemplate, dropped: Tally) -> None:
        self._data, self._tokenizer, self._template, self._dropped = data, tokenizer, template, dropped
        self._built = CorpusBuilder()
        self.responses = Responses()
        self.split = Tally()
        """Rows that were cut into pieces."""
        self.rows = self.idle_pieces = 0
        self._longest = 0

    def encode(self, sources: Sequence[Source[Example | Text]], progress: Progress | None = None) -> None:
        """Tokenise these rows.

        Raises ValueError for a template that cannot be used and, where the settings ask for it, for rows that are too
        long or have nothing to train on.
        """
        if self._template.source is None and any(isinstance(source.example, Example) for source in sources):
            raise ValueError(self._template.missing())
        for source in sources:
            self._encode(source)
            if progress:
                progress(1)
        self._check()

    def corpus(self) -> Corpus:
        """The sequences so far."""
        return self._built.corpus()

    def _encode(self, source: Source[Example | Text]) -> None:
        try:
            encoded = encode_row(source.example, self._tokenizer, self._template, self._data.train_on)
        except RefusedConversation as refused:
            self._dropped.add("template_refused", source.row, source.place, str(refused))
            return
        except ValueError as error:
            raise ValueError(f"{source.place}: {error}") from None
        if not any(encoded.weights):
            self._dropped.add("untrained", source.row, source.place)
            return
        if self._add(source, encoded):
            self.rows += 1
            self.responses.add(encoded, source.row, source.place)

    def _add(self, source: Source[Example | Text], encoded: Encoded) -> bool:
        """Put a row among the sequences as the policy for long ones has it; whether any of it went in."""
        length, most = len(encoded.ids), self._data.max_length
        if length <= most:
            self._built.append(encoded.ids, encoded.weights, source.row)
            return True
        self._longest = max(self._longest, length)
        if self._data.too_long != "split":
            self._dropped.add("too_long", source.row, source.place, f"{length} tokens, data.max_length is {most}")
            return False
        self.split.add("split", source.row, source.place)
        # A piece starts with the last token of the one before, so that every token but the first is predicted once.
        for start in range(0, length - 1, most - 1):
            ids, weights = encoded.ids[start : start + most], encoded.weights[start : start + most]
            weights[0] = 0.0
            if any(weights):
                self._built.append(ids, weights, source.row)
            else:
                self.idle_pieces += 1
        return True

    def _check(self) -> None:
        data = self._data
        if data.too_long == "error" and "too_long" in self._dropped:
            raise ValueError(
                f"more tokens than data.max_length={data.max_length} in {self._dropped.finding('too_long').line()}; "
                f"write data.max_length={self._longest}, or data.too_long=drop or split"
            )
        if not data.allow_untrained and "untrained" in self._dropped:
            raise ValueError(
                f"nothing to train on with data.train_on={data.train_on} (every weight is 0) in "
                f"{self._dropped.finding('untrained').line()}; write data.allow_untrained=true to drop them"
            )
