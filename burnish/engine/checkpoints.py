"""A run's checkpoints: safetensors and JSON, written atomically, the newest few and the best kept."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from burnish.files import written_aside


def save_checkpoint(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    """Write a checkpoint: a safetensors file per group of tensors, and state.json. Raises OSError, leaving nothing."""
    try:
        with written_aside(folder) as aside:
            for group, members in tensors.items():
                whole = {name: tensor.detach().cpu().contiguous() for name, tensor in members.items()}
                save_file(whole, aside / f"{group}.safetensors")
            (aside / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise OSError(f"{folder} could not be written ({error}); {what_stays(folder.parent)}") from None


def load_checkpoint(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The groups of tensors (on the CPU) and the state of a checkpoint. Raises ValueError when it is damaged."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        tensors = {path.stem: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"checkpoint {folder} is damaged ({error}); delete it to continue from the one before"
        ) from None
    return tensors, state


def newest_checkpoint(parent: Path) -> Path | None:
    """The checkpoint of the latest step in a folder of checkpoints, or None."""
    return max(parent.glob("step-*"), default=None)


def what_stays(parent: Path) -> str:
    """What a run that cannot write is left with, and how it goes on, for its message."""
    kept = newest_checkpoint(parent)
    if kept is None:
        return "there is no earlier checkpoint: make room, and start anew with another run.folder"
    return f"the last good checkpoint is {kept}: make room, and go on with save.resume=true"


def prune(parent: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and the one with the lowest `eval_loss`."""
    for remains in parent.glob(".old-step-*"):  # of an earlier pruning that was cut short
        shutil.rmtree(remains)
    every = sorted(parent.glob("step-*"))
    losses = {path: json.loads((path / "state.json").read_text())["eval_loss"] for path in every}
    measured = {path: loss for path, loss in losses.items() if loss is not None}
    best = min(measured, key=lambda path: measured[path]) if measured else None
    for path in every[:-keep]:
        if path != best:  # renamed first: a process that dies in between leaves no checkpoint that lacks a part
            shutil.rmtree(path.rename(path.with_name(f".old-{path.name}")))


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of the random generators that training draws from."""
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def restore_random_state(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Set the random generators to a stored state."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
