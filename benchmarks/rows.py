"""What a benchmark is asked for, and the row of results.csv that it leaves. Imports no torch."""

import csv
import difflib
import subprocess
from collections.abc import Collection, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType

RESULTS = Path(__file__).with_name("results.csv")
COLUMNS = [
    "date",
    "commit",
    "device",
    "torch",
    "benchmark",
    "system",
    "shape",
    "storage",
    "adapter",
    "rank",
    "checkpointing",
    "tokens_per_step",
    "step_seconds",
    "tokens_per_second",
    "peak_allocated_gib",
    "peak_reserved_gib",
    "compile_seconds",
    "note",
    "samples_per_second",
    "settings",
    "phases",
    "versions",
]
"""New ones come at the end: rows of earlier days stay as they are. A sample is a pair of DPO, an answer of PPO."""

CPU = "CPU"
"""The device of a trial, which measures nothing."""

PLACES: Mapping[str, str] = {
    "scratch": "/dev/shm/burnish-peers",
    "logs": "",
    "results": "",
    "seconds": "540",
    "commit": "",
    "note": "",
}
"""What every contest and table can be asked for: where it works and writes, how long, and what its rows say of it."""


def read_words(
    words: list[str],
    known: Mapping[str, str],
    choices: Mapping[str, Collection[str]],
    numbers: Collection[str],
    lists: Mapping[str, Collection[str]] = MappingProxyType({}),
) -> dict[str, str]:
    """Every known word with the value that is asked for. Raises ValueError naming the word that is wrong."""
    given: dict[str, str] = {}
    for word in words:
        key, _, value = word.partition("=")
        if key not in known or "=" not in word:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {nearest[0]}=...?" if nearest else f"known are {', '.join(known)}"
            raise ValueError(f"{word} is not known: {hint}")
        if key in given:
            raise ValueError(f"'{key}' is given twice: leave one out")
        given[key] = value
    asked = {**known, **given}
    for key, allowed in choices.items():
        if asked[key] not in allowed:
            raise ValueError(f"{key}={asked[key]} is not known: write one of {', '.join(allowed)}")
    for key, allowed in lists.items():
        if not set(asked[key].split(",")) <= set(allowed):
            raise ValueError(f"{key}={asked[key]} is not known: write one or more of {','.join(allowed)}")
    for key in numbers:
        if not asked[key].isdecimal() or int(asked[key]) < 1:
            raise ValueError(f"{key}={asked[key]} must be a whole number above 0")
    return asked


def current_commit() -> str:
    """The short hash of the commit that is measured; empty outside a git checkout."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:  # a machine without git: commit=HASH says it
        return ""


def measured(rows: Iterable[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """The rows without those of trials."""
    return [row for row in rows if row["device"] != CPU]


def write_row(row: Mapping[str, object], results: str | Path = "") -> None:
    """Print the row, with today's date, and append it to results.csv; that of a trial only to a file that is named."""
    dated = {"date": datetime.now(UTC).date().isoformat(), **row}
    print(" ".join(f"{key}={value}" for key, value in dated.items()), flush=True)
    if not results and row.get("device") == CPU:
        print("a trial on a CPU: the row is not kept; results=FILE keeps it", flush=True)
        return
    path = Path(results or RESULTS)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or not path.stat().st_size
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(dated)
