"""Time and peak memory of steps, for Burnish and its peers alike."""

import gc
import sys
import time
from typing import Any

import torch

from benchmarks.rows import CPU, current_commit


class Meter:
    """Times the steps of a turn, the device synchronised at both ends of each, and the peak of its memory.

    The first `warm_up` steps count for nothing: compilation, memory pools and clocks settle in them.
    """

    def __init__(self, warm_up: int, timed: int, device: torch.device) -> None:
        self.warm_up, self.timed, self.device = warm_up, timed, device
        self._seconds: list[float] = []
        self._counts: list[list[Any]] = []
        self._began = 0.0

    @property
    def fresh(self) -> bool:
        """Whether the next step is the first of a turn."""
        return not self._seconds

    def begin(self) -> None:
        """A step begins."""
        if self.device.type == "cuda":
            if len(self._seconds) == self.warm_up:
                torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        self._counts.append([])
        self._began = time.perf_counter()

    def count(self, tokens: Any) -> None:
        """The running step works on so many tokens; a tensor is read when the turn is over."""
        self._counts[-1].append(tokens)

    def end(self) -> bool:
        """A step has ended; whether it was the last of its turn."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self._seconds.append(time.perf_counter() - self._began)
        return len(self._seconds) == self.warm_up + self.timed

    def reading(self) -> dict[str, Any]:
        """What the turn took. The device's unused memory is handed back, for who comes next."""
        values = {
            "seconds": self._seconds[self.warm_up :],
            "first": self._seconds[0],
            "allocated": 0.0,
            "reserved": 0.0,
        }
        if any(self._counts):
            values["tokens"] = [sum(int(tokens) for tokens in step) for step in self._counts[self.warm_up :]]
        self._seconds, self._counts = [], []
        if self.device.type == "cuda":
            values["allocated"] = torch.cuda.max_memory_allocated() / 2**30
            values["reserved"] = torch.cuda.max_memory_reserved() / 2**30
            torch.cuda.empty_cache()
        return values


def give_back(device: torch.device) -> None:
    """Hands back the memory of models that nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def here() -> torch.device:
    """The device to measure on: CUDA where there is one; else the CPU, where only the scripts are tried out."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def needs_cuda(script: str, shape: str) -> None:
    """Ends a script that would measure on a CPU; only the shape `tiny` is tried out there."""
    if here().type == "cpu" and shape != "tiny":
        sys.exit(f"{script}: it measures on a CUDA device, and there is none; shape=tiny tries it out on a CPU")


def device_name(device: torch.device) -> str:
    """The name that a row gives the device."""
    return torch.cuda.get_device_name() if device.type == "cuda" else CPU


def stamp(commit: str) -> dict[str, str]:
    """The columns of a row that say what was measured and where; an empty commit is that of the checkout."""
    return {"commit": commit or current_commit(), "device": device_name(here()), "torch": torch.__version__}


def device_gib() -> float:
    """The memory of the device; of a CPU, where nothing is measured, as much as anybody wants."""
    return torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else float("inf")
