"""Running out of memory is met, not died of: room is made where there is some to make, and batches are divided.

What is computed are sums, so parts give what the whole would have given. Only `torch.OutOfMemoryError` counts, and what
the CPU's allocator raises. On several ranks nothing is tried again: the others wait in the collectives of the pass
that one of them could not finish.
"""

import gc
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

from burnish.data.dividing import in_two, within
from burnish.types import Batch

B = TypeVar("B", bound=Batch)
R = TypeVar("R")


class Shortage(NamedTuple):
    """Memory did not suffice, and what was done about it."""

    tokens: int
    """Of the largest batch at that time."""
    limit: int | None
    """How many tokens a batch has from now on at most; None: room was made, and the batches are what they were."""
    made: str = ""
    """How room was made, in words."""
    work: str = ""
    """What was at work; empty: a training step."""


class NoRoom(MemoryError):
    """Memory does not suffice for a batch that cannot be divided. No weight has been changed by the pass over it."""

    in_step = False
    """Whether an optimizer step raised it, which has changed nothing then. Others before it may have."""

    def __init__(self, batch: Batch, whole: bool = False) -> None:
        """`whole` says that the batch could be divided, but that the step must be one micro-batch."""
        self.tokens, self.num_sequences, self.whole = len(batch.tokens), batch.num_sequences, whole
        super().__init__(f"out of memory: {self.what} is too much by itself, and can only be computed whole")

    @property
    def what(self) -> str:
        """The batch in words."""
        if self.whole:
            return f"a micro-batch of {self.tokens:,} tokens, whole so that gradients are taken as they appear,"
        kind = "one sequence" if self.num_sequences == 1 else f"a comparison of {self.num_sequences} sequences"
        return f"{kind}, {self.tokens:,} tokens,"


class Halfway(MemoryError):
    """Memory ran out when a step had changed some weights, so that it cannot be taken again."""

    def __init__(self) -> None:
        super().__init__("out of memory when a step had changed some weights already")


@dataclass
class Room:
    """How much of a batch is computed at a time: all of it until memory runs out, then half as much, and so on."""

    limit: int | None = None
    """The most tokens of a batch that can be divided; None: whatever is asked."""
    relieve: Callable[[], str | None] | None = None
    """Called first when memory runs out, and again when it still does: gives back what is only held to save time.
    What that was, in words: then the same batches are tried once more. None: nothing is left to give."""
    recover: Callable[[], bool] | None = None
    """Called after each optimizer step that memory sufficed for. Whether less memory is free than before."""
    told: Callable[[Shortage], None] | None = None
    """Called before another attempt."""
    work: str = ""
    """What the batches are for; empty: training steps."""
    shortages: int = 0
    """How often memory ran out so far."""

    def beside(self, work: str) -> "Room":
        """A room for other work on the same device: it has a limit of its own, but gives back and tells the same."""

        def told(shortage: Shortage) -> None:
            if self.told is not None:
                self.told(shortage)

        return Room(relieve=lambda: None if self.relieve is None else self.relieve(), told=told, work=work)

    def parts(self, batches: Iterable[B]) -> list[B]:
        """The batches in parts within the limit, in order."""
        return [part for batch in batches for part in within(batch, self.limit)]

    def again(self, parts: Sequence[B], failed: int, whole: bool = False) -> list[B]:
        """What to try in place of these parts, the one numbered `failed` having been too much.

        Raises NoRoom when there is no room to make and the part cannot be divided, or must not be: `whole`.
        """
        self.shortages += 1
        gc.collect()  # cycles may hold tensors of the attempt that failed
        _empty_cache()  # so that what is free is known
        made = None if self.relieve is None else self.relieve()
        _empty_cache()
        tokens = max(len(part.tokens) for part in parts)
        if made is None:
            divides = in_two(parts[failed]) is not None
            if whole or not divides:
                raise NoRoom(parts[failed], divides)
            self.limit = min(tokens, self.limit or tokens) // 2
        if self.told is not None:
            limit = self.limit if made is None else None
            self.told(Shortage(tokens, limit, made or "", self.work))
        return self.parts(parts)

    def each(self, batches: Iterable[B], work: Callable[[B], R]) -> Iterator[tuple[B, R]]:
        """Each batch, or each of its parts, with what `work` makes of it. For work whose results need no adding up."""
        for batch in batches:
            waiting = self.parts([batch])
            while waiting:
                done = attempt(work, waiting[0])
                if done is None:
                    waiting = self.again(waiting, 0)
                else:
                    yield waiting.pop(0), done[0]


def attempt(work: Callable[[B], R], batch: B) -> tuple[R] | None:
    """What `work` makes of the batch; None, and nothing left of it, when memory runs out."""
    try:
        return (work(batch),)
    except RuntimeError as error:
        if not ran_out(error) or (dist.is_initialized() and dist.get_world_size() > 1):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold tensors for as long as anybody holds the error
    return None


def ran_out(error: BaseException) -> bool:
    """Whether this says that there is no memory: of a device, or of the host from PyTorch's allocator."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _empty_cache() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
