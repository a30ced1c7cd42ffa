"""Fine-tune the embedded base with full, LoRA and QLoRA weights and compare the three, on any machine in minutes."""

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from pydantic import Field

from burnish.config import Settings, Stopped, build
from burnish.recipes import sft

METHODS: dict[str, dict[str, Any]] = {
    "full": {"model": {"storage": "full"}},
    "lora": {"model": {"storage": "bf16"}},
    "qlora": {"model": {"storage": "nf4"}},
}
"""Folder name -> what sets the method apart."""

SHARED: dict[str, Any] = {
    "model": {"path": "embedded"},
    "data": {"path": "embedded", "max_length": 512},
    "evaluate": {"path": "embedded", "general": "embedded", "prompts": 442, "max_tokens": 24, "every": 17},
    "optim": {"lr": 1e-3, "schedule": "linear", "warmup": 0.1},
    "run": {"step_tokens": 1024, "microbatch_tokens": 1024, "epochs": 1},
    "save": {"every": 0},
}


class Config(Settings):
    """Where the demo writes, and how long it takes."""

    out: str = Field(default="runs/demo", description="The folder for the three runs, the table and report.html.")
    quick: bool = Field(default=False, description="A few steps of each method only: does it work here?")


def main(config: Config, as_json: bool) -> None:
    """Runs the three methods, prints the table, and writes the report; an earlier demo in the folder is replaced."""
    out, mark = Path(config.out), Path(config.out) / "demo.json"
    if out.exists() and any(out.iterdir()) and not mark.exists():
        raise ValueError(f"out={out} is not empty and holds no earlier demo; write out=DIR with a new path")
    out.mkdir(parents=True, exist_ok=True)
    mark.write_text(json.dumps({"quick": config.quick}) + "\n", encoding="utf-8")
    for name in METHODS:
        shutil.rmtree(out / name, ignore_errors=True)

    for number, (name, own) in enumerate(METHODS.items(), start=1):
        print(f"[{number}/{len(METHODS)}] {name}: a run in {out / name}", file=sys.stderr)
        with contextlib.redirect_stdout(io.StringIO()):  # its audit and table are in its folder; the comparison is ours
            try:
                sft.main(build(sft.Config, _settings(own, out / name, config.quick)))
            except Stopped:
                raise Stopped("stopped; the same command runs the demo anew") from None

    from burnish.report.results import compare, show

    rows = compare([out / name for name in METHODS], out, "Full, LoRA and QLoRA on the embedded base")
    if as_json:
        print(json.dumps({"runs": rows, "report": str(out / "report.html")}))
    else:
        show(rows, out)


def _settings(own: dict[str, Any], folder: Path, quick: bool) -> dict[str, Any]:
    """The settings of one of the three runs: what they share, what is its own, and fewer of everything when quick."""
    groups = {key: {**SHARED.get(key, {}), **own.get(key, {})} for key in (*SHARED, *own)}
    groups["run"]["folder"] = str(folder)
    if quick:
        groups["run"]["steps"] = 4
        groups["evaluate"] |= {"prompts": 24, "general": None}
    return groups
