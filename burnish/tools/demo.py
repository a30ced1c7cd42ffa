"""Fine-tune the embedded base with full, LoRA and QLoRA weights, go on with DPO and with a reward model and PPO, and
compare them all; on any machine in minutes."""

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import Field

from burnish.config import Settings, Stopped, build
from burnish.recipes import dpo, ppo, reward, sft

SFT: dict[str, Any] = {
    "evaluate": {"every": 10},
    "optim": {"lr": 1e-3, "schedule": "linear", "warmup": 0.1},
    # Not all of the data: examples of what is right leave something for preferences to teach.
    "run": {"step_tokens": 1024, "microbatch_tokens": 1024, "epochs": 0.6},
}

STAGES: dict[str, tuple[ModuleType, list[dict[str, Any]]]] = {
    "full": (sft, [SFT, {"model": {"storage": "full"}}]),
    "lora": (sft, [SFT, {"model": {"storage": "bf16"}}]),
    "qlora": (sft, [SFT, {"model": {"storage": "nf4"}}]),
    "dpo": (
        dpo,
        [
            {"from": "lora", "loss": {"sigmoid": 1.0, "sft": 1.0}, "optim": {"lr": 5e-4}},
            {"run": {"step_tokens": 2048, "microbatch_tokens": 1024, "steps": 40}},
        ],
    ),
    "reward": (
        reward,
        [{"from": "lora", "optim": {"lr": 2e-3}}, {"run": {"step_tokens": 4096, "microbatch_tokens": 1024}}],
    ),
    "ppo": (
        ppo,
        [
            {"from": "lora", "reward": {"path": "reward"}, "data": {"max_length": 256}, "optim": {"lr": 1e-3}},
            {"rollout": {"prompts": 64, "max_tokens": 24}, "minibatches": 2},
            {"run": {"step_tokens": 2048, "microbatch_tokens": 2048, "steps": 25}},
        ],
    ),
}
"""Folder name -> the recipe, and what it is told; a folder's name stands for its run."""

SHARED: dict[str, Any] = {
    "model": {},
    "data": {"path": "embedded", "max_length": 512},
    "evaluate": {"path": "embedded", "general": "embedded", "prompts": 442, "max_tokens": 24},
    "save": {"every": 0},
}

QUICK: dict[str, Any] = {"run": {"steps": 4}, "evaluate": {"prompts": 24, "general": None}, "data": {"limit": 300}}
"""A few steps, few rows and few questions."""
QUICK_ROLLOUT: dict[str, Any] = {"rollout": {"prompts": 8, "max_tokens": 16, "stop": ["a", "e", "i"]}}
"""After a few steps of SFT no answer ends with its end token, which PPO would refuse."""


class Config(Settings):
    """Where the demo writes, and how long it takes."""

    out: str = Field(default="runs/demo", description="The folder for the runs, the table and report.html.")
    quick: bool = Field(default=False, description="A few steps of each method only: does it work here?")


def main(config: Config, as_json: bool) -> None:
    """Runs the methods, prints the table, and writes the report; an earlier demo in the folder is replaced."""
    out, mark = Path(config.out), Path(config.out) / "demo.json"
    if out.exists() and any(out.iterdir()) and not mark.exists():
        raise ValueError(f"out={out} is not empty and holds no earlier demo; write out=DIR with a new path")
    out.mkdir(parents=True, exist_ok=True)
    mark.write_text(json.dumps({"quick": config.quick}) + "\n", encoding="utf-8")
    for name in STAGES:
        shutil.rmtree(out / name, ignore_errors=True)

    for number, (name, (recipe, told)) in enumerate(STAGES.items(), start=1):
        print(f"[{number}/{len(STAGES)}] {name}: a run in {out / name}", file=sys.stderr)
        with contextlib.redirect_stdout(io.StringIO()):  # its audit and table are in its folder; the comparison is ours
            try:
                recipe.main(build(recipe.Config, _settings(told, name, out, config.quick)))
            except Stopped:
                raise Stopped("stopped; the same command runs the demo anew") from None

    from burnish.report.results import compare, show

    rows = compare([out / name for name in STAGES], out, "Full, LoRA, QLoRA, DPO and PPO on the embedded base")
    if as_json:
        print(json.dumps({"runs": rows, "report": str(out / "report.html")}))
    else:
        show(rows, out)


def _settings(told: list[dict[str, Any]], name: str, out: Path, quick: bool) -> dict[str, Any]:
    """The settings of one run: what all share, what is its own, and fewer of everything when quick."""
    tree: dict[str, Any] = {}
    rollout = [QUICK_ROLLOUT] if "rollout" in {key for part in told for key in part} else []
    for part in (SHARED, *told, *([QUICK, *rollout] if quick else []), {"run": {"folder": str(out / name)}}):
        for key, value in part.items():
            tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) and key != "loss" else value
    if "from" in tree:
        tree["from"] = str(out / tree["from"])
    if "path" in tree.get("reward", {}):
        tree["reward"] = {"path": str(out / tree["reward"]["path"])}
    return tree
