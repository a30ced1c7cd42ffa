"""Peak memory of training under a cap: what fits into how much of a card, a process for each row.

python -m benchmarks.memory [rows=qlora-4x2048,longest] [shape=own] [memory=least] [cap=own]
                            [optimizer=adamw8bit] [also="run.dtype=fp8"] [most=131072] [scratch=/dev/shm/burnish-peers]
                            [logs=DIR] [results=FILE] [seconds=540] [commit=HASH] [note=TEXT]

Rows are names of `memory_rows.ROWS`, each with its cap, beyond which PyTorch's allocator gets nothing of the card; what
the CUDA driver takes besides is not in it. `cap=` sets another one for all, `cap=none` none. Random weights, made on
the card; PPO reads a folder that `checkpoints.py` writes. What is measured is a trial of `burnish bench`: 3 steps of
warm-up, 3 timed, one explained. The longest sequence is searched for, each length in a process of its own, with one
step of warm-up and one timed. A row is not begun when the clock leaves less than it may take; one that does not fit is
written without figures.

`also=` holds settings of a training run, which are put in place of the row's own. `shape=tiny` tries all of it out on
a CPU, where nothing is capped.
"""

import difflib
import os
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks import ppo
from benchmarks.contest import model_folders, open_ours
from benchmarks.memory_rows import MOST, ROWS, UNIT, Row, longest, sized
from benchmarks.memory_run import gib
from benchmarks.meter import here, needs_cuda, stamp
from benchmarks.rows import PLACES, write_row
from benchmarks.rows import read_words as read
from benchmarks.turns import Clock, Failed, Worker
from burnish.settings import memory_bytes

WORDS = {
    "rows": ",".join(ROWS),
    "shape": "own",
    "memory": "least",
    "cap": "own",
    "optimizer": "adamw8bit",
    "also": "",
    "most": str(MOST),
    **PLACES,
}
"""What can be asked for, and what is measured where it is not."""
CHOICES = {
    "shape": ("own", "tiny"),
    "optimizer": ("adamw", "adamw8bit"),
}
NUMBERS = ("most", "seconds")
TOLD = ("memory", "optimizer")
"""Words of a row's settings: how all rows of a call are measured."""
Ask = Callable[[str, Row], dict[str, Any]]
"""What a process measures of a row, which has this name. Raises Failed where it cannot."""


def main(asked: Mapping[str, str]) -> None:
    """Measures row after row what is asked for; prints the rows and adds them to results.csv as they come."""
    needs_cuda("benchmarks/memory.py", asked["shape"])
    if here().type == "cpu":
        asked = {**asked, "cap": "none"}  # it is the CUDA allocator that is capped
    clock, model = Clock(float(asked["seconds"])), Path(asked["scratch"]) / "model"
    about = stamp(asked["commit"])
    with ExitStack() as stack:
        ask, written = stack.enter_context(processes(asked, clock)), False
        for name in asked["rows"].split(","):
            row = sized(ROWS[name], asked["shape"])
            if clock.left() < row.seconds:
                print(f"{name} is not begun: it may take {row.seconds} s, {clock.left():.0f} s are left", flush=True)
                continue
            try:
                if row.kind == "ppo" and not written:
                    stack.enter_context(model_folders(row.shape, model))
                    written = True
                reading = searched(name, row, asked, clock, ask) if row.kind == "longest" else ask(name, row)
            except Failed as error:
                print(f"{name} is left out: it {error}", flush=True)
                continue
            columns = columns_of(name, row, asked, reading)
            write_row(about | columns, asked["results"])
            print(f"{name}: {told_of(columns)}", flush=True)


@contextmanager
def processes(asked: Mapping[str, str], clock: Clock) -> Generator[Ask]:
    """Processes that measure: a new one each time, which finds the card as a run would; on a CPU one for all."""
    logs, shared = Path(asked["logs"] or asked["scratch"]), here().type == "cpu"
    opened: list[tuple[Worker, dict[str, Any]]] = []

    def ask(name: str, row: Row) -> dict[str, Any]:
        if not opened:
            log = logs / ("memory.log" if shared else f"memory-{name}.log")
            worker = open_ours(["benchmarks.memory_run"], log)
            opened.append((worker, worker.hear(clock.left())))
        worker, about = opened[0]
        request = {"row": row._asdict(), "asked": {**asked, "cap": cap_of(row, asked)}}
        try:
            return about | worker.ask(request, clock.left())
        except Failed:
            opened.clear()  # the worker has ended
            raise
        finally:
            if opened and not shared:
                opened.pop()[0].close()

    try:
        yield ask
    finally:
        for worker, _ in opened:
            worker.close()


def searched(name: str, row: Row, asked: Mapping[str, str], clock: Clock, ask: Ask) -> dict[str, Any]:
    """What was measured of the longest sequence; of the shortest that was tried, where none fits."""
    tiny = asked["shape"] == "tiny"
    unit, most = (row.length // 2, 2 * row.length) if tiny else (UNIT, int(asked["most"]))
    refused: list[dict[str, Any] | Failed] = []

    def measure(length: int) -> dict[str, Any] | None:
        try:
            reading = ask(name, row._replace(length=length))
        except Failed as error:  # killed by a host that has too little memory, say
            print(f"{length:,} tokens: it {error}", flush=True)
            refused.append(error)
            return None
        print(f"{length:,} tokens: {reading.get('problem') or seconds_told(reading)}", flush=True)
        if "problem" in reading:
            refused.append(reading)
            return None
        return reading

    _, found, ended = longest(measure, min(row.length, most), most, unit, clock)
    if found is not None:
        return found | {"ended": ended}
    if isinstance(refused[-1], Failed):
        raise refused[-1]
    return refused[-1]


def seconds_told(reading: Mapping[str, Any]) -> str:
    """How long steps took, and in how much memory, in words."""
    step = sum(reading["seconds"]) / len(reading["seconds"])
    held = (f"{gib(reading[name])} GiB {name}" for name in ("allocated", "reserved") if reading[name])
    return ", ".join((f"{step:.1f} s a step", *held))


def told_of(columns: Mapping[str, object]) -> str:
    """The figures of a row in words; of what did not fit, why."""
    if "step_seconds" not in columns:
        return str(columns["note"])
    held = [(columns["peak_allocated_gib"], "allocated"), (columns["peak_reserved_gib"], "reserved")]
    return ", ".join(
        (*(f"{size} GiB {name}" for size, name in held if size), f"{columns['tokens_per_second']} tokens/s")
    )


def cap_of(row: Row, asked: Mapping[str, str]) -> str:
    """The cap of a row, as it is asked for: an amount, or none."""
    return row.cap if asked["cap"] == "own" else asked["cap"]


def allocator_settings() -> str:
    """What the environment asks of PyTorch's allocator, which moves figures; empty: nothing."""
    return os.environ.get("PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""))


def columns_of(name: str, row: Row, asked: Mapping[str, str], reading: Mapping[str, Any]) -> dict[str, object]:
    """The row of results.csv: of what did not fit, without figures."""
    cap = cap_of(row, asked)
    told = {"row": name, "cap": cap, **{key: asked[key] for key in TOLD}}
    told |= {"allocator": allocator} if (allocator := allocator_settings()) else {}
    search = row.kind == "longest"
    told |= {"most": asked["most"]} if search else {"sequences": row.sequences, "length": row.length}
    settings = " ".join([*(f"{key}={value}" for key, value in told.items()), *asked["also"].split()])
    found: dict[str, object] = {
        "benchmark": "memory",
        "system": "burnish",
        "shape": row.shape,
        "storage": row.storage,
        "adapter": "lora" if row.rank else "none",
        "rank": row.rank or "",
        "settings": settings,
        "versions": reading.get("versions", ""),
    }
    if "problem" in reading:
        beyond = "out of memory" if cap == "none" else f"out of memory under {cap}"
        return found | {"note": _joined([f"{beyond}: {reading['problem']}", asked["note"]])}
    seconds = sum(reading["seconds"]) / len(reading["seconds"])
    return found | {
        "tokens_per_step": round(reading["tokens"]),
        "step_seconds": f"{seconds:.4f}",
        "tokens_per_second": f"{reading['tokens'] / seconds:.0f}",
        "peak_allocated_gib": gib(reading["allocated"]),
        "peak_reserved_gib": gib(reading["reserved"]),
        "compile_seconds": f"{reading['first']:.1f}",
        "samples_per_second": f"{row.sequences / seconds:.3f}" if row.kind in ("dpo", "ppo") else "",
        "phases": ppo.shares([dict(reading)]),
        "note": _joined([*reading.get("notes", []), reading.get("ended", ""), asked["note"]]),
    }


def _joined(parts: list[str]) -> str:
    return "; ".join(filter(None, parts))


def read_words(words: list[str]) -> dict[str, str]:
    """Every word of `WORDS`, with the value that is asked for. Raises ValueError naming the word that is wrong."""
    asked = read(words, WORDS, CHOICES, NUMBERS)
    for name in asked["rows"].split(","):
        if name not in ROWS:
            nearest = difflib.get_close_matches(name, ROWS, n=1, cutoff=0.75)
            hint = f"did you mean {nearest[0]}?" if nearest else f"write one or more of {','.join(ROWS)}"
            raise ValueError(f"rows={name} is not known: {hint}")
    memory_bytes(asked["memory"])
    if asked["cap"] not in ("own", "none"):
        try:
            amount = memory_bytes(asked["cap"])
        except ValueError:
            amount = None
        if amount is None:
            raise ValueError(f"cap={asked['cap']} is no amount: write own, none, or an amount such as 48GB or 5.2GiB")
    return asked


if __name__ == "__main__":
    try:
        asked = read_words(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"benchmarks/memory.py: {error}")
    main(asked)
