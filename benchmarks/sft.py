"""Tokens per second and peak memory of a training step, beside TRL and Unsloth in the same run.

python -m benchmarks.sft [row=qlora] [shape=llama-2-7b] [storage=nf4] [lengths=fixed] [sequences=4] [length=2048]
                         [sides=fast,lean] [systems=burnish,trl,unsloth] [lean=least] [memory=...] [fp8=false,true]
                         [rounds=2] [peers=DIR] [scratch=/dev/shm/burnish-peers] [logs=DIR] [results=FILE] [seconds=540]
                         [commit=HASH] [note=TEXT]

`row` is a name of `ROWS`, a row of the table in docs/performance.md; words after it change it. Random weights, random
ids, every token trained on. `storage=full16` and `full` train all weights, in bf16 or fp32; otherwise LoRA of rank 16
on all linear layers is trained.
`lengths=alpaca` draws ragged rows. The systems of a side are loaded at once and take turns (`turns.py`), but with all
weights in training each is loaded anew for its turn. `fast`: everything kept; `lean`: the least memory, for Burnish
each of the amounts in `lean=`. Without `peers=`, what `peers/fetch.py` makes, only Burnish is measured. `memory=` is a
list of amounts in place of the sides'.
"""

import json
import random
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks.contest import Entry, contest, model_folders, open_ours, open_peer, peers_missing, row_of
from benchmarks.meter import Meter, device_gib, give_back, here, needs_cuda, stamp
from benchmarks.models import ALPHA, RANK, open_random
from benchmarks.rows import PLACES, write_row
from benchmarks.rows import read_words as read
from benchmarks.shapes import SHAPES
from benchmarks.turns import Clock, Failed, Worker, listen, say
from benchmarks.workload import ALPACA_BATCH, LENGTHS, MEAN, rows_of, sides_at_once, turn_of
from burnish import __version__
from burnish.data.packing import collate, pack
from burnish.engine.assemble import open_learner
from burnish.engine.mesh import Mesh
from burnish.losses.likelihood import cross_entropy
from burnish.settings import OptimSettings, memory_bytes
from burnish.types import Batch, Sequence

WORDS = {
    "row": "qlora",
    "shape": "llama-2-7b",
    "storage": "nf4",
    "lengths": "fixed",
    "sequences": "4",
    "length": "2048",
    "sides": "fast,lean",
    "systems": "burnish,trl,unsloth",
    "lean": "least",
    "memory": "",
    "fp8": "false,true",
    "rounds": "2",
    "peers": "",
    **PLACES,
}
"""What can be asked for, and what is measured where it is not."""
ROWS: Mapping[str, Mapping[str, str]] = {
    "qlora": {"lean": "least,6GB"},  # 6GB: what Unsloth takes where it takes the least
    "qlora-8b": {"shape": "llama-3.1-8b"},
    # a third model of 14 GB leaves no room on 80 GB; 15GB: less than Unsloth takes where it takes the least
    "lora": {"storage": "bf16", "systems": "burnish,unsloth", "lean": "least,15GB"},
    "ragged": {"lengths": "alpaca"},
    "full": {"storage": "full16", "systems": "burnish,trl"},
    "small": {"shape": "qwen-2.5-0.5b", "storage": "bf16", "sequences": "1", "sides": "fast"},
}
CHOICES = {"row": ROWS, "shape": SHAPES, "storage": ("nf4", "bf16", "full16", "full"), "lengths": LENGTHS}
NUMBERS = ("sequences", "length", "rounds", "seconds")
LISTS = {"sides": ("fast", "lean"), "systems": ("burnish", "trl", "unsloth"), "fp8": ("false", "true")}

KEPT = {"checkpointing": False, "liger": True, "packing": False, "attention": "sdpa", "optimizer": "adamw_8bit"}
RECOMPUTED = KEPT | {"checkpointing": True}
DEFAULT = RECOMPUTED | {"liger": False, "optimizer": "default", "batch": "default"}
BATCHES_OF_EIGHT = RECOMPUTED | {"batch": ALPACA_BATCH}
PEERS: Mapping[str, Mapping[str, tuple[Mapping[str, Any], ...]]] = {
    "fast": {"trl": (KEPT,), "unsloth": (KEPT,)},
    "lean": {"trl": (RECOMPUTED,), "unsloth": (RECOMPUTED,)},
    "ragged": {
        "trl": (DEFAULT, KEPT | {"packing": True, "attention": "varlen"}),
        "unsloth": (BATCHES_OF_EIGHT, KEPT | {"packing": True}),
    },
    "full": {"trl": (RECOMPUTED | {"optimizer": "paged_adamw_8bit"},), "unsloth": (RECOMPUTED,)},
}
"""The settings of the peers for each side. `liger` and `attention` are read by TRL alone: Unsloth has its own."""
OURS = {
    "fast": {"memory": "auto", "optimizer": "adamw"},
    "lean": {"memory": "least", "optimizer": "adamw8bit"},
    "ragged": {"memory": "auto", "optimizer": "adamw"},
    "full": {"memory": "auto", "optimizer": "adamw8bit"},
}
"""Burnish's settings for each side."""


def main(asked: Mapping[str, str]) -> None:
    """Measures side after side what is asked for; prints the rows and adds them to results.csv."""
    needs_cuda("benchmarks/sft.py", asked["shape"])
    clock = Clock(float(asked["seconds"]))
    model = Path(asked["scratch"]) / "model"
    with ExitStack() as stack:
        with_peers = False
        if reason := peers_missing(asked["peers"]):
            print(f"TRL and Unsloth are left out: {reason}", flush=True)
        elif asked["systems"] != "burnish":
            try:
                stack.enter_context(model_folders(asked["shape"], model))
                with_peers = True
            except Failed as error:
                print(f"TRL and Unsloth are left out: {error}", flush=True)
        sides = sides_of(asked)
        num_peers = sum(len(theirs(asked, side)) for side in sides) if with_peers else 0
        for chosen in sides_at_once(asked, sides, num_peers, device_gib()):
            entries = [entry for side in chosen for entry in ours(asked, side)]
            entries += [entry for side in chosen if with_peers for entry in theirs(asked, side)]
            measure(asked, entries, clock, together=not trains_all(asked))


def measure(asked: Mapping[str, str], entries: list[Entry], clock: Clock, together: bool) -> None:
    """Lets the entries take turns, and writes their rows."""
    scratch, logs = Path(asked["scratch"]), Path(asked["logs"] or asked["scratch"])

    def open_worker(name: str) -> Worker:
        log = logs / f"sft-{name}.log"
        if name.startswith("burnish"):
            return open_ours(["benchmarks.sft", "serve", *(f"{key}={value}" for key, value in asked.items())], log)
        setting = next(entry.request for entry in entries if entry.worker == name)
        words = [json.dumps(peer_request(asked, setting, scratch / "model" / "ended"))]
        return open_peer(["benchmarks.peers.sft", *words], Path(asked["peers"]), ["site"], log, scratch / name)

    contest(entries, open_worker, int(asked["rounds"]), clock, together)
    about = stamp(asked["commit"])
    for entry in entries:
        if entry.readings:
            row = about | row_of(entry)
            row["note"] = f"{row['note']}; {asked['note']}".rstrip("; ")
            write_row(row, asked["results"])


def sides_of(asked: Mapping[str, str]) -> list[str]:
    """The sides that are measured one after the other."""
    if trains_all(asked):
        return ["full"]
    return ["ragged"] if asked["lengths"] != "fixed" else asked["sides"].split(",")


def trains_all(asked: Mapping[str, str]) -> bool:
    """Whether all weights are trained, without an adapter."""
    return asked["storage"].startswith("full")


def ours(asked: Mapping[str, str], side: str) -> list[Entry]:
    """What is measured of Burnish: a process each, so that each compiles for itself; it holds no memory in between."""
    entries: list[Entry] = []
    memories = (asked["memory"] or (asked["lean"] if side == "lean" else OURS[side]["memory"])).split(",")
    fp8s = ["false"] if trains_all(asked) else asked["fp8"].split(",")
    for memory in memories if "burnish" in asked["systems"].split(",") else []:
        for fp8 in fp8s:
            setting = {**OURS[side], "memory": memory, "fp8": fp8 == "true"}
            name = f"burnish-{memory}-{'fp8' if setting['fp8'] else 'bf16'}"
            entries.append(Entry(name, name, setting, _columns(asked, "burnish", "", {"side": side, **setting})))
    return entries


def theirs(asked: Mapping[str, str], side: str) -> list[Entry]:
    """What is measured of the peers, a process each."""
    entries: list[Entry] = []
    for system, settings in PEERS[side].items():
        for number, setting in enumerate(settings if system in asked["systems"].split(",") else ()):
            request = {"system": system, "batch": int(asked["sequences"])} | dict(setting)
            unread = ("system", "checkpointing", *(("liger", "attention") if system == "unsloth" else ()))
            told = {key: value for key, value in request.items() if key not in unread}
            columns = _columns(asked, system, setting["checkpointing"], {"side": side, **told})
            entries.append(Entry(f"{system}, {side} {number}", f"{system}-{side}-{number}", request, columns))
    return entries


def peer_request(asked: Mapping[str, str], setting: Mapping[str, Any], model: Path) -> dict[str, Any]:
    """What `peers/sft.py` is told: its setting, and the work."""
    warm_up, timed = turn_of(_tokens(asked, setting))
    numbers = {"length": int(asked["length"]), "turns": int(asked["rounds"]), "warm_up": warm_up, "timed": timed}
    work = {key: asked[key] for key in ("shape", "storage", "lengths")}
    return {**setting, **work, **numbers, "model": str(model), "rank": RANK, "alpha": ALPHA}


def _tokens(asked: Mapping[str, str], setting: Mapping[str, Any]) -> int:
    """About how many tokens a step holds."""
    if asked["lengths"] != "fixed" and not setting.get("packing", True):
        return ALPACA_BATCH * MEAN
    return int(asked["sequences"]) * int(asked["length"])


def _columns(
    asked: Mapping[str, str], system: str, checkpointing: object, setting: Mapping[str, Any]
) -> dict[str, object]:
    told = {**setting, **{key: asked[key] for key in ("lengths", "sequences", "length")}}
    return {
        "benchmark": "sft",
        "system": system,
        "shape": asked["shape"],
        "storage": asked["storage"],
        "adapter": "none" if trains_all(asked) else "lora",
        "rank": "" if trains_all(asked) else RANK,
        "checkpointing": checkpointing,
        "settings": " ".join(
            f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in told.items()
        ),
    }


def serve(asked: Mapping[str, str]) -> None:
    """Burnish's side: a worker that opens the model for each request, and gives all its memory back after it."""
    mesh = Mesh(here())
    say({"versions": f"burnish {__version__} torch {torch.__version__}"})
    while (request := listen()) is not None:
        reading = measured(asked, request, mesh)
        give_back(mesh.device)
        say(reading)


def measured(asked: Mapping[str, str], setting: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """A turn with a setting, on a model of its own."""
    adapter, tokens = "none" if trains_all(asked) else "lora", int(asked["sequences"]) * int(asked["length"])
    optim = OptimSettings(kind=setting["optimizer"], lr=1e-4, schedule="constant", warmup=0)
    given = (setting["memory"], setting["fp8"], tokens, optim)
    decoder, name = open_random(asked["shape"], asked["storage"], adapter, mesh, *given)
    learner = open_learner(decoder, name, optim, 10_000, mesh)
    batches = batches_of(asked)
    meter = Meter(*turn_of(_tokens(asked, setting)), mesh.device)

    def objective(batch: Batch):
        scores = decoder.score(batch, name)
        return cross_entropy(scores.log_probs, batch.weights, scores.correct)

    full = False
    while not full:
        batch = batches[learner.steps_taken % len(batches)].to(mesh.device)
        meter.begin()
        meter.count(len(batch.tokens))
        metrics = learner.step([batch], objective, lambda batch: batch.total_weight)
        full = meter.end()
        print(f"step {learner.steps_taken}: loss {metrics['loss']:.4f}", flush=True)
    return meter.reading()


def batches_of(asked: Mapping[str, str]) -> list[Batch]:
    """The work as batches: rows of one length side by side, or ragged ones packed into as many tokens."""
    sequences, length = int(asked["sequences"]), int(asked["length"])
    rows = [Sequence(tuple(ids), (1.0,) * len(ids), i) for i, ids in enumerate(rows_of(asked, 4 * sequences))]
    packs = pack([len(row.ids) for row in rows], sequences * length)
    random.Random(0).shuffle(packs)  # as they come, the first hold the longest rows
    return [collate([rows[i] for i in chosen]) for chosen in packs]


def read_words(words: list[str]) -> dict[str, str]:
    """Every word of `WORDS`, with the value that is asked for. Raises ValueError naming the word that is wrong."""
    row = next((word.removeprefix("row=") for word in words if word.startswith("row=")), "")
    asked = read(words, {**WORDS, **ROWS.get(row, {})}, CHOICES, NUMBERS, LISTS)
    for amount in [*asked["lean"].split(","), *(asked["memory"].split(",") if asked["memory"] else [])]:
        memory_bytes(amount)
    return asked


if __name__ == "__main__":
    serving = sys.argv[1:2] == ["serve"]
    try:
        asked = read_words(sys.argv[2:] if serving else sys.argv[1:])
    except ValueError as error:
        sys.exit(f"benchmarks/sft.py: {error}")
    (serve if serving else main)(asked)
