"""The copies of pages on three streams, each as late or as early as its waits allow: none may meet another's memory.

Streams are played by clocks: each knows how far it has waited for the others. Two uses of one piece of memory, at least
one of them a change, must be in order by those waits; device memory that is let go of is changed by whoever gets it
next, on the computing stream.
"""

import random
import weakref
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from burnish.optim import pages as module
from burnish.optim.pages import Pages

SIZES = [10, 10, 10, 10, 7, 10, 3]


class Stream:
    """What it has done, and what of the others it has waited for."""

    def __init__(self, *_: Any) -> None:
        self.clock: dict[int, int] = {}

    def work(self) -> tuple[int, int]:
        self.wait_stream(HOST)
        self.clock[id(self)] = self.clock.get(id(self), 0) + 1
        return id(self), self.clock[id(self)]

    def wait_stream(self, other: "Stream | Event") -> None:
        for stream, time in other.clock.items():
            self.clock[stream] = max(self.clock.get(stream, 0), time)

    def wait_event(self, event: "Event") -> None:
        self.wait_stream(event)

    def synchronize(self) -> None:
        HOST.wait_stream(self)


class Event:
    def __init__(self) -> None:
        self.clock: dict[int, int] = {}

    def record(self, stream: Stream) -> None:
        self.clock = dict(stream.clock)


HOST, COMPUTING = Stream(), Stream()
_ACTIVE = [COMPUTING]


class Uses:
    """The uses of a piece of memory so far, and what is in it."""

    def __init__(self) -> None:
        self.reads: list[tuple[int, int]] = []
        self.write: tuple[int, int] | None = None
        self.safe, self.value = False, 0

    def read(self, stream: Stream) -> None:
        self._after(stream, [self.write])
        self.reads.append(stream.work())

    def change(self, stream: Stream) -> None:
        self._after(stream, [self.write, *self.reads])
        self.write, self.reads = stream.work(), []

    def forget(self) -> None:
        if not self.safe:
            self.change(COMPUTING)

    def _after(self, stream: Stream, uses: list[tuple[int, int] | None]) -> None:
        stream.wait_stream(HOST)
        ERRORS.extend(use for use in uses if use is not None and stream.clock.get(use[0], 0) < use[1])


ERRORS: list[tuple[int, int]] = []


class Memory:
    """Device memory, or the host's."""

    def __init__(self, size: int, device: bool) -> None:
        self.nbytes, self.uses, self.device = size, Uses(), device
        if device:
            weakref.finalize(self, self.uses.forget).atexit = False

    def __len__(self) -> int:
        return self.nbytes

    def __getitem__(self, part: slice) -> "Memory":
        return self

    def zero_(self) -> "Memory":
        self.uses.change(_ACTIVE[-1] if self.device else HOST)
        self.uses.value = 0
        return self

    def copy_(self, source: "Memory", non_blocking: bool) -> None:
        source.uses.read(_ACTIVE[-1])
        self.uses.change(_ACTIVE[-1])
        self.uses.value = source.uses.value

    def record_stream(self, _: Stream) -> None:
        self.uses.safe = True


class Played(Pages):
    """Of which a device and a host of so many bytes hold pages and buffers."""

    device_bytes = host_bytes = 10**9

    def _on_device(self, size: int) -> Any:
        if self.held() + size > self.device_bytes:
            raise torch.OutOfMemoryError("full")
        memory = Memory(size, True)
        memory.uses.change(COMPUTING)  # by whoever had it before
        return memory

    def _on_host(self, size: int) -> Any:
        given: list[weakref.ref[Memory]] = self.__dict__.setdefault("given", [])
        if sum(page.nbytes for ref in given if (page := ref()) is not None) + size > self.host_bytes:
            raise RuntimeError("CUDA error: out of memory")
        page = Memory(size, False)
        given.append(weakref.ref(page))
        return page


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> Played:
    @contextmanager
    def stream(stream: Stream) -> Generator[None]:
        _ACTIVE.append(stream)
        yield
        _ACTIVE.pop()

    monkeypatch.setattr(module.torch.cuda, "Stream", Stream)
    monkeypatch.setattr(module.torch.cuda, "Event", Event)
    monkeypatch.setattr(module.torch.cuda, "stream", stream)
    monkeypatch.setattr(module.torch.cuda, "current_stream", lambda _: COMPUTING)
    ERRORS.clear()
    return Played(SIZES, torch.device("cuda"), None)


def update(pages: Pages, number: int) -> None:
    """As AdamW does it, by a kernel that adds 1."""
    buffer: Any = pages.buffer(number)
    if number >= pages.resident:
        pages.fetch(number)
    buffer.uses.change(COMPUTING)
    buffer.uses.value += 1
    if number >= pages.resident:
        pages.updated(number)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("scarce", [False, True])
def test_no_copy_meets_anothers_memory(pages: Played, seed: int, scarce: bool) -> None:
    draw, expected = random.Random(seed), [0] * len(SIZES)
    for _ in range(60):
        if scarce and all(map(pages.made, range(len(SIZES)))):  # besides what is there
            pages.device_bytes, pages.host_bytes = pages.held() + draw.randrange(40), pages.away() + draw.randrange(40)
        match draw.randrange(6):
            case 0:
                pages.evict(draw.randrange(60))
            case 1:
                pages.restore(draw.randrange(60))
            case 2:
                update(pages, number := draw.randrange(len(SIZES)))
                expected[number] += 1
            case 3:
                contents: Any = pages.contents(number := draw.randrange(len(SIZES)))
                contents.uses.read(COMPUTING if number < pages.resident else HOST)
                assert contents.uses.value == expected[number]
                contents.uses.change(COMPUTING if number < pages.resident else HOST)
                contents.uses.value = expected[number] = 10 * expected[number]
            case _:
                pages.prefetch()
                for number in reversed(range(len(SIZES))):
                    update(pages, number)
                    expected[number] += 1
        assert ERRORS == []
    found: list[Any] = [pages.contents(number) for number in range(len(SIZES))]
    assert [memory.uses.value for memory in found] == expected
    assert any(expected)


@pytest.mark.parametrize("never", ["updated", "fetch"])
def test_the_play_sees_a_missing_wait(pages: Played, never: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(len(SIZES)):
        update(pages, number)
    pages.evict(40)
    if never == "updated":
        monkeypatch.setattr(module, "_wait", lambda stream, other: None)
    else:
        monkeypatch.setattr(Stream, "wait_event", lambda self, event: None)
    for number in reversed(range(len(SIZES))):
        update(pages, number)
    assert ERRORS
