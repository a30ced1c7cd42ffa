"""What moved by more than 5 % since the last recorded row of the same work on the same device.

python -m benchmarks.compare [new=FILE] [results=benchmarks/results.csv]

New are the rows of `new=`, or else those of the commit that stands last in `results`: the last of each work is held
against the last one recorded before it. Exits with 1 where Burnish became slower, needs more memory, finds less room
for the longest sequence or no longer fits; peers, reserved memory and the first step are told, but decide nothing.
Trials on a CPU are left out.
"""

import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.rows import COLUMNS, RESULTS, measured, read_words

WORDS = {"new": "", "results": str(RESULTS)}
WORK = ("benchmark", "system", "device", "shape", "storage", "adapter", "rank", "checkpointing", "settings")
"""What rows of the same work agree in; their tokens a step are the same within the margin, too."""
HIGHER_IS_BETTER = {"tokens_per_second": True, "step_seconds": False, "peak_allocated_gib": False}
TOLD = {"peak_reserved_gib": False, "compile_seconds": False}
FIGURES = ("tokens_per_step", *HIGHER_IS_BETTER, *TOLD)
"""Columns of numbers; what a row does not measure is empty."""
MARGIN = 0.05
Row = Mapping[str, str]


def main(asked: Mapping[str, str]) -> None:
    """Prints what moved, and exits with 1 when something became worse."""
    new = measured(read_rows(Path(asked["new"]))) if asked["new"] else None
    pairs = pairs_of(measured(read_rows(Path(asked["results"]))), new)
    compared = [(before, after) for before, after in pairs if before]
    if not compared:
        print(f"none of the {len(pairs)} new rows was measured before on this device")
        sys.exit(0)
    moved = [line for pair in compared for line in moves(*pair)]
    worse = [line for line in moved if line.endswith(": worse")]
    print("\n".join(moved) or "nothing moved by more than 5 %")
    print(f"{len(compared)} of {len(pairs)} new rows were measured before, {len(worse)} figures are worse")
    sys.exit(bool(worse))


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a file of results, in its order.

    Raises ValueError without the file, its line of column names, or a number where one is to be.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no file: write new= and results= with files of rows")
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, restval="")
        if missing := [column for column in COLUMNS if column not in (reader.fieldnames or ())]:
            raise ValueError(f"{path} has no column {missing[0]}: its first line is to be that of {RESULTS.name}")
        rows = list(reader)
    for number, row in enumerate(rows, 2):
        for column in FIGURES:
            if not is_figure(row[column]):
                raise ValueError(f"{path}, row {number}: {column}={row[column]} is no number: mend or delete the row")
    return rows


def is_figure(text: str) -> bool:
    """Whether a cell holds a number, or nothing."""
    try:
        return not text or float(text) >= 0
    except ValueError:
        return False


def pairs_of(recorded: Sequence[Row], new: Sequence[Row] | None) -> list[tuple[Row | None, Row]]:
    """(before, after) for the last new row of every work; None for work that was not measured before."""
    rows = [*recorded, *(new or [])]
    if new is None:
        added = [index for index, row in enumerate(rows) if row["commit"] == rows[-1]["commit"]]
    else:
        added = range(len(recorded), len(rows))
    last = {work_of(rows[index]): index for index in added}
    pairs: list[tuple[Row | None, Row]] = []
    for index in last.values():
        earlier = reversed(rows[: index if new is None else len(recorded)])
        pairs.append((next((row for row in earlier if same_work(row, rows[index])), None), rows[index]))
    return pairs


def same_work(before: Row, after: Row) -> bool:
    """Whether the same was measured; what does not fit has no tokens, and the longest sequence's are its result."""
    if work_of(before) != work_of(after):
        return False
    return "row=longest" in after["settings"].split() or not moved(before, after, "tokens_per_step")


def work_of(row: Row) -> tuple[str, ...]:
    """What was measured."""
    return tuple(row[column] for column in WORK)


def moved(before: Row, after: Row, column: str) -> bool:
    """Whether a figure that both have moved by more than the margin."""
    old, now = (float(row[column] or 0) for row in (before, after))
    return bool(old and now) and abs(now - old) > MARGIN * old


def moves(before: Row, after: Row) -> list[str]:
    """A line for every figure of a row that moved by more than the margin, or for what fits only in one of them."""
    kept = f"checkpointing={after['checkpointing']}" if after["checkpointing"] else ""
    what = (after[name] for name in ("benchmark", "system", "shape", "storage", "adapter", "rank"))
    told = " ".join(filter(None, (*what, kept, after["settings"])))
    told += f" ({after['device']}, {before['commit']} to {after['commit']})"
    ours, fitted, fits = after["system"] == "burnish", before["step_seconds"], after["step_seconds"]
    if not (fitted and fits):
        said = f"no longer fits: {'worse' if ours else 'noted'}" if fitted else "fits now: better"
        return [f"{told}: {said}"] if fitted or fits else []
    judged = {**HIGHER_IS_BETTER, **TOLD}
    if before["tokens_per_second"]:
        del judged["step_seconds"]  # the same figure again
    if moved(before, after, "tokens_per_step"):
        judged = {"tokens_per_step": True}  # the longest sequence: all else is of another length
    lines: list[str] = []
    for column, higher_is_better in judged.items():
        if not moved(before, after, column):
            continue
        old, now = float(before[column]), float(after[column])
        better = (now > old) == higher_is_better
        verdict = "better" if better else "worse" if ours and column not in TOLD else "noted"
        lines.append(f"{told}: {column} {old:g} -> {now:g}, {100 * (now / old - 1):+.1f} %: {verdict}")
    return lines


if __name__ == "__main__":
    try:
        main(read_words(sys.argv[1:], WORDS, {}, ()))
    except ValueError as error:
        sys.exit(f"benchmarks/compare.py: {error}")
