"""Where the activations of a trunk wait between its forward and its backward pass.

Each named tensor of a block is kept on the device, copied to the host and back, or dropped, to be computed again: a
`Plan` says which. Copies run on a stream of their own, beside the computation.

Memory is never handed to the allocator while a copy still uses it: device memory is taken and freed in the order of
the computing stream, which first waits for the copy. Host memory is only ever touched by the one copying stream, so
that a buffer can be used again at once.
"""

import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

NAMES = ("x", "qkv", "attention", "x_mid", "gate_up")
"""What of a block may go to the host or be computed again (`x`, its input, cannot be); all else is small, and kept."""

_SMALL = 512
"""Tensors of fewer bytes stay on the device: the allocator gives memory in pieces of this size."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is kept of each block. What is neither kept nor on the host is computed again in the backward pass."""

    kept: tuple[frozenset[str], ...]
    """The names in NAMES that stay on the device, block by block."""
    host: tuple[frozenset[str], ...]
    """Those that are copied to the host, and back."""
    dense_blocks: int = 0
    """So many blocks, the first ones, hold their weights decoded, ready to be multiplied with."""
    tile: int | None = None
    """About so many tokens at a time go through an MLP whose gate and up are computed again; None: all at once."""
    embedding_on_host: bool = False
    """Whether the embedding lies in pinned memory there, where the device reads its rows."""

    def __post_init__(self) -> None:
        assert len(self.kept) == len(self.host)
        for kept, host in zip(self.kept, self.host, strict=True):
            assert not kept & host
            assert {"x"} <= kept | host <= {*NAMES}

    def holds(self, block: int, name: str) -> bool:
        """Whether the tensor waits, and is not computed again."""
        return name in self.kept[block] or name in self.host[block]


def keep_everything(num_blocks: int) -> Plan:
    """Nothing is computed again, nothing copied."""
    return Plan((frozenset(NAMES),) * num_blocks, (frozenset[str](),) * num_blocks)


def keep_inputs(num_blocks: int) -> Plan:
    """All but the inputs of the blocks is computed again."""
    return Plan((frozenset({"x"}),) * num_blocks, (frozenset[str](),) * num_blocks)


class HostMemory:
    """Buffers on the host that the passes of one model share, and the stream that copies there and back.

    For a CUDA device they are pinned, so that copies run beside the computation. They are kept for the next step.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.total = 0
        """Bytes of all buffers."""
        self._free: dict[int, list[Tensor]] = {}

    def take(self, size: int) -> Tensor:
        """A buffer of at least so many bytes."""
        size = buffer_bytes(size)
        free = self._free.setdefault(size, [])
        if free:
            return free.pop()
        buffer = torch.empty(size, dtype=torch.uint8, pin_memory=self.stream is not None)
        self.total += size
        return buffer

    def give(self, buffer: Tensor) -> None:
        """Take a buffer back, for others to write to."""
        self._free[buffer.numel()].append(buffer)


def buffer_bytes(size: int) -> int:
    """The bytes of the buffer that takes `size`: a power of two, as CUDA's allocator of pinned memory has it anyway.

    Micro-batches of nearly one size so share buffers.
    """
    return 1 << (size - 1).bit_length()


class Shelf:
    """The activations of one forward pass. What is put there must not be written to by others afterwards.

    What a block puts here waits on the device for its copy to the host until the next block puts something here: the
    computing stream is held up where the copies are slower.
    """

    def __init__(self, plan: Plan, memory: HostMemory) -> None:
        self.plan = plan
        self._memory = memory
        self._kept: dict[tuple[int, str], tuple[Tensor, ...]] = {}
        self._away: dict[tuple[int, str], list[Tensor | _Away]] = {}
        self._leaving: deque[tuple[int, _Away]] = deque()
        # A pass that fails on its way gives its buffers back when nobody holds the shelf any more.
        weakref.finalize(self, _abandon, self._away).atexit = False

    def put(self, block: int, name: str, tensors: tuple[Tensor, ...]) -> None:
        """Leave tensors here in the forward pass, block after block; dropped where they are to be computed again."""
        while self._leaving and self._leaving[0][0] < block:
            self._leaving.popleft()[1].leave()
        if name in self.plan.host[block]:
            parts = self._away[block, name] = []
            for tensor in tensors:
                if tensor.nbytes < _SMALL or tensor.device.type != self._memory.device.type:
                    parts.append(tensor)
                else:
                    away = _Away(tensor, self._memory)
                    parts.append(away)
                    self._leaving.append((block, away))
        elif name in self.plan.kept[block] or name not in NAMES:
            self._kept[block, name] = tensors

    def prefetch(self, block: int, names: Sequence[str] = NAMES) -> None:
        """Begin to copy back what of this block is on the host; a number that is no block's does nothing."""
        for name in names:
            for part in self._away.get((block, name), ()):
                if isinstance(part, _Away):
                    part.bring()

    def get(self, block: int, name: str) -> tuple[Tensor, ...] | None:
        """The tensors, for the caller to own: the shelf lets go of them. None: compute them again."""
        if (block, name) in self._away:
            tensors = tuple(part.fetch() if isinstance(part, _Away) else part for part in self._away[block, name])
            del self._away[block, name]
            return tensors
        tensors = self._kept.pop((block, name), None)
        assert tensors is not None or name != "x", "a second backward pass over activations that the first one took"
        return tensors


class _Away:
    """A tensor on its way to the host, there, or on its way back."""

    def __init__(self, tensor: Tensor, memory: HostMemory) -> None:
        """Begin to copy it to the host."""
        self._memory = memory
        # What has gaps is packed first: a copy with gaps would go through the host's processor.
        self._here: Tensor | None = tensor if _is_dense(tensor) else tensor.contiguous()
        self._buffer: Tensor | None = memory.take(tensor.nbytes)
        part = self._buffer[: tensor.nbytes].view(tensor.dtype)
        self._copy = part.as_strided(self._here.shape, self._here.stride())
        self._copied = _copy(self._copy, self._here, memory)

    def leave(self) -> None:
        """Free the device memory, once the copy is done."""
        self._wait()
        self._here = None

    def bring(self) -> Tensor:
        """The tensor on the device; begins to copy it back where it has left."""
        if self._here is None:
            self._here = torch.empty_like(self._copy, device=self._memory.device)
            self._copied = _copy(self._here, self._copy, self._memory)
        return self._here

    def fetch(self) -> Tensor:
        """The tensor on the device, for good."""
        tensor = self.bring()
        self.end()
        return tensor

    def end(self) -> None:
        """Give the buffer back and let go of the tensor, which is then safe to use, or to free."""
        self._wait()
        self._here = None
        if self._buffer is not None:
            self._memory.give(self._buffer)
            self._buffer = None

    def _wait(self) -> None:
        """Hold up the computing stream until the copy is done."""
        if self._copied is not None:
            self._copied.stream.wait_event(self._copied.event)
            self._copied = None


class _Copied(NamedTuple):
    """When a copy is done, and the stream that computes with what it copies."""

    event: torch.cuda.Event
    stream: torch.cuda.Stream


def _copy(to: Tensor, source: Tensor, memory: HostMemory) -> _Copied | None:
    """Begin to copy, after all that is computed so far; None: it is done already."""
    if memory.stream is None:
        to.copy_(source)
        return None
    computing = torch.cuda.current_stream(memory.device)
    memory.stream.wait_stream(computing)
    with torch.cuda.stream(memory.stream):
        to.copy_(source, non_blocking=True)
    event = torch.cuda.Event()
    event.record(memory.stream)
    return _Copied(event, computing)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the tensor fills its memory without gaps, in whatever order of its dimensions."""
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def _abandon(places: dict[tuple[int, str], list[Tensor | _Away]]) -> None:
    for parts in places.values():
        for part in parts:
            if isinstance(part, _Away):
                part.end()
