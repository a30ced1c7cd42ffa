"""Pipeline files of small stages on a tiny model."""

import json
from pathlib import Path
from typing import Any

import yaml

from tests.tiny import tiny_data, tiny_folder


def base_folder(folder: Path) -> Path:
    """A tiny model and a few rows for it."""
    tiny_folder(folder / "model")
    tiny_data(folder / "data.jsonl")
    return folder


def tree(base: Path, folder: Path, **stages: dict[str, Any]) -> dict[str, Any]:
    """A pipeline of small stages: those given, or two of fine-tuning, the second on what the first left."""
    given = stages or {"first": {}, "second": {"from": "first", "optim.lr": 0.02}}
    return {
        "folder": str(folder),
        "shared": {
            "model": {"path": str(base / "model")},
            "data": {"path": str(base / "data.jsonl"), "max_length": 128},
            "adapter": {"rank": 2},
            "evaluate.fraction": 0.1,
            "optim": {"lr": 0.01},
            "run": {"steps": 3, "step_tokens": 128, "device": "cpu"},
            "save": {"trackers": [], "every": 1},
        },
        "stages": {name: {"recipe": "sft", **own} for name, own in given.items()},
    }


def written(pipeline: dict[str, Any], place: Path) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    path = place / "pipeline.yaml"
    path.write_text(yaml.safe_dump(pipeline, sort_keys=False))
    return path


def all_recipes(base: Path, folder: Path) -> dict[str, Any]:
    """Fine-tuning, then a reward model and reinforcement, and DPO beside them, in as few steps as possible."""
    answers = "".join(
        json.dumps({"prompt": f"say {i}", "chosen": f"{i} is what I say", "rejected": "no " * (1 + i % 3)}) + "\n"
        for i in range(30)
    )
    (base / "pairs.jsonl").write_text(answers)
    pairs = {"path": str(base / "pairs.jsonl")}
    pipeline = tree(
        base,
        folder,
        sft={"run.steps": 40, "optim.lr": 0.03},  # until some answers end by themselves
        reward={"recipe": "reward", "from": "sft", "data": pairs},
        ppo={
            "recipe": "ppo",
            "from": "sft",
            "reward.path": "reward",
            "data": pairs,
            "rollout": {"prompts": 12, "max_tokens": 20},
            "minibatches": 2,
            "evaluate": {"prompts": 3, "max_tokens": 6},
        },
        dpo={"recipe": "dpo", "from": "sft", "data": pairs, "beta": 0.5, "evaluate": {"prompts": 3, "max_tokens": 6}},
    )
    pipeline["shared"]["run"]["steps"] = 2
    return pipeline
