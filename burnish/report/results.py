"""What a run comes to: its row of numbers, in results.json, table.md, report.html and on the terminal."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from burnish.report.folders import Row, labels, read_run, start_of, write_whole
from burnish.report.page import write_page
from burnish.report.table import FULL, table
from burnish.report.units import listing

if TYPE_CHECKING:  # torch stays out of `burnish report`, which only reads files
    from torch import nn

    from burnish.engine.run import Run

ADAPTER_NAMES = {"lora": "LoRA", "dora": "DoRA", "ia3": "IA³"}


def method_name(storage: str, adapter_kind: str, learned: str = "") -> str:
    """What people call the method: full fine-tuning, LoRA, QLoRA (on a base in 4 bits), and so on.

    `learned` is how it learned, where that was not from examples: `LoRA + DPO`, `QLoRA + PPO`, `LoRA + reward model`.
    """
    if adapter_kind == "none":
        name, bits = (f"Full + {learned}" if learned else FULL), ", bf16" if storage == "full16" else ""
        return name + bits
    weights = ("Q" if storage == "nf4" else "") + ADAPTER_NAMES.get(adapter_kind, adapter_kind)
    return f"{weights} + {learned}" if learned else weights


def finish(run: "Run", folder: Path, method: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Row:
    """The run's row; on the main rank also its results.json, table.md and report.html, and the table on the terminal.

    `before` and `after` are the judge's verdicts, which `Run.once` has left in the folder.
    """
    row: Row = {
        "method": method,
        "trainable_parameters": sum(parameter.numel() for parameter in run.parameters.values()),
        "total_parameters": num_parameters(run.model),
        "peak_memory_bytes": run.peak_bytes,
        "seconds": run.seconds,
        "metrics": dict(after.get("metrics", {})),
        "before": dict(before.get("metrics", {})),
        "run": folder.resolve().name,
        **start_of(folder),
    }
    if run.explained is not None:
        row["peak"] = run.explained
    if "scorer" in after:
        row["scorer"] = after["scorer"]
    if run.mesh.is_main:
        _write_rows(folder, [row])
        write_page([folder], folder / "report.html", method)
        show([row], folder)
    return row


def compare(folders: Sequence[Path], out: Path, title: str | None = None) -> list[Row]:
    """The rows of finished runs, whose results.json, table.md and report.html are now in `out`.

    The title of the page is the runs' names unless one is given. Raises ValueError when one of the folders holds no
    finished run, when there is none, or when `out` is itself the folder of a run.
    """
    if not folders:
        raise ValueError("there is no run to compare: write runs=[runs/a,runs/b]")
    if (out / "config.yaml").exists():
        raise ValueError(
            f"out={out} is the folder of a run, whose own report this would replace; write another out=DIR"
        )
    rows = [read_run(folder).row for folder in folders]
    out.mkdir(parents=True, exist_ok=True)
    _write_rows(out, rows)
    write_page(folders, out / "report.html", title or listing(labels(rows)))
    return rows


def show(rows: Sequence[Row], folder: Path) -> None:
    """Print the table, and where the page is."""
    tqdm.write(f"\n{table(rows)}\n\nreport: {folder / 'report.html'}")  # a progress bar may stand on the line


def num_parameters(model: "nn.Module") -> int:
    """How many weights a model has, adapters included: a 4-bit weight counts as one, a shared one once."""
    total, counted = 0, set[int]()
    for module in model.modules():
        stored: Any = getattr(module, "stored", None)
        if stored is None:
            continue
        parts = {id(parameter) for parameter in stored.parameters()}
        if parts - counted:
            total += math.prod(stored.shape)
            counted |= parts
    return total + sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in counted)


def _write_rows(folder: Path, rows: Sequence[Row]) -> None:
    write_whole(folder / "results.json", json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    write_whole(folder / "table.md", table(rows) + "\n")
