"""The order in which a run sees its data: step number in, batches out. Imports torch only when it collates."""

import hashlib
import math
from collections.abc import Iterable
from collections.abc import Sequence as Listed
from typing import TYPE_CHECKING, Any

import numpy
from numpy.typing import NDArray

from burnish.data.corpus import Corpus
from burnish.data.packing import collate, pack
from burnish.types import Sequence

if TYPE_CHECKING:
    from burnish.types import Batch


class Schedule:
    """Which items fill which micro-batches of which step: an endless supply, epoch after epoch.

    What a step holds depends on its number alone, so a resumed run needs nothing else to go on. The shapes of the
    packs are found once; an epoch shuffles which of the equally long items fill them, and the order of the packs.
    Epochs run into each other: the step in which one ends takes its remaining micro-batches from the next.
    """

    def __init__(
        self,
        lengths: NDArray[numpy.int64],
        microbatch_tokens: int,
        microbatches_per_step: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        assert 0 <= rank < world
        if not len(lengths):
            raise ValueError("there are no sequences to train on")
        self._lengths, self._seed, self._rank, self._world = lengths, seed, rank, world
        self._packs = pack(-numpy.sort(-lengths), microbatch_tokens)
        # No step goes over the whole data set more than once: a tiny set takes fewer micro-batches, not more passes.
        self.microbatches = max(1, min(microbatches_per_step, -(-len(self._packs) // world)))
        self._epoch: tuple[int, NDArray[numpy.int64], NDArray[numpy.int64]] | None = None

    @property
    def num_packs(self) -> int:
        """Micro-batches that one epoch takes, over all ranks."""
        return len(self._packs)

    def steps_in(self, epochs: float) -> int:
        """Steps until so many passes over the data are complete."""
        return math.ceil(epochs * len(self._packs) / (self.microbatches * self._world))

    def step(self, index: int) -> list[list[int]]:
        """The items in each micro-batch of this rank at a step, counted from 0."""
        first = (index * self.microbatches) * self._world + self._rank
        return [self._pack(first + k * self._world) for k in range(self.microbatches)]

    def fingerprint(self, arrays: Iterable[NDArray[Any]]) -> str:
        """A name for everything that decides what a step holds: the data in these arrays, the packs, the seed."""
        known = hashlib.sha256(f"{self._seed} {self.microbatches * self._world}".encode())
        packs = numpy.concatenate([numpy.asarray([len(pack), *pack]) for pack in self._packs])
        for array in (*arrays, packs):
            known.update(array.tobytes())
        return known.hexdigest()[:16]

    def _pack(self, place: int) -> list[int]:
        epoch, number = divmod(place, len(self._packs))
        order, packs = self._orders(epoch)
        return [int(order[rank]) for rank in self._packs[packs[number]]]

    def _orders(self, epoch: int) -> tuple[NDArray[numpy.int64], NDArray[numpy.int64]]:
        """Items from long to short with equals shuffled, and the packs shuffled; one epoch is kept."""
        if self._epoch is None or self._epoch[0] != epoch:
            random = numpy.random.default_rng((self._seed, epoch))
            shuffled = random.permutation(len(self._lengths))
            order = shuffled[numpy.argsort(-self._lengths[shuffled], kind="stable")]
            self._epoch = epoch, order, random.permutation(len(self._packs))
        return self._epoch[1:]


class Stream:
    """The batches of each step of training on sequences, as a Schedule has them."""

    def __init__(
        self,
        sequences: Listed[Sequence],
        microbatch_tokens: int,
        microbatches_per_step: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._corpus = Corpus.of(sequences)
        self._schedule = Schedule(
            self._corpus.lengths, microbatch_tokens, microbatches_per_step, seed, rank=rank, world=world
        )
        self.microbatches = self._schedule.microbatches

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every sequence has been seen."""
        return self.steps_in(1)

    def steps_in(self, epochs: float) -> int:
        """Steps until so many passes over the data are complete."""
        return self._schedule.steps_in(epochs)

    @property
    def fingerprint(self) -> str:
        """A name for everything that decides what a step holds: the sequences, their packs, the seed."""
        return self._schedule.fingerprint((self._corpus.ids, self._corpus.weights, self._corpus.starts))

    @property
    def num_packs(self) -> int:
        """Micro-batches that one epoch takes, over all ranks."""
        return self._schedule.num_packs

    def step(self, index: int) -> "list[Batch]":
        """The micro-batches of this rank at a step, counted from 0."""
        return [collate([self._corpus[item] for item in items]) for items in self._schedule.step(index)]
