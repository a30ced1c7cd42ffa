"""Pairs per second and peak memory of a DPO step with QLoRA, beside TRL and Unsloth in the same run.

python -m benchmarks.dpo [shape=llama-2-7b] [storage=nf4] [pairs=2] [prompt=512] [answer=512] [rounds=2]
                         [sides=fast,lean] [systems=trl,unsloth] [peers=DIR] [scratch=/dev/shm/burnish-peers]
                         [logs=DIR] [results=FILE] [seconds=540] [commit=HASH] [note=TEXT]

Random weights, random ids, fixed lengths, LoRA of rank 16 on all linear layers; every answer token is scored. All
systems are loaded at once and take turns (`turns.py`): a turn is 3 steps of warm-up and 5 timed ones, the device
synchronised at both ends of each. A row holds the median over the rounds, and the highest
`torch.cuda.max_memory_allocated` of timed steps. `peers=` is where `.peers/peers.tar.gz` was unpacked; without it only
Burnish is measured. The reference is the model without its adapter, in every step, or its log-probs from before
(cached). `fast`: everything kept; `lean`: the least memory, activations computed twice. One side loads sooner.
"""

import random
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks.contest import Entry, contest, model_folders, open_ours, open_peer, peers_missing, row_of
from benchmarks.meter import Meter, here, needs_cuda, stamp
from benchmarks.models import RANK, open_random
from benchmarks.rows import PLACES, read_words, write_row
from benchmarks.shapes import FIRST_ID, SHAPES
from benchmarks.turns import Clock, Failed, Worker, listen, say
from burnish import __version__
from burnish.data.comparing import collate_comparisons
from burnish.engine.assemble import open_learner, reference_role
from burnish.engine.learner import Learner
from burnish.engine.mesh import Mesh
from burnish.engine.reference import asked as ask_reference
from burnish.engine.roles import Role
from burnish.losses.preference import Options, pairs_of, preference_loss
from burnish.settings import OptimSettings
from burnish.types import Comparison, PreferenceBatch, Sequence

WORDS = {
    "shape": "llama-2-7b",
    "storage": "nf4",
    "pairs": "2",
    "prompt": "512",
    "answer": "512",
    "rounds": "2",
    "sides": "fast,lean",
    "systems": "trl,unsloth",
    "peers": "",
    **PLACES,
}
CHOICES = {"shape": SHAPES, "storage": ("nf4", "bf16")}
LISTS = {"sides": ("fast", "lean"), "systems": ("trl", "unsloth")}
NUMBERS = ("pairs", "prompt", "answer", "rounds", "seconds")
WARM_UP, TIMED = 3, 5
BETA = 0.1
OURS = (
    {"memory": "auto", "fp8": False, "reference": "each step", "prefix_sharing": True},
    {"memory": "auto", "fp8": False, "reference": "cached", "prefix_sharing": True},
    {"memory": "auto", "fp8": True, "reference": "each step", "prefix_sharing": True},
    {"memory": "auto", "fp8": True, "reference": "cached", "prefix_sharing": True},
    {"memory": "least", "fp8": False, "reference": "each step", "prefix_sharing": True},
    {"memory": "auto", "fp8": False, "reference": "each step", "prefix_sharing": False},
)
PEERS = (
    {"system": "trl", "checkpointing": True, "reference": "each step", "fused": False},
    {"system": "unsloth", "checkpointing": True, "reference": "each step", "fused": False},
    {"system": "trl", "checkpointing": False, "reference": "each step", "fused": True},
    {"system": "unsloth", "checkpointing": False, "reference": "each step", "fused": False},
    {"system": "unsloth", "checkpointing": False, "reference": "each step", "fused": True},
    {"system": "trl", "checkpointing": False, "reference": "cached", "fused": True},
    {"system": "unsloth", "checkpointing": False, "reference": "cached", "fused": True},
)
"""`fused`: Liger's layer kernels in TRL, a loss from hidden states in Unsloth. The first two are known to run."""


def main(asked: Mapping[str, str]) -> None:
    """Measures Burnish and, where they are, its peers; prints the rows and adds them to results.csv."""
    needs_cuda("benchmarks/dpo.py", asked["shape"])
    clock = Clock(float(asked["seconds"]))
    scratch, logs = Path(asked["scratch"]), Path(asked["logs"] or asked["scratch"])
    entries, peers = ours(asked), Path(asked["peers"])

    def open_worker(name: str) -> Worker:
        log = logs / f"dpo-{name}.log"
        if name.startswith("burnish"):
            return open_ours(["benchmarks.dpo", "serve", *(f"{key}={value}" for key, value in asked.items())], log)
        setting = next(entry.request for entry in entries if entry.worker == name)
        words = peer_words(asked, setting, scratch / "model" / "ended")
        return open_peer(["benchmarks.peers.dpo", *words], peers, ["site"], log, scratch / name)

    with ExitStack() as stack:
        if reason := peers_missing(asked["peers"]):
            print(f"TRL and Unsloth are left out: {reason}", flush=True)
        else:
            try:
                stack.enter_context(model_folders(asked["shape"], scratch / "model"))
                entries += theirs(asked)
            except Failed as error:
                print(f"TRL and Unsloth are left out: {error}", flush=True)
        contest(entries, open_worker, int(asked["rounds"]), clock, together=True)
    about = stamp(asked["commit"])
    pairs = int(asked["pairs"])
    tokens = pairs * 2 * (int(asked["prompt"]) + int(asked["answer"]))
    for entry in entries:
        if entry.readings:
            row = about | row_of(entry, pairs, tokens)
            row["note"] = f"{row['note']}; {asked['note']}".rstrip("; ")
            write_row(row, asked["results"])


def ours(asked: Mapping[str, str]) -> list[Entry]:
    """What is measured of Burnish: a process for a model and batches of one size, each compiled for its own."""
    entries: list[Entry] = []
    for setting in OURS:
        if side_of(setting) not in asked["sides"].split(","):
            continue
        worker = f"burnish-{setting['memory']}-{'fp8' if setting['fp8'] else 'bf16'}"
        worker += "" if setting["prefix_sharing"] else "-unshared"
        columns = _columns(asked, "burnish", setting)
        entries.append(Entry(f"burnish, {_words(setting)}", worker, setting, columns))
    return entries


def theirs(asked: Mapping[str, str]) -> list[Entry]:
    """What is measured of the peers, a process each."""
    entries: list[Entry] = []
    for number, setting in enumerate(PEERS):
        system = str(setting["system"])
        if system not in asked["systems"].split(",") or side_of(setting) not in asked["sides"].split(","):
            continue
        told = {key: value for key, value in setting.items() if key != "system"}
        columns = _columns(asked, system, told)
        entries.append(Entry(f"{system}, {_words(told)}", f"{system}-{number}", setting, columns))
    return entries


def side_of(setting: Mapping[str, object]) -> str:
    """Whether a setting computes activations twice."""
    return "lean" if setting.get("checkpointing") or setting.get("memory") == "least" else "fast"


def peer_words(asked: Mapping[str, str], setting: Mapping[str, object], model: Path) -> list[str]:
    """The arguments of `peers/dpo.py` for a setting."""
    numbers = {
        **{key: asked[key] for key in ("prompt", "answer", "pairs")},
        "turns": asked["rounds"],
        "warm-up": WARM_UP,
        "timed": TIMED,
        "checkpointing": int(bool(setting["checkpointing"])),
        "cached": int(setting["reference"] == "cached"),
        "fused": int(bool(setting["fused"])),
    }
    words = ["--system", str(setting["system"]), "--model", str(model)]
    return words + [word for key, value in numbers.items() for word in (f"--{key}", str(value))]


def _words(setting: Mapping[str, object]) -> str:
    return " ".join(f"{key}={str(value).lower().replace(' ', '-')}" for key, value in setting.items())


def _columns(asked: Mapping[str, str], system: str, setting: Mapping[str, object]) -> dict[str, object]:
    return {
        "benchmark": "dpo",
        "system": system,
        "shape": asked["shape"],
        "storage": asked["storage"],
        "adapter": "lora",
        "rank": RANK,
        "checkpointing": setting.get("checkpointing", ""),
        "settings": _words({key: value for key, value in setting.items() if key != "checkpointing"})
        + f" pairs={asked['pairs']} prompt={asked['prompt']} answer={asked['answer']}",
    }


def serve(asked: Mapping[str, str]) -> None:
    """Burnish's side: a worker whose requests all want one model; the first one opens it."""
    mesh = Mesh(here())
    sizes = [int(asked[key]) for key in ("pairs", "prompt", "answer")]
    comparisons = [random_comparisons(*sizes, SHAPES[asked["shape"]]["vocab_size"], seed) for seed in range(4)]
    meter, opened = Meter(WARM_UP, TIMED, mesh.device), None
    say({"versions": f"burnish {__version__} torch {torch.__version__}"})
    while (request := listen()) is not None:
        batches = [collate_comparisons(units, request["prefix_sharing"]) for units in comparisons]
        tokens = max(len(batch.tokens) for batch in batches)
        learner, policy = opened = opened or open_policy(asked, request, tokens, mesh)
        steps(learner, policy, batches, request["reference"] == "cached", meter)
        say(meter.reading())


def open_policy(asked: Mapping[str, str], setting: Mapping[str, Any], tokens: int, mesh: Mesh) -> tuple[Learner, Role]:
    """The model of a setting, for batches of at most so many tokens, with its optimizer."""
    optim = OptimSettings(lr=1e-4, schedule="constant", warmup=0)
    given = (setting["memory"], setting["fp8"], tokens, optim)
    decoder, name = open_random(asked["shape"], asked["storage"], "lora", mesh, *given)
    learner = open_learner(decoder, name, optim, 10_000, mesh)
    return learner, Role(decoder, name)


def steps(learner: Learner, policy: Role, batches: list[PreferenceBatch], cached: bool, meter: Meter) -> None:
    """A turn of what the recipe does: as many steps as the meter wants, one batch a step."""
    refer = ask_reference(reference_role(policy.model), learner.mesh)
    before = [refer(batch) for batch in batches] if cached else []

    def objective(batch: PreferenceBatch):
        pairs = pairs_of(policy.log_probs(batch), batch.reference_log_probs, batch)
        return preference_loss(pairs, batch.pair_weights, {"sigmoid": 1.0}, Options(beta=BETA))

    full = False
    while not full:
        place = learner.steps_taken % len(batches)
        meter.begin()
        batch = before[place] if cached else refer(batches[place])
        metrics = learner.step([batch], objective, lambda batch: batch.num_pairs)
        full = meter.end()
    graphs = policy.model.fused and policy.model.fused.graphs
    recordings = f" ({graphs.count} passes recorded)" if graphs else ""
    print(f"step {learner.steps_taken}{recordings}: loss {metrics['loss']:.4f}", flush=True)


def random_comparisons(pairs: int, prompt: int, answer: int, vocab_size: int, seed: int) -> list[Comparison]:
    """Pairs of random answers to random prompts, all of one length; every answer token is scored."""
    draw = random.Random(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(FIRST_ID, vocab_size) for _ in range(length))

    weights = (0.0,) * prompt + (1.0,) * answer
    units: list[Comparison] = []
    for row in range(pairs):
        asked = ids(prompt)
        sequences = tuple(Sequence(asked + ids(answer), weights, row) for _ in range(2))
        units.append(Comparison(sequences, ((0, 1, 0.0),)))
    return units


if __name__ == "__main__":
    serving = sys.argv[1:2] == ["serve"]
    try:
        asked = read_words(sys.argv[2:] if serving else sys.argv[1:], WORDS, CHOICES, NUMBERS, LISTS)
    except ValueError as error:
        sys.exit(f"benchmarks/dpo.py: {error}")
    (serve if serving else main)(asked)
