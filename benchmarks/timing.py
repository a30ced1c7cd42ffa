"""How long a call takes on the device: in a CUDA graph, on inputs that no cache holds."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.turns import median

WARM_UP, TIMED = 3, 20
BURST = 2**31
"""Bytes that a burst moves at least: 0.7 ms on an H100, beside which the start of a graph is short."""
ROTATED = 2**28
"""Bytes that rotated inputs take at least: five times the L2 cache of an H100."""

Call = Callable[[], object]


class Reading(NamedTuple):
    """What one name came to."""

    name: str
    seconds: float
    rate: str
    """With its unit."""
    share: str
    """With what it is a share of."""


def attempt(name: str, call: Call, calls: int) -> float | None:
    """The seconds of a call, or None where it fails, with the reason printed."""
    try:
        taken = seconds(call, calls)
    except Exception as error:  # whatever one kernel does, the others are measured
        print(f"{name} is left out: {type(error).__name__}: {str(error).splitlines()[:1]}", flush=True)
        return None
    print(f"{name}: {1000 * taken:.4f} ms", flush=True)
    return taken


def seconds(call: Call, calls: int) -> float:
    """The median time of a call, over bursts of so many of them in one CUDA graph."""
    for _ in range(WARM_UP):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Held until the end of the capture: each call writes to memory of its own, which no cache holds yet.
        results = [call() for _ in range(calls)]
    for _ in range(WARM_UP):
        graph.replay()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(TIMED)]
    for begin, end in events:
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    del results
    return median([begin.elapsed_time(end) for begin, end in events]) / 1000 / calls


def burst(size: int) -> int:
    """How many calls of so many bytes a burst holds."""
    return max(2, -(-BURST // size))


def rotated(call: Callable[..., object], *given: Tensor) -> Call:
    """The call on other copies of what it is given each time, until the L2 cache has forgotten the first."""
    size = sum(part.numel() * part.element_size() for part in given)
    turns = itertools.cycle([tuple(part.clone() for part in given) for _ in range(max(2, -(-ROTATED // size)))])
    return lambda: call(*next(turns))
