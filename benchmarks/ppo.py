"""Answers per second, share of each phase and peak memory of PPO, beside TRL 1.12's PPO in the same run.

python -m benchmarks.ppo [shape=llama-2-7b] [prompts=64] [prompt=256] [answer=256] [rounds=1] [storages=nf4,bf16]
                         [peers=DIR] [scratch=/dev/shm/burnish-peers] [logs=DIR] [results=FILE] [seconds=540]
                         [commit=HASH] [note=TEXT]

Random weights, random prompts of fixed length, no end token, so that every answer has the length that is asked for;
one epoch of one minibatch. Burnish runs its own recipe, with policy, reference, value and reward as adapters of rank 16
on one base of the shape: all four as large as the base. TRL, whose roles are separate models, gets a LoRA policy of the
shape and a reward and a value model of 350M. Each is given the whole device, one after the other, round after round;
what is timed is an update from its prompts to its optimizer step, after one of warm-up. `peers=` is where
`.peers/peers.tar.gz` was unpacked; without it only Burnish is measured.
"""

import itertools
import json
import random
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.contest import Entry, contest, model_folders, open_ours, open_peer, peers_missing, row_of
from benchmarks.meter import needs_cuda, stamp
from benchmarks.models import ALPHA, RANK
from benchmarks.rows import PLACES, read_words, write_row
from benchmarks.shapes import FIRST_ID, SHAPES
from benchmarks.turns import Clock, Failed, Worker, listen, say
from burnish import __version__
from burnish.config import build
from burnish.recipes import ppo

WORDS = {
    "shape": "llama-2-7b",
    "prompts": "64",
    "prompt": "256",
    "answer": "256",
    "rounds": "1",
    "storages": "nf4,bf16",
    "peers": "",
    **PLACES,
}
CHOICES = {"shape": SHAPES}
LISTS = {"storages": ("nf4", "bf16")}
NUMBERS = ("prompts", "prompt", "answer", "rounds", "seconds")
WARM_UP, TIMED = 1, 2
PEER_MICRO = 8
WAYS = (
    {"slots": 64, "microbatch_tokens": 4096},
    {"slots": 32, "microbatch_tokens": 4096},
)
"""Fast; and lean, with half the cache of keys and values at a time."""
PHASES = ("rollout", "scoring", "observing", "update")
"""As the recipe times them: answers, the reward, log-probs of policy and reference with values, optimizer steps."""


def main(asked: Mapping[str, str]) -> None:
    """Measures Burnish and, where it is, TRL; prints the rows and adds them to results.csv."""
    needs_cuda("benchmarks/ppo.py", asked["shape"])
    clock = Clock(float(asked["seconds"]))
    scratch, logs = Path(asked["scratch"]), Path(asked["logs"] or asked["scratch"])
    entries, peers = ours(asked), Path(asked["peers"])
    if reason := peers_missing(asked["peers"], "trl112"):
        print(f"TRL is left out: {reason}", flush=True)
    else:
        entries = theirs(asked) + entries

    def open_worker(name: str) -> Worker:
        log = logs / f"ppo-{name}.log"
        if name != "trl":
            return open_ours(["benchmarks.ppo", "serve", *(f"{key}={value}" for key, value in asked.items())], log)
        words = peer_words(asked, scratch / "model" / "ended")
        return open_peer(["benchmarks.peers.ppo", *words], peers, ["trl112", "site"], log, scratch / name)

    try:
        with model_folders(asked["shape"], scratch / "model"):
            write_prompts(scratch / "model" / "prompts.jsonl", asked)
            contest(entries, open_worker, int(asked["rounds"]), clock, together=False)
    except Failed as error:
        sys.exit(f"benchmarks/ppo.py: {error}")
    about = stamp(asked["commit"])
    answers = int(asked["prompts"])
    tokens = answers * (int(asked["prompt"]) + int(asked["answer"]))
    for entry in entries:
        if entry.readings:
            row = about | row_of(entry, answers, tokens) | {"phases": shares(entry.readings)}
            row["note"] = f"{row['note']}; {asked['note']}".rstrip("; ")
            write_row(row, asked["results"])


def ours(asked: Mapping[str, str]) -> list[Entry]:
    """What is measured of Burnish, a process each."""
    entries: list[Entry] = []
    for way in WAYS:
        for storage in asked["storages"].split(","):
            told = " ".join(f"{key}={value}" for key, value in way.items())
            columns = _columns(asked, "burnish", storage, "", f"{told} roles=4x{asked['shape']}")
            name = f"burnish-{storage}-{way['slots']}"
            entries.append(Entry(f"{name}, {told}", name, {**way, "storage": storage}, columns))
    return entries


def theirs(asked: Mapping[str, str]) -> list[Entry]:
    """TRL's PPO, as it comes."""
    told = f"micro={PEER_MICRO} roles={asked['shape']}+2x350M"
    return [Entry(f"trl, {told}", "trl", {}, _columns(asked, "trl-ppo", "bf16", True, told))]


def _columns(
    asked: Mapping[str, str], system: str, storage: str, checkpointing: object, told: str
) -> dict[str, object]:
    return {
        "benchmark": "ppo",
        "system": system,
        "shape": asked["shape"],
        "storage": storage,
        "adapter": "lora",
        "rank": RANK,
        "checkpointing": checkpointing,
        "settings": f"{told} prompts={asked['prompts']} prompt={asked['prompt']} answer={asked['answer']}",
    }


def peer_words(asked: Mapping[str, str], model: Path) -> list[str]:
    """The arguments of `peers/ppo.py`."""
    numbers = {key: asked[key] for key in ("prompts", "prompt", "answer")}
    numbers |= {"micro": str(min(PEER_MICRO, int(asked["prompts"]))), "warm-up": str(WARM_UP), "timed": str(TIMED)}
    small = "tiny" if asked["shape"] == "tiny" else "full"
    return ["--model", str(model), "--small", small] + [w for k, v in numbers.items() for w in (f"--{k}", v)]


def shares(readings: list[dict[str, Any]]) -> str:
    """How the time of the timed updates divides into phases, in percent."""
    names = readings[0].get("phases", {})
    total = sum(sum(reading["seconds"]) for reading in readings)
    parts = {name: sum(reading["phases"][name] for reading in readings) / total for name in names}
    return " ".join(f"{name}={100 * part:.0f}%" for name, part in parts.items())


def write_prompts(path: Path, asked: Mapping[str, str]) -> None:
    """Random prompts, each of so many words, which are tokens; the answers beside them are not read."""
    draw, vocab_size = random.Random(0), SHAPES[asked["shape"]]["vocab_size"]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(int(asked["prompts"]) * (WARM_UP + TIMED)):
            words = " ".join(f"w{draw.randrange(FIRST_ID, vocab_size)}" for _ in range(int(asked["prompt"])))
            turns = [{"role": "user", "content": words}, {"role": "assistant", "content": "w4"}]
            file.write(json.dumps({"messages": turns}) + "\n")


def serve(asked: Mapping[str, str]) -> None:
    """Burnish's side: a worker that runs the recipe once for each request."""
    say({"versions": f"burnish {__version__} torch {torch.__version__}"})
    while (request := listen()) is not None:
        say(measured(asked, Path(asked["scratch"]) / "model", request))


def measured(asked: Mapping[str, str], folder: Path, setting: Mapping[str, Any]) -> dict[str, Any]:
    """What the recipe took with a setting, over the updates after warm-up; from the metrics that it keeps itself."""
    length = int(asked["prompt"]) + int(asked["answer"])
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        tree = {
            "model": {"path": str(folder / "endless"), "storage": setting["storage"]},
            "adapter": {"rank": RANK, "alpha": ALPHA},
            "data": {"path": str(folder / "prompts.jsonl"), "max_length": length},
            "evaluate": {"fraction": 0},
            "optim": {"kind": setting.get("optimizer", "adamw")},
            "reward": {"path": str(folder / "reward")},
            "rollout": {
                "prompts": int(asked["prompts"]),
                "max_tokens": int(asked["answer"]),
                "slots": setting["slots"],
            },
            "run": {
                "folder": str(run),
                "steps": WARM_UP + TIMED,
                "memory": setting.get("memory", "auto"),
                "microbatch_tokens": max(setting["microbatch_tokens"], length),
                "step_tokens": max(setting["microbatch_tokens"], length),
            },
            "save": {"every": 0, "trackers": []},
            "minibatches": 1,
            "epochs": 1,
        }
        results = ppo.main(build(ppo.Config, tree))
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return reading_of([json.loads(line) for line in lines], results)


def reading_of(steps: list[dict[str, Any]], results: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's metrics, step by step, as a worker's reading."""
    ends = [0.0, *(step["seconds"] for step in steps if "seconds" in step)]
    seconds = [end - begin for begin, end in itertools.pairwise(ends)]
    timed = [step for step in steps if "seconds" in step][WARM_UP:]
    phases = {name: sum(step[f"{name}_seconds"] for step in timed) for name in PHASES}
    return {
        "seconds": seconds[WARM_UP:],
        "first": seconds[0],
        "allocated": results["peak_memory_bytes"] / 2**30,
        "reserved": torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else 0.0,
        "phases": phases,
    }


if __name__ == "__main__":
    serving = sys.argv[1:2] == ["serve"]
    try:
        asked = read_words(sys.argv[2:] if serving else sys.argv[1:], WORDS, CHOICES, NUMBERS, LISTS)
    except ValueError as error:
        sys.exit(f"benchmarks/ppo.py: {error}")
    (serve if serving else main)(asked)
