"""The order in which a run sees its comparisons, and how they are laid into batches.

Imports torch only when it makes a batch.
"""

from collections.abc import Sequence as Listed
from typing import TYPE_CHECKING

from burnish.data.comparisons import Comparisons, shared_lengths
from burnish.data.packing import columns
from burnish.data.stream import Schedule
from burnish.types import Comparison, Sequence

if TYPE_CHECKING:
    from burnish.types import PreferenceBatch


class ComparisonStream:
    """The batches of each step of training on comparisons, as a Schedule has them; no comparison is ever divided."""

    def __init__(
        self,
        comparisons: Listed[Comparison],
        microbatch_tokens: int,
        microbatches_per_step: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        share_prefix: bool = True,
    ) -> None:
        self._comparisons, self._share_prefix = Comparisons.of(comparisons), share_prefix
        sizes = self._comparisons.sizes(share_prefix)
        self._schedule = Schedule(sizes, microbatch_tokens, microbatches_per_step, seed, rank=rank, world=world)
        self.microbatches = self._schedule.microbatches

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every comparison has been seen."""
        return self.steps_in(1)

    def steps_in(self, epochs: float) -> int:
        """Steps until so many passes over the data are complete."""
        return self._schedule.steps_in(epochs)

    @property
    def fingerprint(self) -> str:
        """A name for everything that decides what a step holds: the comparisons, their packs, the seed."""
        return self._schedule.fingerprint(self._comparisons.arrays().values())

    @property
    def num_packs(self) -> int:
        """Micro-batches that one epoch takes, over all ranks."""
        return self._schedule.num_packs

    def step(self, index: int) -> "list[PreferenceBatch]":
        """The micro-batches of this rank at a step, counted from 0."""
        return [
            collate_comparisons([self._comparisons[item] for item in items], self._share_prefix)
            for items in self._schedule.step(index)
        ]


def collate_comparisons(comparisons: Listed[Comparison], share_prefix: bool = True) -> "PreferenceBatch":
    """Whole comparisons as one batch, the sequences of each next to each other.

    With `share_prefix`, what a later sequence of a comparison begins with in common with the first one is left out of
    it, and `prefixes` says where it stands: the prompt is in the batch, and computed, once.
    """
    import torch

    from burnish.types import PreferenceBatch

    sequences: list[Sequence] = []
    shared: list[int] = []
    firsts: list[int] = []
    pairs: list[tuple[int, int, float, float]] = []
    labels: list[int] = []
    for comparison in comparisons:
        offset, count = len(sequences), len(comparison.sequences)
        sequences += comparison.sequences
        ids, weights = zip(*((sequence.ids, sequence.weights) for sequence in comparison.sequences), strict=True)
        shared += shared_lengths(ids, weights) if share_prefix else [0] * count
        firsts += [offset] * count
        weight = 1 / max(1, len(comparison.pairs))
        pairs += [(offset + better, offset + worse, margin, weight) for better, worse, margin in comparison.pairs]
        labels += comparison.labels or [0] * count
    laid = columns(sequences, shared)
    starts = laid["starts"].tolist()
    prefixes = tuple((starts[first], length) for first, length in zip(firsts, shared, strict=True))
    return PreferenceBatch(
        **laid,
        prefixes=prefixes if any(shared) else (),
        chosen=torch.tensor([pair[0] for pair in pairs], dtype=torch.int64),
        rejected=torch.tensor([pair[1] for pair in pairs], dtype=torch.int64),
        margins=torch.tensor([pair[2] for pair in pairs], dtype=torch.float32),
        pair_weights=torch.tensor([pair[3] for pair in pairs], dtype=torch.float32),
        labels=torch.tensor(labels, dtype=torch.int64),
        num_pairs=float(sum(bool(comparison.pairs) for comparison in comparisons)),
        num_labels=sum(label != 0 for label in labels),
    )
