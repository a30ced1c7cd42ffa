"""What is being written, slot by slot, on the device: a step changes it without the host waiting for anything."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from burnish.sampling.draw import drawn, most_likely, probabilities
from burnish.sampling.streams import as_int64, uniforms

_COLUMNS = 6
_TOKEN, _SEED, _PLACE, _LIMIT, _GOING, _ENDED = range(_COLUMNS)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are drawn, and where they end."""

    max_tokens: int
    """An answer has at most so many tokens, its end token included."""
    temperature: float = 0.0
    """0 takes the most likely token; above it tokens are drawn from softmax(logits / temperature)."""
    top_k: int = 0
    """Draw among the k most likely tokens; 0: among all."""
    top_p: float = 1.0
    """Draw among the fewest tokens, the most likely first, that hold this share of what top_k leaves."""
    end_ids: Collection[int] = ()
    """An answer ends with one of these tokens."""
    stop: tuple[str, ...] = ()
    """An answer ends with the token in which one of these strings is completed."""

    def __post_init__(self) -> None:
        """Raises ValueError for a number out of its range."""
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens}: an answer has at least one token; write 1 or more")
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature} must be 0, for the most likely token, or above")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be 0, for all tokens, or above")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1, for all tokens")
        if "" in self.stop:
            raise ValueError("stop: an empty string ends every answer; leave it out")


class Report(NamedTuple):
    """How far the sequence in a slot has come."""

    place: int
    """Tokens written."""
    going: bool
    ended: bool
    """Whether it came to an end token."""
    recent: list[int]
    """The last tokens: that of place p stands at p modulo the length of the list."""


class Slots:
    """The sequences being written: their last token, seed and length, and the last `num_recent` tokens of each."""

    def __init__(self, num_slots: int, num_recent: int, sampling: Sampling, device: torch.device) -> None:
        # A slot that no longer goes on writes to one place more, which must not be one that is still to be read.
        self.table = torch.zeros(num_slots, _COLUMNS + num_recent + 1, dtype=torch.long, device=device)
        self.sampling = sampling
        self._ends = torch.tensor(sorted(sampling.end_ids), dtype=torch.long, device=device)

    @property
    def tokens_S(self) -> Int[Tensor, " S"]:
        """The last token of each slot."""
        return self.table[:, _TOKEN]

    def begin(self, slots_S: Int[Tensor, " s"], seeds: Sequence[int], limits: Sequence[int]) -> None:
        """New sequences in these slots, each with a seed and the most tokens that it may have."""
        rows = torch.zeros(len(seeds), self.table.shape[1], dtype=torch.long)
        rows[:, _SEED] = torch.tensor([as_int64(seed) for seed in seeds])
        rows[:, _LIMIT], rows[:, _GOING] = torch.tensor(limits), 1
        self.table[slots_S] = rows.to(self.table.device)

    def take(self, slots: slice | Int[Tensor, " s"], logits_SV: Float[Tensor, "s V"]) -> None:
        """One token more in each of these slots that goes on."""
        part = self.table[slots]
        token, seed, place, limit, going, ended = part[:, :_COLUMNS].unbind(1)
        if self.sampling.temperature:
            law = (self.sampling.temperature, self.sampling.top_k, self.sampling.top_p)
            chosen_S = drawn(probabilities(logits_SV, *law), uniforms(seed, place))
        else:
            chosen_S = most_likely(logits_SV)
        recent = part[:, _COLUMNS:]
        recent.scatter_(1, (place % recent.shape[1])[:, None], chosen_S[:, None])
        token.copy_(chosen_S)
        place += going
        ended += going * (chosen_S[:, None] == self._ends).any(1)
        going *= (ended == 0) & (place < limit)
        if not isinstance(slots, slice):
            self.table[slots] = part

    def move(self, sources: Int[Tensor, " s"], targets: Int[Tensor, " s"]) -> None:
        """What is written in the source slots goes on in the target slots."""
        self.table[targets] = self.table[sources]

    def report(self, num_slots: int) -> list[Report]:
        """How far each of the first slots has come; this waits for the device."""
        return [
            Report(row[_PLACE], bool(row[_GOING]), bool(row[_ENDED]), row[_COLUMNS:])
            for row in self.table[:num_slots].tolist()
        ]
