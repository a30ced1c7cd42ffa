"""Callbacks of a trainer that wait for its turn and time it."""

import sys
from importlib.metadata import version
from typing import Any

from transformers import TrainerCallback

from benchmarks.meter import Meter
from benchmarks.turns import listen, say


class Gate(TrainerCallback):
    """It waits for a request before a turn's first step, and answers after its last."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.about: dict[str, Any] = {}
        self._opened = False

    def on_step_begin(self, *args: object, **given: object) -> None:
        """Wait, if a turn begins, and start the clock."""
        if self.meter.fresh:
            if not self._opened:
                say(self.about)
            self._opened = True
            if listen() is None:
                sys.exit(0)
        self.meter.begin()

    def on_step_end(self, *args: object, **given: object) -> None:
        """Stop the clock; at the end of a turn give its reading."""
        if self.meter.end():
            say(self.meter.reading())


class UpdateGate(TrainerCallback):
    """The same for a trainer that says where an update ends, but not where it begins: one turn, from the start on."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.about: dict[str, Any] = {}
        self.rollouts: list[float] = []
        """Seconds that the answers of each update took to write."""

    def on_train_begin(self, *args: object, **given: object) -> None:
        """Wait, and start the clock of the first update."""
        say(self.about)
        if listen() is None:
            sys.exit(0)
        self.meter.begin()

    def on_step_end(self, *args: object, **given: object) -> None:
        """Stop the clock, and start it for the next update; after the last one give the reading."""
        if not self.meter.end():
            self.meter.begin()
            return
        reading = self.meter.reading()
        rollout = sum(self.rollouts[self.meter.warm_up :])
        say(reading | {"phases": {"rollout": rollout, "rest": sum(reading["seconds"]) - rollout}})


def versions(*names: str) -> str:
    """The versions of the libraries that are measured, and of those beneath them."""
    return " ".join(f"{name} {version(name)}" for name in (*names, "peft", "transformers", "torch"))
