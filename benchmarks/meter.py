"""Time and peak memory of steps, for Burnish and its peers alike."""

import time
from typing import Any

import torch


class Meter:
    """Times the steps of a turn, the device synchronised at both ends of each, and the peak of its memory.

    The first `warm_up` steps count for nothing: compilation, memory pools and clocks settle in them.
    """

    def __init__(self, warm_up: int, timed: int, device: torch.device) -> None:
        self.warm_up, self.timed, self.device = warm_up, timed, device
        self._seconds: list[float] = []
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
        self._began = time.perf_counter()

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
        self._seconds = []
        if self.device.type == "cuda":
            values["allocated"] = torch.cuda.max_memory_allocated() / 2**30
            values["reserved"] = torch.cuda.max_memory_reserved() / 2**30
            torch.cuda.empty_cache()
        return values


def here() -> torch.device:
    """The device to measure on: CUDA where there is one; else the CPU, where only the scripts are tried out."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """The name that a row gives the device."""
    return torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
