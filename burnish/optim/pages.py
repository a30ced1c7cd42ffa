"""The states of an optimizer in pages: on the device while there is room, the others in pinned host memory.

Pages before `Pages.resident` belong on the device, those after it on the host. Where one is needed that is on the host
it is copied into one of two buffers on the device, and back when it has been updated; the copies of either direction
run on a stream of their own, so that one page comes and another leaves while a third is worked on. Nothing is managed
memory, and what a page holds does not depend on where it is.

Device memory is taken and freed in the order of the computing stream, which first waits for the copies of what is
freed.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from burnish.optim.eight_bit import BLOCK, num_blocks

PAGE = 32 * 2**20
"""Bytes of a page: copied in 0.7 ms at 50 GB/s, long beside the 0.05 ms in which the host asks for it, and two of them
are little of any device. CUDA's allocator has segments of their own for pieces of this size, which it can give back,
and the one of pinned memory, in powers of two, wastes nothing."""
CHUNK = 16384
"""Tensors are cut at multiples of so many values: what a program of `kernels/adam.py` takes, and whole 8-bit blocks."""
_ALIGNED = 16
MOMENTS = {False: ("exp_avg", "exp_avg_sq"), True: ("state1", "state2", "absmax1", "absmax2")}
"""What the moments are called, in fp32 and in 8 bits."""


class Piece(NamedTuple):
    """The moments of some values of a tensor: where they lie."""

    page: int
    offset: int
    """In bytes, from the page's beginning."""
    first: int
    last: int
    """The values: from `first` to before `last`."""

    def moments(self, page: Tensor, eight: bool) -> dict[str, Tensor]:
        """They themselves, flat, in the bytes of their page."""
        found: dict[str, Tensor] = {}
        offset = self.offset
        for name, (count, dtype) in _arrays(self.last - self.first, eight).items():
            found[name] = page[offset : offset + count * dtype.itemsize].view(dtype)
            offset += _padded(count * dtype.itemsize)
        return found


def places(name: str, first: int) -> int:
    """Which entry of a whole tensor's moment belongs to its value `first`: those of a scale stand for a block each."""
    return num_blocks(first) if name.startswith("absmax") else first


def cut(counts: Sequence[int], eight: bool, page: int, number: int) -> tuple[list[list[Piece]], list[int]]:
    """The pieces of tensors of so many values, and the sizes of the pages that they fill one after the other.

    `page` is how many bytes one holds, unless a single chunk takes more; `number` is that of the first.
    """
    chunk, sizes = _piece_bytes(CHUNK, eight), [0]
    pieces: list[list[Piece]] = []
    for count in counts:
        pieces.append([])
        first = 0
        while first < count:
            room = page - sizes[-1]
            last = count if _piece_bytes(count - first, eight) <= room else min(count, first + room // chunk * CHUNK)
            if last <= first:
                if sizes[-1]:
                    sizes.append(0)
                    continue
                last = min(count, first + CHUNK)
            pieces[-1].append(Piece(number + len(sizes) - 1, sizes[-1], first, last))
            sizes[-1] += _piece_bytes(last - first, eight)
            first = last
    return pieces, sizes


def _arrays(count: int, eight: bool) -> Mapping[str, tuple[int, torch.dtype]]:
    """How many numbers of which dtype each moment of so many values has."""
    scales, dtype = num_blocks(count), torch.uint8 if eight else torch.float32
    return {name: (scales, torch.float32) if name.startswith("absmax") else (count, dtype) for name in MOMENTS[eight]}


def _piece_bytes(count: int, eight: bool) -> int:
    return sum(_padded(count * dtype.itemsize) for count, dtype in _arrays(count, eight).values())


def _padded(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


class Pages:
    """Pages of these sizes, zeros at first; their memory is taken when they are first asked for.

    On a CUDA device the host's memory is pinned. On another, copies are done at once.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device, room: int | None) -> None:
        """`room` is how many bytes they may take on the device; None: all."""
        assert CHUNK % BLOCK == 0
        self._sizes, self._device = sizes, device
        self._before = list(accumulate(sizes, initial=0))
        self._largest = max(sizes, default=0)
        self.resident = len(sizes) if room is None else self._fitting(room)
        self.moves = 0
        """Grows whenever pages have changed their place."""
        self._here: dict[int, Tensor] = {}
        self._away: dict[int, Tensor] = {}
        self._buffers: list[Tensor] = []
        self._inside: list[int | None] = []
        """Which page each buffer holds."""
        self._copied: list[torch.cuda.Event | None] = []
        """When the last copy to or from each is done."""
        cuda = device.type == "cuda"
        self._inwards = torch.cuda.Stream(device) if cuda else None
        self._outwards = torch.cuda.Stream(device) if cuda else None

    def __len__(self) -> int:
        return len(self._sizes)

    def held(self) -> int:
        """Bytes on the device: pages, and the buffers for those that are not there."""
        return sum(tensor.nbytes for tensor in (*self._here.values(), *self._buffers))

    def away(self) -> int:
        """Bytes of pages on the host."""
        return sum(page.nbytes for page in self._away.values())

    def to_come(self) -> int:
        """Bytes that they will take on the device besides: those of pages that have no memory yet."""
        return max(0, self._taken(self.resident) - self.held())

    def to_lend(self) -> int:
        """Bytes that they will take on the host besides: those of pages that have no memory yet."""
        return self._before[-1] - self._before[self.resident] - self.away()

    def movable(self) -> int:
        """Bytes that they take on the device, or will take there, and need not."""
        return self._taken(self.resident) - min(map(self._taken, range(self.resident + 1)))

    def evict(self, size: int) -> int:
        """Move pages to the host until so many bytes of the device are free; returns how many that are.

        Pages that have no memory yet count as if they had, and will have it on the host.
        """
        held = self.held()
        resident = self._fitting(self._taken(self.resident) - size)
        if resident < self.resident and self._taken(resident) < self._taken(self.resident):
            self._leave(resident)
        return held - self.held()

    def restore(self, room: int) -> int:
        """Bring pages back that fit into so many free bytes of the device; returns how many bytes they have there.

        Fewer, where the device's memory turns out to be in too many parts.
        """
        before = self.resident
        resident = self._fitting(self._taken(before) + room)
        if resident > before:
            self._enter(resident)
        return sum(self._here[number].nbytes for number in range(before, self.resident) if number in self._here)

    def made(self, number: int) -> bool:
        """Whether the page has memory."""
        return number in self._here or number in self._away

    def buffer(self, number: int) -> Tensor:
        """Where the page is updated: its own place on the device, or the buffer that it will be copied to.

        Pages move when one that has no memory yet finds none on the device.
        """
        if not self.made(number):
            self._make(number)
        if (here := self._here.get(number)) is not None:
            return here
        self._furnish_missing()
        return self._buffers[self._which(number)][: self._sizes[number]]

    def contents(self, number: int) -> Tensor:
        """The page wherever it is, for the host to read and to change; waits for all copies."""
        if not self.made(number):
            self._make(number)
        if number in self._here:
            return self._here[number]
        for stream in (self._inwards, self._outwards):
            if stream is not None:
                stream.synchronize()
        self._inside = [None] * len(self._buffers)
        return self._away[number]

    def put(self, piece: Piece, eight: bool, state: Mapping[str, Tensor]) -> None:
        """Write a piece's moments, out of those of its whole tensor; zeros where there are none.

        Nothing of the page is held when that is done: for the next piece it may have to leave the device.
        """
        for name, moment in piece.moments(self.contents(piece.page), eight).items():
            if state:
                moment.copy_(state[name].view(-1)[places(name, piece.first) : places(name, piece.last)])
            else:
                moment.zero_()

    def prefetch(self) -> None:
        """Begin to copy the last two pages to their buffers: those with which updates begin."""
        for number in range(len(self) - 1, len(self) - 3, -1):
            self._begin(number)

    def fetch(self, number: int) -> None:
        """Let the computing stream wait for a page on its way to its buffer, and send for the one before it."""
        self._begin(number)
        if (copied := self._copied[self._which(number)]) is not None:
            torch.cuda.current_stream(self._device).wait_event(copied)
        self._begin(number - 1)

    def updated(self, number: int) -> None:
        """Begin to copy a page back, after all that is computed so far."""
        which = self._which(number)
        buffer = self._buffers[which][: self._sizes[number]]
        self._copied[which] = _copy(self._away[number], buffer, self._outwards, self._computing())

    def _computing(self) -> torch.cuda.Stream | None:
        return torch.cuda.current_stream(self._device) if self._inwards is not None else None

    def _begin(self, number: int) -> None:
        if number not in self._away:
            return
        self._furnish_missing()
        if self._inside[which := self._which(number)] == number:
            return
        # The buffer's last page has been sent for before this one: when that has left, this one may come.
        buffer = self._buffers[which][: self._sizes[number]]
        self._copied[which] = _copy(buffer, self._away[number], self._inwards, self._outwards)
        self._inside[which] = number

    def _which(self, number: int) -> int:
        """A page's buffer: neighbours have different ones, and the last page the first."""
        return (len(self) - 1 - number) % 2

    def _taken(self, resident: int) -> int:
        """Bytes on the device with so many pages there, and buffers for the others."""
        return self._before[resident] + self._largest * min(2, len(self) - resident)

    def _fitting(self, room: int) -> int:
        """How many pages can be on the device, if all are to take no more than this, or else as little as can be."""
        counts = range(len(self), -1, -1)
        return next((resident for resident in counts if self._taken(resident) <= room), min(counts, key=self._taken))

    def _make(self, number: int) -> None:
        """Zeros for a page. Where the device has no room for it, it and others go to the host.

        Raises MemoryError where the host has none either.
        """
        size = self._sizes[number]
        if number < self.resident:
            try:
                self._here[number] = self._on_device(size).zero_()
                return
            except torch.OutOfMemoryError:
                pass
            self._leave(min(number, self._fitting(self.held())))
        if number < self.resident:  # the host took less than that: what it took may suffice
            self._here[number] = self._on_device(size).zero_()
            return
        if (away := self._room_on_host(size)) is None:
            raise MemoryError(
                f"out of memory: the host has none for {size / 2**20:.0f} MiB more of the optimizer's states, of which "
                f"{self.away() / 2**20:,.0f} MiB are there; optim.kind=adamw8bit or adapter.kind=lora needs less"
            )
        self._away[number] = away.zero_()
        self._furnish()

    def _leave(self, resident: int) -> None:
        """Move pages to the host until only so many are on the device.

        Where the host has no room for all, it takes what it has room for; none, if that freed nothing.
        """
        places: dict[int, Tensor] = {}
        for number in range(self.resident - 1, resident - 1, -1):
            if number in self._here:
                if (away := self._room_on_host(self._sizes[number])) is None:
                    resident = number + 1
                    if self._held_with(resident) >= self.held():
                        return
                    break
                places[number] = away
        self.moves += 1
        self.resident = resident
        for number, away in places.items():
            _copy(away, self._here[number], self._outwards, self._computing())
            _wait(self._computing(), self._outwards)
            self._away[number] = away
            del self._here[number]
        self._furnish()

    def _held_with(self, resident: int) -> int:
        """Bytes on the device with only so many of these pages there, and buffers for the others."""
        here = [page.nbytes for number, page in self._here.items() if number < resident]
        leaves = bool(self._away) or len(here) < len(self._here)
        return sum(here) + (self._largest * min(2, len(self) - resident) if leaves else 0)

    def _enter(self, resident: int) -> None:
        """Bring pages back until so many are on the device, or it has no room for more."""
        self.moves += 1
        before, places = self.resident, dict[int, Tensor]()
        if resident == len(self):
            self._buffers.clear()
        try:
            while self.resident < resident:
                if (away := self._away.get(self.resident)) is not None:
                    here = self._on_device(len(away))
                    _wait(self._inwards, self._outwards)
                    _copy(here, away, self._inwards, self._computing())
                    _wait(self._computing(), self._inwards)
                    self._here[self.resident] = here
                    del here  # else this page is held when it has to leave again
                    places[self.resident] = self._away.pop(self.resident)
                self.resident += 1
        except torch.OutOfMemoryError:
            pass
        while True:
            try:
                self._furnish()
                return
            except torch.OutOfMemoryError:  # what came last makes room for the buffers
                if self.resident == before:
                    raise
            self.resident -= 1
            if self.resident in places:  # nothing has changed it since
                self._away[self.resident] = places[self.resident]
                del self._here[self.resident]

    def _furnish_missing(self) -> None:
        """Make buffers for which there was no memory when pages left."""
        if len(self._inside) < min(2, len(self) - self.resident):
            self._furnish()

    def _furnish(self) -> None:
        """As many buffers as there are pages on the host, two at most."""
        wanted = min(2, len(self) - self.resident) if self._away else 0
        self._inside.clear()
        while len(self._buffers) < wanted:
            buffer = self._on_device(self._largest)
            for stream in (self._inwards, self._outwards):
                if stream is not None:
                    buffer.record_stream(stream)  # whoever drops it need not wait for copies
            _wait(self._inwards, self._computing())
            self._buffers.append(buffer)
        del self._buffers[wanted:]
        self._inside = [None] * wanted
        self._copied = [None] * wanted

    def _on_device(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def _room_on_host(self, size: int) -> Tensor | None:
        """Memory of the host; None where there is no more."""
        try:
            return self._on_host(size)
        except RuntimeError as error:  # pinned memory that runs out is no torch.OutOfMemoryError
            if "out of memory" in str(error) or "can't allocate memory" in str(error):
                return None
            raise

    def _on_host(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=self._device.type == "cuda")


def _copy(
    to: Tensor, source: Tensor, stream: torch.cuda.Stream | None, after: torch.cuda.Stream | None
) -> torch.cuda.Event | None:
    """Begin to copy on a stream, after all that another one has to do by now; without streams it is done already."""
    if stream is None:
        to.copy_(source)
        return None
    _wait(stream, after)
    with torch.cuda.stream(stream):
        to.copy_(source, non_blocking=True)
    event = torch.cuda.Event()
    event.record(stream)
    return event


def _wait(stream: torch.cuda.Stream | None, other: torch.cuda.Stream | None) -> None:
    if stream is not None and other is not None:
        stream.wait_stream(other)
