"""Whether 8-bit floats in the matmuls of frozen weights change what is learnt: held-out loss of FP8 against bf16.

python -m benchmarks.safety [params=150m] [steps=1000] [every=250] [seeds=6] [pretrain_tokens=25000000] [seconds=315]
                            [workers=N] [at_once=N] [out=FILE] [commit=HASH]

First a model of the embedded world is made from nothing: a Llama of 150 or 300 million parameters, pre-trained with
full weights on the world's text, for at most a quarter of the seconds. Then LoRA of rank 16 on all its linear layers
learns the world's instructions from new questions of the families that have training rows, once for each seed, base
(bf16, NF4) and kind of maths (bf16; FP8 that adds up fast, and on the bf16 base slowly). Runs of one seed see the same
data in the same order and start from the same adapter: they differ in nothing but the maths. Several run at once, each
process one after the other, seed by seed, so that a clock that runs out leaves whole seeds. Every few steps the loss is
measured on questions that no run trains on: new ones of the same families (seen), ones of other families (unseen), and
plain text (general). Whether FP8 is safe is read from that by the rule in benchmarks/safety_report.py.

Every measurement is a line of the file as soon as it is made; the tables are printed. `params=tiny` tries it out on a
CPU, with few steps and no file unless they are asked for. The seconds are counted from the first line of work on:
Python takes a few more to load what it needs, and to end.
"""

import csv
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from benchmarks.meter import stamp
from benchmarks.rows import read_words as read
from benchmarks.safety_data import SCALES, make_data
from benchmarks.safety_pool import Pool
from benchmarks.safety_report import report
from benchmarks.safety_run import TUNE, Course, Entry, Measured, pretrain, shown, tune
from benchmarks.turns import Clock

WORDS = {
    "params": "150m",
    "steps": "1000",
    "every": "250",
    "seeds": "6",
    "pretrain_tokens": "25000000",
    "seconds": "315",
    "workers": str(os.cpu_count() or 1),
    "at_once": str(max(1, min(6, (os.cpu_count() or 1) // 2))),
    "out": "benchmarks/safety.csv",
    "commit": "",
}
"""What can be asked for, and what is measured where it is not."""
TRIED = {"steps": "6", "every": "3", "seeds": "2", "pretrain_tokens": "20000", "workers": "1", "out": os.devnull}
"""The same of params=tiny, half a minute on two cores."""
KINDS = (("bf16", "bf16"), ("bf16", "fp8"), ("bf16", "fp8-slow"), ("nf4", "bf16"), ("nf4", "fp8"))
"""The runs of a seed: base and maths."""
LAST = 4
"""Seconds that are left for the tables when the last run ends."""
COLUMNS = [
    *("date", "commit", "device", "torch", "parameters", "pretrain_tokens", "storage", "maths", "seed", "step"),
    *("reads", "train_loss", "seen_loss", "unseen_loss", "general_loss"),
    *("seen_accuracy", "unseen_accuracy", "general_accuracy", "seconds"),
    *("lr", "step_tokens", "seen_by_question", "unseen_by_question", "general_by_question"),
    *("gradient_error", "gradient_shared", "gradient_noise"),
]
"""New ones come at the end: rows of earlier days leave them empty."""


def main(asked: Mapping[str, str]) -> list[Measured]:
    """Makes the data and the model, trains and measures every run, writes the file and prints the tables."""
    seconds, began, scale = float(asked["seconds"]), time.perf_counter(), SCALES[asked["params"]]
    clock = Clock(max(0.0, seconds - LAST))
    data = make_data(scale, int(asked["pretrain_tokens"]), int(asked["steps"]), int(asked["workers"]))
    sizes = f"{len(data.text.ids):,} tokens of text, {len(data.questions):,} questions"
    print(f"{sizes} of {len(data.questions.ids):,} tokens in {time.perf_counter() - began:.0f} s", flush=True)
    known = {"date": datetime.now(UTC).date().isoformat(), **stamp(asked["commit"])}
    known |= {"lr": TUNE.lr, "step_tokens": scale.step_tokens}
    measured: list[Measured] = []
    with tempfile.TemporaryDirectory() as folder:
        course = Course(Path(folder), asked["params"], int(asked["steps"]), int(asked["every"]))
        # The processes are up when there is a base.
        with Pool[Entry, Measured](partial(tune, course=course), int(asked["at_once"])) as pool:
            about = pretrain(course, data, int(asked["pretrain_tokens"]), min(clock.left(), seconds / 4))
            for one in pool.results(entries(int(asked["seeds"])), clock):
                write(Path(asked["out"]), one, known | about)
                told = f"{one.entry.storage} {one.entry.maths} seed {one.entry.seed} step {one.step} in {one.reads}"
                print(f"{told} after {one.seconds:.0f} s: {shown(one.held_out)}; {clock.left():.0f} s left", flush=True)
                measured.append(one)
    print("\n".join(report(measured)), flush=True)
    print(f"all in {time.perf_counter() - began:.0f} s", flush=True)
    return measured


def entries(seeds: int) -> Iterator[Entry]:
    """The runs, seed by seed."""
    for seed in range(seeds):
        yield from (Entry(storage, maths, seed) for storage, maths in KINDS)


def write(path: Path, one: Measured, known: Mapping[str, object]) -> None:
    """Adds a line for a measurement to a file; it begins with what is known of all of them."""
    row = {**known, **one.entry._asdict(), "step": one.step, "reads": one.reads, "train_loss": f"{one.train_loss:.5f}"}
    for name, reading in one.held_out.items():
        row |= {f"{name}_loss": f"{reading.loss:.5f}", f"{name}_accuracy": f"{reading.accuracy:.4f}"}
        row[f"{name}_by_question"] = f"{sum(reading.questions) / len(reading.questions):.5f}"
    if one.gradients is not None:
        row |= {f"gradient_{name}": f"{value:.5f}" for name, value in one.gradients._asdict().items()}
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not file.tell():
            writer.writeheader()
        writer.writerow(row | {"seconds": f"{one.seconds:.1f}"})


def read_words(words: list[str]) -> dict[str, str]:
    """Every word of `WORDS`, with the value that is asked for. Raises ValueError naming the word that is wrong."""
    known = WORDS | (TRIED if "params=tiny" in words else {})
    return read(words, known, {"params": SCALES}, WORDS.keys() - {"params", "out", "commit"})


if __name__ == "__main__":
    try:
        asked = read_words(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"benchmarks/safety.py: {error}")
    main(asked)
