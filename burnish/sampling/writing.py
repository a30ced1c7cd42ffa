"""One call of the sampler: which prompt is read when, in which slot, and when an answer is finished."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from burnish.data.packing import collate
from burnish.engine.mesh import Mesh
from burnish.model.cache import Cache
from burnish.model.decoder import Decoder
from burnish.sampling.graphs import Graphs
from burnish.sampling.slots import Report, Sampling, Slots
from burnish.sampling.stops import Stops
from burnish.types import Sequence as TokenSequence

REFILL_SHARE = 1 / 8
"""Finished slots wait until they are such a share of all: prompts are cheaper read together."""
PREFILL_TOKENS = 8_192
"""Prompts are read at most so many tokens at a time."""
STRIDE = 8
"""Steps between two looks at what a GPU has written: each look makes the host wait for it."""
CONTEXT = 128
"""On a GPU attention reads a multiple of so many places: each multiple is a CUDA graph of its own."""
ROOM = 256
"""With `invariant` a slot has a multiple of so many places, and attention reads them all."""


class Asked(NamedTuple):
    """A prompt, and what its answer may be."""

    prompt: Sequence[int]
    seed: int
    limit: int
    """The most tokens of the answer."""


class Written(NamedTuple):
    """An answer."""

    ids: tuple[int, ...]
    """Its tokens, the end token or the token in which a stop string was completed included."""
    ended: bool
    """Whether it ended by itself, and not at the length limit."""


@dataclass(frozen=True, slots=True)
class Means:
    """What answers are written with: see `Sampler`."""

    model: Decoder
    adapter: str | None
    num_slots: int
    mesh: Mesh | None
    invariant: bool
    graphs: bool


def slots_for(means: Means, num_asked: int) -> int:
    """How many answers are written at once."""
    return means.num_slots if means.invariant else max(1, min(means.num_slots, num_asked))


class Writing:
    """The state of one call. On several ranks each decision that all must share is voted on."""

    def __init__(self, means: Means, asked: Sequence[Asked], sampling: Sampling, stops: Stops | None) -> None:
        self.means, self.asked, self.stops = means, asked, stops
        self.device = means.model.device
        self.on_gpu = self.device.type == "cuda"
        self.ranks = means.mesh.world if means.mesh is not None else 1
        self.stride = STRIDE if self.on_gpu else 1
        num_slots = slots_for(means, len(asked))
        self.cache = self._new_cache(num_slots)
        self.slots = Slots(num_slots, self.stride + 1, sampling, self.device)
        self.graphs = Graphs() if means.graphs and self.on_gpu and self.ranks == 1 else None
        # Neighbours in length are read together, and the longest come when fewer are left: attention reads less.
        self.waiting = deque(sorted(range(len(asked)), key=lambda i: len(asked[i].prompt)))
        self.members: list[int | None] = [None] * num_slots
        self.ids: list[list[int]] = [[] for _ in asked]
        self.found: list[Written | None] = [None] * len(asked)

    def run(self) -> list[Written]:
        """All answers."""
        while True:
            chunk = self._next_prompts()
            reads, goes_on = self._vote(bool(chunk), any(member is not None for member in self.members))
            if reads:
                self._read(chunk)
            elif goes_on:
                self._write()
            else:
                return [found for found in self.found if found is not None]

    def _new_cache(self, num_slots: int) -> Cache:
        room = max((len(one.prompt) + one.limit for one in self.asked), default=1)
        rounding = 1
        if self.means.invariant:
            room = rounding = -(-room // ROOM) * ROOM
        elif self.on_gpu:
            rounding = max(CONTEXT, (1 << (room - 1).bit_length()) // 16)
            room = -(-room // rounding) * rounding
        # A rank that has nothing to read while others do reads a token into a slot more, which nobody uses.
        cache = self.means.model.new_cache(num_slots + (self.ranks > 1), room)
        cache.num_slots, cache.rounding = num_slots, rounding
        return cache

    def _next_prompts(self) -> list[int]:
        """The prompts to be read now; none while it is better to go on writing."""
        free, waiting = self.members.count(None), len(self.waiting)
        enough = min(waiting, math.ceil(REFILL_SHARE * len(self.members)))
        if free < enough and free < len(self.members):
            return []
        chunk: list[int] = []
        tokens = 0
        while self.waiting and len(chunk) < (1 if self.means.invariant else free):
            tokens += len(self.asked[self.waiting[0]].prompt)
            if chunk and tokens > PREFILL_TOKENS:
                break
            chunk.append(self.waiting.popleft())
        return chunk

    def _vote(self, reads: bool, goes_on: bool) -> tuple[bool, bool]:
        """Whether any rank has prompts to read, and whether any is writing."""
        if self.ranks == 1 or self.means.mesh is None:
            return reads, goes_on
        votes = self.means.mesh.sum(torch.tensor([float(reads), float(goes_on)], device=self.device)).tolist()
        return votes[0] > 0, votes[1] > 0

    def _read(self, chunk: Sequence[int]) -> None:
        """Each prompt into a free slot, and the first token of its answer. Equal prompts are read once."""
        free = (slot for slot, member in enumerate(self.members) if member is None)
        slots = [next(free) for _ in chunk]
        first: dict[tuple[int, ...], int] = {}
        rows = [first.setdefault(tuple(self.asked[i].prompt), len(first)) for i in chunk]
        firsts = [slots[rows.index(row)] for row in range(len(first))]
        prompts, targets = (list(first), firsts) if chunk else ([(0,)], [len(self.members)])
        batch = collate([TokenSequence(ids, (0.0,) * len(ids), row=0) for ids in prompts]).to(self.device)
        logits_SV = self.means.model.prefill(batch, self.cache, self.means.adapter, self._on_device(targets))
        if not chunk:
            return
        if len(first) < len(chunk):
            copied = [(firsts[row], slot) for row, slot in zip(rows, slots, strict=True) if firsts[row] != slot]
            self.cache.copy(*(self._on_device(part) for part in zip(*copied, strict=True)))
            logits_SV = logits_SV[self._on_device(rows)]
        for slot, i in zip(slots, chunk, strict=True):
            self.members[slot] = i
        slots_S = self._on_device(slots)
        self.slots.begin(slots_S, [self.asked[i].seed for i in chunk], [self.asked[i].limit for i in chunk])
        self.slots.take(slots_S, logits_SV)

    def _write(self) -> None:
        """A few tokens more in every slot; then those that are finished are taken out."""
        steps = self.stride
        if self.ranks == 1:
            going = ((self.asked[i].limit - len(self.ids[i])) for i in self.members if i is not None)
            steps = min(steps, max(going))
        for _ in range(steps):
            self._step()
        for slot, report in enumerate(self.slots.report(self.cache.num_slots)):
            self._note(slot, report)
        if not self.waiting and not self.means.invariant:
            self._shrink()
        held = (len(self.asked[i].prompt) + len(self.ids[i]) - 1 for i in self.members if i is not None)
        self.cache.longest = max(held, default=0)

    def _step(self) -> None:
        # Slots that are finished go on for a while; what they hold no longer counts.
        longest = self.cache.longest = min(self.cache.longest, self.cache.max_tokens - 1)
        if self.graphs is None:
            self._decode()
        else:
            self.graphs.run((self.cache.num_slots, self.cache.context), self._decode)
            self.cache.longest = longest + 1

    def _decode(self) -> None:
        used = slice(0, self.cache.num_slots)
        logits_SV = self.means.model.decode(self.slots.tokens_S[used], self.cache, self.means.adapter)
        self.slots.take(used, logits_SV)

    def _note(self, slot: int, report: Report) -> None:
        """Take down what was written in a slot, and give the slot up when that is an answer."""
        member = self.members[slot]
        if member is None:
            return
        ids = self.ids[member]
        checked, width = len(ids), len(report.recent)
        ids += [report.recent[place % width] for place in range(checked, report.place)]
        stopped = self.stops.find(ids, checked) if self.stops is not None else None
        if stopped is not None or not report.going:
            self.found[member] = Written(tuple(ids[:stopped]), report.ended or stopped is not None)
            self.members[slot] = None

    def _shrink(self) -> None:
        """Fewer slots in use, when no prompt waits: those that are written in move to the front."""
        busy = sum(member is not None for member in self.members)
        size = max(1, busy)
        if self.on_gpu:  # by halves: each size is a graph of its own
            size = self.slots.table.shape[0]
            while size // 2 >= max(1, busy):
                size //= 2
        if size >= len(self.members):
            return
        sources = [slot for slot in range(size, len(self.members)) if self.members[slot] is not None]
        targets = [slot for slot in range(size) if self.members[slot] is None][: len(sources)]
        if sources:
            self.cache.copy(self._on_device(sources), self._on_device(targets))
            self.slots.move(self._on_device(sources), self._on_device(targets))
        for source, target in zip(sources, targets, strict=True):
            self.members[target] = self.members[source]
        del self.members[size:]
        self.cache.num_slots = size

    def _on_device(self, numbers: Sequence[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self.device)
