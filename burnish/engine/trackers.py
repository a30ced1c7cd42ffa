"""Where metrics go besides metrics.jsonl: TensorBoard files, Weights & Biases, trackio."""

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import yaml


class Tracker(Protocol):
    """Takes the metrics of a step and shows them somewhere."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of one step."""
        ...

    def close(self) -> None:
        """Finish; nothing is logged after it."""
        ...


class TensorBoard:
    """Event files in the run folder, for `tensorboard --logdir`."""

    def __init__(self, folder: Path, config_yaml: str, step: int) -> None:
        from tensorboardX import SummaryWriter  # imported when asked for: it is slow to load

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One scalar per metric."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is left and close the file."""
        self.writer.close()


class Service:
    """Weights & Biases or trackio, which share their interface."""

    def __init__(self, module: str, folder: Path, config_yaml: str) -> None:
        self.service: Any = __import__(module)
        self.service.init(project="burnish", name=folder.name, config=yaml.safe_load(config_yaml))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send one step's metrics."""
        self.service.log(dict(metrics), step=step)

    def close(self) -> None:
        """Say that the run is over."""
        self.service.finish()


def check_trackers(names: Sequence[str]) -> None:
    """Raises ValueError when a tracker that was asked for is not installed."""
    for name in names:
        if name in ("wandb", "trackio") and find_spec(name) is None:
            raise ValueError(f"save.trackers: {name} is not installed; pip install 'burnish[{name}]', or leave it out")


def open_trackers(names: Sequence[str], folder: Path, config_yaml: str, step: int) -> list[Tracker]:
    """The trackers by name, going on after `step`."""
    return [TRACKERS[name](folder, config_yaml, step) for name in names]


TRACKERS: dict[str, Callable[[Path, str, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": lambda folder, config_yaml, step: Service("wandb", folder, config_yaml),
    "trackio": lambda folder, config_yaml, step: Service("trackio", folder, config_yaml),
}
