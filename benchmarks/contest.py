"""Entries of several systems, measured in turn: round after round, so that each is timed more than once."""

import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.turns import Clock, Failed, Worker, median

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass
class Entry:
    """One setting of one system, and what was measured of it."""

    name: str
    worker: str
    """The process that measures it; one process may measure several settings."""
    request: Mapping[str, Any]
    columns: Mapping[str, object]
    """What the row says of the setting."""
    readings: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    about: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What the process said of itself."""


def contest(
    entries: Sequence[Entry], open_worker: Callable[[str], Worker], rounds: int, clock: Clock, together: bool
) -> None:
    """Gives every entry its readings, one a round; an entry whose system fails keeps those that it has.

    `together`: all processes stay loaded on the device and take turns. Otherwise each is opened anew in every round,
    for itself. A process ends with its last turn, so that what it holds of the device is there for the others. A turn
    that the clock may not leave time for is not begun.
    """
    names = list(dict.fromkeys(entry.worker for entry in entries))
    workers: dict[str, Worker] = {}
    try:
        if together:
            for name in names:
                workers[name] = open_worker(name)
            for name in names:
                _greet(name, workers, entries, clock)
        longest = 0.0
        for turn, name in enumerate(names * rounds):
            last = turn >= len(names) * (rounds - 1)
            if together and name not in workers:
                continue  # it failed, and said so
            before = clock.left()
            if longest > before:
                print(f"{name} has no turn: {before:.0f} s are left, and one took {longest:.0f} s", flush=True)
                continue
            if not together:
                workers[name] = open_worker(name)
                _greet(name, workers, entries, clock)
            _ask(name, workers, entries, clock)
            longest = max(longest, before - clock.left())
            if (last or not together) and name in workers:
                workers.pop(name).close()
    finally:
        for worker in workers.values():
            worker.close()


def _greet(name: str, workers: dict[str, Worker], entries: Sequence[Entry], clock: Clock) -> None:
    try:
        about = workers[name].hear(clock.left())
    except Failed as error:
        print(f"{name} is left out: it {error}", flush=True)
        del workers[name]
        return
    print(f"{name} is ready, {clock.left():.0f} s are left", flush=True)
    for entry in entries:
        if entry.worker == name:
            entry.about = about


def _ask(name: str, workers: dict[str, Worker], entries: Sequence[Entry], clock: Clock) -> None:
    for entry in entries:
        if entry.worker == name and name in workers:
            try:
                entry.readings.append(workers[name].ask(entry.request, clock.left()))
            except Failed as error:
                print(f"{name} is left out from here on: it {error}", flush=True)
                del workers[name]
                return
            times = entry.readings[-1]["seconds"]
            print(f"{entry.name}: {median(times):.3f} s a step, first {entry.readings[-1]['first']:.1f} s", flush=True)


def row_of(entry: Entry, samples: int | None = None, tokens: int | None = None) -> dict[str, object]:
    """The columns that an entry's readings decide: medians over the steps of all rounds, and the highest peaks.

    `samples` and `tokens` are those of a step. No tokens: those that the steps counted; where they differ from step to
    step, speed is all tokens over all seconds.
    """
    readings = entry.readings
    work = tokens if tokens is not None else _mean([count for reading in readings for count in reading["tokens"]])
    seconds = _step_seconds(readings, tokens)
    unit = samples or work
    rounds = " ".join(_short(unit / _step_seconds([reading], tokens)) for reading in readings)
    return {
        **entry.columns,
        "tokens_per_step": round(work),
        "step_seconds": f"{seconds:.4f}",
        "tokens_per_second": f"{work / seconds:.0f}",
        "peak_allocated_gib": f"{max(reading['allocated'] for reading in readings):.2f}",
        "peak_reserved_gib": f"{max(reading['reserved'] for reading in readings):.2f}",
        "compile_seconds": f"{readings[0]['first']:.1f}",
        "samples_per_second": f"{samples / seconds:.3f}" if samples else "",
        "note": f"rounds {rounds}",
        "versions": entry.about.get("versions", ""),
    }


def _step_seconds(readings: Sequence[Mapping[str, Any]], tokens: int | None) -> float:
    """What a step takes: the median, or the mean where steps hold different numbers of tokens."""
    times = [seconds for reading in readings for seconds in reading["seconds"]]
    counted = {count for reading in readings for count in reading.get("tokens", [])}
    return _mean(times) if tokens is None and len(counted) > 1 else statistics.median(times)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _short(rate: float) -> str:
    return f"{rate:.3f}" if rate < 1000 else f"{rate:.0f}"


def peers_missing(folder: str, place: str = "site") -> str | None:
    """Why the peers cannot be measured; None when they can. They are in `place`, or installed in an environment."""
    if not folder:
        return "write peers=DIR of what benchmarks/peers/fetch.py makes"
    if (Path(folder) / place / "trl").is_dir() or (place == "site" and _interpreter(Path(folder))):
        return None
    return f"{folder}/{place}/trl is not there: it is made by benchmarks/peers/fetch.py"


def _interpreter(peers: Path) -> Path | None:
    """The Python of the peers' own environment; None where there are only their libraries, for this Python."""
    found = peers / "bin" / "python"
    return found.absolute() if found.exists() else None


def open_ours(words: Sequence[str], log: Path) -> Worker:
    """A worker of this package, seeing what this process sees."""
    return Worker([sys.executable, "-m", *words], log, _our_environment(), REPOSITORY)


def _our_environment() -> dict[str, str]:
    given = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *given])}


def open_peer(words: Sequence[str], peers: Path, places: Sequence[str], log: Path, scratch: Path) -> Worker:
    """A worker whose libraries are the peers', first place first; what it writes goes into the scratch folder."""
    python = _interpreter(peers) or sys.executable
    return Worker([str(python), "-m", *words], log, peer_environment(peers, places), scratch)


def peer_environment(peers: Path, places: Sequence[str]) -> dict[str, str]:
    """The environment in which Python finds the peers' libraries, and no network is asked for."""
    path = os.pathsep.join([*(str((peers / place).absolute()) for place in places), str(REPOSITORY)])
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "WANDB_DISABLED": "true"}
    return {**os.environ, **offline, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}


@contextmanager
def model_folders(shape: str, folder: Path) -> Generator[None]:
    """The folders of `checkpoints.py` for the `with` block: those that are there already, or made by a process.

    What was made is removed after it. Raises Failed when it cannot be made, or something else is there.
    """
    named = folder / "shape"
    if named.is_file() and named.read_text() == shape:
        yield
        return
    if folder.exists() and any(folder.iterdir()) and not named.is_file():
        raise Failed(f"{folder} holds something else: write scratch= of a folder that may be written to")
    command = [sys.executable, "-m", "benchmarks.checkpoints", shape, str(folder)]
    try:
        done = subprocess.run(
            command, env=_our_environment(), cwd=REPOSITORY, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise Failed(f"no model could be written to {folder}: {done.stderr.strip().splitlines()[-1:]}")
        print(done.stdout.strip(), flush=True)
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
