"""What moved by more than 5 % since the last recorded row of the same work on the same device.

python -m benchmarks.compare [new=FILE] [results=benchmarks/results.csv]

With `new=` its rows are held against the last ones in `results`; without, the last row of each work in `results` is
held against the one before it. Exits with 1 where Burnish became slower or needs more memory; peers, reserved memory
and the first step are told, but decide nothing.
"""

import csv
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks.rows import RESULTS, read_words

WORDS = {"new": "", "results": str(RESULTS)}
WORK = ("benchmark", "system", "device", "shape", "storage", "adapter", "rank", "checkpointing", "settings")
"""Columns that say what was measured: rows that agree in them are of the same work."""
HIGHER_IS_BETTER = {"tokens_per_second": True, "step_seconds": False, "peak_allocated_gib": False}
TOLD = {"peak_reserved_gib": False, "compile_seconds": False}
MARGIN = 0.05
Row = Mapping[str, str]


def main(asked: Mapping[str, str]) -> None:
    """Prints what moved, and exits with 1 when something became worse."""
    pairs = pairs_of(read_rows(Path(asked["results"])), read_rows(Path(asked["new"])) if asked["new"] else [])
    moved = [line for before, after in pairs for line in moves(before, after)]
    worse = [line for line in moved if line.endswith(": worse")]
    print("\n".join(moved) or "nothing moved by more than 5 %")
    print(f"{len(pairs)} rows compared, {len(worse)} figures worse")
    sys.exit(bool(worse))


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a file of results, in its order. Raises ValueError when there is no such file."""
    if not path.is_file():
        raise ValueError(f"{path} is not there: write new= and results= with files of rows")
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def pairs_of(recorded: Iterable[Row], new: Iterable[Row]) -> list[tuple[Row, Row]]:
    """(before, after) for every work that was measured before: the last recorded row and the last new one."""
    last: dict[tuple[str, ...], Row] = {}
    pairs: dict[tuple[str, ...], tuple[Row, Row]] = {}
    new = list(new)
    for row in recorded:
        work = work_of(row)
        if not new and work in last:
            pairs[work] = (last[work], row)
        last[work] = row
    for row in new:
        work = work_of(row)
        if work in last:
            pairs[work] = (last[work], row)
    return list(pairs.values())


def work_of(row: Row) -> tuple[str, ...]:
    """What was measured."""
    return tuple(row[column] for column in WORK)


def moves(before: Row, after: Row) -> list[str]:
    """A line for every figure of a row that moved by more than the margin."""
    lines: list[str] = []
    judged = dict(HIGHER_IS_BETTER)
    if before["tokens_per_second"]:
        del judged["step_seconds"]  # the same figure again
    for column, higher_is_better in {**judged, **TOLD}.items():
        old, now = (float(row[column] or 0) for row in (before, after))
        if not old or not now or abs(now - old) <= MARGIN * old:
            continue
        better = (now > old) == higher_is_better
        verdict = "better" if better else "worse"
        if not better and (column in TOLD or after["system"] != "burnish"):
            verdict = "noted"
        told = " ".join(filter(None, (after[name] for name in ("benchmark", "system", "shape", "storage", "settings"))))
        where = f"{after['device']}, {before['commit']} to {after['commit']}"
        lines.append(f"{told} ({where}): {column} {old:g} -> {now:g}, {100 * (now / old - 1):+.1f} %: {verdict}")
    return lines


if __name__ == "__main__":
    try:
        main(read_words(sys.argv[1:], WORDS, {}, ()))
    except ValueError as error:
        sys.exit(f"benchmarks/compare.py: {error}")
