"""One row of `benchmarks/memory.py`, measured by a process of its own: python -m benchmarks.memory_run."""

import json
import tempfile
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks import ppo
from benchmarks.memory_rows import Row
from benchmarks.meter import Meter
from benchmarks.models import ALPHA
from benchmarks.shapes import SHAPES
from benchmarks.turns import listen, say
from benchmarks.workload import rows_of
from burnish import __version__
from burnish.config import parse
from burnish.data.packing import collate
from burnish.engine.assemble import open_learner, open_model
from burnish.engine.memory import capped
from burnish.engine.mesh import Mesh
from burnish.engine.room import ran_out
from burnish.engine.start import Start
from burnish.engine.trial import Cost, Trial, try_out
from burnish.losses.likelihood import cross_entropy
from burnish.report.costs import Row as CostRow
from burnish.report.costs import values
from burnish.settings import TrainingSettings, memory_bytes
from burnish.types import Batch, Sequence

TIMED = 3
"""Steps of a trial that are timed."""
GIB = 2**30


def serve() -> None:
    """A worker: measures what one request asks for, under its cap."""
    mesh = Mesh(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
    torch.zeros(1, device=mesh.device)  # what a context takes of the host is none of the model's
    host = psutil.virtual_memory()
    print(f"host: {host.total / GIB:.1f} GiB, {host.available / GIB:.1f} free", flush=True)
    say({"versions": f"burnish {__version__} torch {torch.__version__}"})
    while (request := listen()) is not None:
        say(measured(Row(**request["row"]), request["asked"], mesh))


def measured(row: Row, asked: Mapping[str, str], mesh: Mesh) -> dict[str, Any]:
    """What the row takes under the cap that is asked for; or, as `problem`, why it does not fit."""
    cap = None if asked["cap"] == "none" else memory_bytes(asked["cap"])
    how = {"sft": tried, "dpo": tried, "ppo": practised, "longest": stepped}[row.kind]
    with capped(mesh.device, cap) if mesh.device.type == "cuda" else nullcontext():
        try:
            return how(row, asked, mesh)
        except (MemoryError, RuntimeError, ValueError) as error:
            if not (ran_out(error) or isinstance(error, MemoryError) or str(error).startswith("run.memory=")):
                raise
            return {"problem": _problem(error, mesh.device)}


def _problem(error: Exception, device: torch.device) -> str:
    """Why there was no memory, in one line."""
    said = " ".join(str(error).split()).partition(" GPU 0 has")[0]  # what PyTorch says of the card is in the log
    said = said.removeprefix("CUDA ").removeprefix("out of memory").lstrip(":. ")
    print(error, flush=True)
    if device.type != "cuda":
        return said
    allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return f"{said}; at most {allocated / GIB:.2f} GiB were allocated, {reserved / GIB:.2f} reserved"


def tried(row: Row, asked: Mapping[str, str], mesh: Mesh) -> dict[str, Any]:
    """A trial of `burnish bench`, with what holds the memory at its peak and what the host lent while loading."""
    with _folder(row) as folder:
        settings = settings_of(row, asked, folder, [f"run.steps={TIMED}"])
        trial = Trial("dpo" if row.kind == "dpo" else "sft", row.length, row.sequences, row.sequences)
        with watched() as host:
            cost = try_out(Start(folder), settings, trial, mesh)
    print(json.dumps(values(CostRow(row.what, trial.method, settings, cost=cost))), flush=True)
    return {
        "seconds": [cost.step],
        "tokens": row.tokens,
        "first": cost.first,
        "allocated": cost.peak.bytes / GIB,
        "reserved": (cost.reserved or 0) / GIB,
        "notes": notes_of(cost, host),
    }


def notes_of(cost: Cost, host: "HostMemory") -> list[str]:
    """What held the memory at the peak; loading; what was done for want of memory."""
    held = " ".join(f"{name} {gib(size / GIB) or 0}" for name, size in cost.peak.classes.items())
    away = {"activations": cost.host, "states": cost.states_away}
    lent = " ".join(f"{name} {gib(size / GIB)}" for name, size in away.items() if size)
    return [
        f"GiB at the peak, {cost.peak.phase}: {held}",
        f"on the host: {lent}" if lent else "",
        f"loaded in {cost.opened:.1f} s with {host.growth(cost.opened) / GIB:.2f} GiB of the host",
        "" if cost.limit is None else f"micro-batches were divided to {cost.limit} tokens",
    ]


def settings_of(row: Row, asked: Mapping[str, str], folder: Path, more: list[str]) -> TrainingSettings:
    """The settings of a training run with a row's work. Raises ValueError for a word of `also` that is none."""
    together = row.sequences * (2 * row.length - (row.length // 2 - 1) if row.kind == "dpo" else row.length)
    own = {
        "model.path": folder,
        "model.init": "random",
        "model.storage": row.storage,
        "adapter.kind": "lora" if row.rank else "none",
        **({"adapter.rank": row.rank, "adapter.alpha": ALPHA} if row.rank else {}),
        "optim.kind": asked["optimizer"],
        "run.memory": asked["memory"],
        "run.microbatch_tokens": together,
        "run.step_tokens": together,
    }
    words = [*(f"{key}={value}" for key, value in own.items()), *more, *asked["also"].split()]
    return parse(TrainingSettings, list({word.partition("=")[0]: word for word in words}.values()))  # the last counts


def stepped(row: Row, asked: Mapping[str, str], mesh: Mesh) -> dict[str, Any]:
    """A step of warm-up and a timed one on one sequence."""
    meter = Meter(1, 1, mesh.device)
    with _folder(row) as folder:
        settings = settings_of(row, asked, folder, [])
        adapting = (settings.model, settings.adapter, settings.run, mesh)
        decoder, name = open_model(Start(folder), *adapting, optim=settings.optim)
    learner = open_learner(decoder, name, settings.optim, 2, mesh)
    (ids,) = rows_of({"shape": row.shape, "lengths": "fixed", "length": str(row.length)}, 1)
    batch = collate([Sequence(tuple(ids), (1.0,) * len(ids), 0)]).to(mesh.device)

    def objective(batch: Batch):
        scores = decoder.score(batch, name)
        return cross_entropy(scores.log_probs, batch.weights, scores.correct)

    full = False
    while not full:
        meter.begin()
        learner.step([batch], objective, lambda batch: batch.total_weight)
        full = meter.end()
    lent = f"activations on the host: {decoder.fused.host.total / GIB:.2f} GiB" if decoder.fused else ""
    return meter.reading() | {"tokens": row.tokens, "notes": [lent]}


def practised(row: Row, asked: Mapping[str, str], mesh: Mesh) -> dict[str, Any]:
    """Updates of PPO, as its recipe makes them."""
    half = row.length // 2
    words = {"prompts": str(row.sequences), "prompt": str(half), "answer": str(row.length - half), "shape": row.shape}
    folder = Path(asked["scratch"]) / "model"
    ppo.write_prompts(folder / "prompts.jsonl", words)
    setting = {
        "storage": row.storage,
        "slots": row.sequences,
        "microbatch_tokens": min(2048, row.sequences * row.length),
        "memory": asked["memory"],
        "optimizer": asked["optimizer"],
    }
    return ppo.measured(words, folder, setting) | {"tokens": row.tokens}


def gib(size: float) -> str:
    """GiB with two places, the small ones of `shape=tiny` with six; empty where nothing was counted."""
    return f"{size:.{2 if size >= 0.005 else 6}f}" if size else ""


@contextmanager
def _folder(row: Row) -> Generator[Path]:
    """A folder with nothing in it but the configuration of the row's shape."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES[row.shape]))
        yield Path(folder)


@dataclass
class HostMemory:
    """What this process holds of the host's memory, looked at many times a second."""

    began: float
    before: int
    seen: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])

    def growth(self, seconds: float) -> int:
        """How many bytes more than in the beginning it held at most in the first so many seconds."""
        return max((held - self.before for when, held in self.seen if when - self.began <= seconds), default=0)


@contextmanager
def watched(every: float = 0.02) -> Generator[HostMemory]:
    """This process's memory on the host during the `with` block."""
    process, ended = psutil.Process(), threading.Event()
    found = HostMemory(time.perf_counter(), process.memory_info().rss)

    def watch() -> None:
        while not ended.wait(every):
            held = process.memory_info().rss  # before the time: what is held later must not count as held by then
            found.seen.append((time.perf_counter(), held))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        ended.set()
        watcher.join()


if __name__ == "__main__":
    serve()
