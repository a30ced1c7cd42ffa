"""Many comparisons in arrays, and how much of a prompt their answers share. Imports no torch."""

from array import array
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Listed
from functools import cached_property
from itertools import chain, pairwise
from typing import Any, overload

import numpy
from numpy.typing import NDArray

from burnish.data.corpus import Corpus, CorpusBuilder
from burnish.types import Comparison


class Comparisons(Listed[Comparison]):
    """A read-only list of comparisons; each is built when it is asked for."""

    def __init__(
        self,
        sequences: Corpus,
        units: NDArray[numpy.int64],
        pairs: NDArray[numpy.int32],
        pair_starts: NDArray[numpy.int64],
        margins: NDArray[numpy.float32],
        labels: NDArray[numpy.int8],
    ) -> None:
        assert units[-1] == len(sequences)
        assert pair_starts[-1] == len(pairs) == len(margins)
        assert len(labels) in (0, len(sequences))
        self.sequences = sequences
        """All answers of all comparisons, prompts included in each."""
        self.units, self.pairs, self.pair_starts, self.margins, self.labels = units, pairs, pair_starts, margins, labels

    @classmethod
    def of(cls, comparisons: Iterable[Comparison]) -> "Comparisons":
        """The same comparisons, packed into arrays."""
        if isinstance(comparisons, Comparisons):
            return comparisons
        units, pair_starts, margins, labels = array("q", [0]), array("q", [0]), array("f"), array("b")
        built, pairs = CorpusBuilder(), array("i")
        for comparison in comparisons:
            for sequence in comparison.sequences:
                built.append(sequence.ids, sequence.weights, sequence.row)
            units.append(len(built))
            for better, worse, margin in comparison.pairs:
                pairs.extend((better, worse))
                margins.append(margin)
            pair_starts.append(len(margins))
            labels.extend(comparison.labels)
        return cls(
            built.corpus(),
            numpy.array(units, numpy.int64),
            numpy.array(pairs, numpy.int32).reshape(-1, 2),
            numpy.array(pair_starts, numpy.int64),
            numpy.array(margins, numpy.float32),
            numpy.array(labels, numpy.int8),
        )

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays by name."""
        own = {name: getattr(self, name) for name in ("units", "pairs", "pair_starts", "margins", "labels")}
        return {**own, **self.sequences.arrays()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> "Comparisons":
        """The comparisons that these arrays are."""
        own = (arrays[name] for name in ("units", "pairs", "pair_starts", "margins", "labels"))
        return cls(Corpus.from_arrays(arrays), *own)

    @cached_property
    def shared(self) -> NDArray[numpy.int64]:
        """How many tokens each sequence begins with that can be left out, as they stand in the first of its unit."""
        return _shared(self.sequences, self.units)

    @property
    def lengths(self) -> NDArray[numpy.int64]:
        """Tokens in each comparison, all its sequences together."""
        return self.sizes(share_prefix=False)

    @property
    def longest(self) -> int:
        """Tokens in the longest sequence of all."""
        return int(self.sequences.lengths.max(initial=0))

    def sizes(self, share_prefix: bool) -> NDArray[numpy.int64]:
        """Tokens that each comparison takes in a batch; less than its length when shared prompts stand there once."""
        stored = self.sequences.lengths - (self.shared if share_prefix else 0)
        return numpy.diff(numpy.concatenate([[0], numpy.cumsum(stored)])[self.units])

    def __len__(self) -> int:
        return len(self.units) - 1

    @overload
    def __getitem__(self, index: int) -> Comparison: ...
    @overload
    def __getitem__(self, index: slice) -> "list[Comparison]": ...
    def __getitem__(self, index: int | slice) -> "Comparison | list[Comparison]":
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        first, last = int(self.units[number]), int(self.units[number + 1])
        part = slice(self.pair_starts[number], self.pair_starts[number + 1])
        pairs = zip(self.pairs[part].tolist(), self.margins[part].tolist(), strict=True)
        return Comparison(
            tuple(self.sequences[first:last]),
            tuple((better, worse, margin) for (better, worse), margin in pairs),
            tuple(self.labels[first:last].tolist()),
        )


def shared_lengths(ids: Listed[Any], weights: Listed[Any]) -> list[int]:
    """How many tokens of each sequence can be left out, because the first of them begins with the same.

    The position that predicts the first weighted token stays each sequence's own: what is read there is the same, but
    what is predicted need not be.
    """
    first, first_weighted = numpy.asarray(ids[0]), _first_weighted(weights[0])
    others = zip(ids[1:], weights[1:], strict=True)
    return [0, *(_in_common(first, own, min(first_weighted, _first_weighted(part))) for own, part in others)]


def _shared(sequences: Corpus, units: NDArray[numpy.int64]) -> NDArray[numpy.int64]:
    """The same for the sequences of each unit."""
    parts = [slice(start, end) for start, end in pairwise(sequences.starts.tolist())]
    ids, weights = [sequences.ids[part] for part in parts], [sequences.weights[part] for part in parts]
    shared = [shared_lengths(ids[first:last], weights[first:last]) for first, last in pairwise(units.tolist())]
    return numpy.array(list(chain.from_iterable(shared)), numpy.int64)


def _first_weighted(weights: Any) -> int:
    """The first token that is predicted with a weight, or one past the last: the first of all is never predicted."""
    found = numpy.flatnonzero(numpy.asarray(weights)[1:])
    return int(found[0]) + 1 if len(found) else len(weights)


def _in_common(a: NDArray[Any], b: Any, first: int) -> int:
    most = min(len(a), len(b), first - 1)
    different = numpy.flatnonzero(a[:most] != numpy.asarray(b)[:most])
    return int(different[0]) if len(different) else most
