"""What can be known to be wrong before torch is imported: paths, columns, folders, devices. Imports no torch."""

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from burnish.config import to_yaml
from burnish.data.prepare import check_data
from burnish.engine.trackers import check_trackers
from burnish.model.families import find_model, read_config
from burnish.settings import TrainingSettings


def preflight(config: TrainingSettings) -> None:
    """Raises ValueError with one clear line when this run cannot work as configured; reads files, writes nothing."""
    check_device(config.run.device)
    check_run_folder(Path(config.run.folder), config)
    read_config(find_model(config.model.path, config.model.revision))
    check_data(config.data)
    if config.evaluate.path is not None:
        check_data(config.data.model_copy(update={"path": config.evaluate.path, "format": "auto"}))
    check_text(config.evaluate.general)
    check_trackers(config.save.trackers)


def check_text(general: str | None) -> None:
    """Raises ValueError when the general text of an evaluation is not there."""
    if general not in (None, "embedded") and not Path(general).is_file():
        raise ValueError(f"evaluate.general={general} is no file; write a text file, or `embedded`")


def check_positions(base: Path, longest: int) -> None:
    """Raises ValueError when a sequence is longer than what the model was made for."""
    limit = read_config(base).max_positions
    if longest > limit:
        raise ValueError(
            f"a row has {longest} tokens and the model in {base} is made for {limit}: write data.max_length={limit}; "
            "data.too_long says what becomes of longer rows"
        )


def check_device(device: str, key: str = "run.device") -> None:
    """Raises ValueError when cuda was asked for under this key and the driver shows no device."""
    if device == "cuda" and cuda_device_count() == 0:
        raise ValueError(
            f"{key}=cuda, but this machine shows no CUDA device: write {key}=cpu; "
            "`burnish doctor` says what the machine has"
        )


def cuda_device_count() -> int:
    """How many CUDA devices the driver shows, asked of the driver itself."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    return count.value if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


def check_run_folder(folder: Path, config: TrainingSettings) -> None:
    """Raises ValueError when the folder cannot be written or holds something that this run must not overwrite."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"run.folder={folder}: {existing} is a file; write run.folder=DIR with another path")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(
            f"run.folder={folder}: no permission to write in {existing}; write run.folder=DIR with another path"
        )
    if existing != folder or not any(folder.iterdir()):
        return
    stored = folder / "config.yaml"
    if not stored.exists():
        raise ValueError(f"run.folder={folder} is not empty and holds no run; write run.folder=DIR with a new path")
    if not config.save.resume and not _took_a_step(folder):
        return  # it failed before its first step: there is nothing to lose
    if not config.save.resume:
        raise ValueError(
            f"run.folder={folder} already holds a run; continue it with save.resume=true, "
            "or write run.folder=DIR with a new path"
        )
    before, now = yaml.safe_load(stored.read_text(encoding="utf-8")) or {}, yaml.safe_load(to_yaml(config))
    changed = sorted(set(_flat(before).items()) ^ set(_flat(now).items()))
    names = sorted({name for name, _ in changed if not name.startswith("save.") and name != "run.folder"})
    if names:
        raise ValueError(
            f"run.folder={folder} holds a run with other settings ({', '.join(names)}); resume it with the same ones"
        )


def _took_a_step(folder: Path) -> bool:
    metrics = folder / "metrics.jsonl"
    return any((folder / "checkpoints").glob("*")) or (metrics.exists() and metrics.stat().st_size > 0)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    pairs: dict[str, str] = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping) and value
        pairs |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": repr(value)}
    return pairs
