"""Whether 8-bit floats in the matmuls of frozen weights change what is learnt: held-out loss of FP8 against bf16.

python -m benchmarks.safety [params=150m] [steps=1000] [every=200] [seeds=2] [pretrain_tokens=40000000] [seconds=470]
                            [workers=N] [out=FILE] [commit=HASH]

First a model of the embedded world is made from nothing: a Llama of 150 or 300 million parameters, pre-trained with
full weights on the world's text, for at most a third of the seconds. Then LoRA of rank 16 on all its linear layers
learns the world's instructions, once for each seed and each kind of maths, from new questions of the families that have
training rows. Runs of one seed see the same data in the same order and start from the same adapter: they differ in
nothing but the maths. Every few steps the loss is measured on questions that no run trains on: new ones of the same
families (seen), ones of other families (unseen), and plain text (general). If FP8 is harmless, the difference that it
makes lies within what another seed makes.

QLoRA runs come last, as far as the seconds allow. Every measurement is a line of the file; the table is printed.
`params=tiny` tries it out on a CPU.
"""

import csv
import gc
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy
import torch

from benchmarks.meter import device_name, here
from benchmarks.rows import current_commit
from benchmarks.rows import read_words as read
from benchmarks.turns import Clock
from burnish.config import build
from burnish.data.chat import encode
from burnish.data.corpus import Corpus
from burnish.data.stream import Stream
from burnish.data.templates import ChatTemplate
from burnish.data.tokenizer import Tokenizer
from burnish.engine.assemble import open_learner, open_model
from burnish.engine.learner import Learner
from burnish.engine.mesh import Mesh
from burnish.engine.start import Start
from burnish.evaluate.judge import general_sequences
from burnish.evaluate.likelihood import held_out_loss
from burnish.losses.likelihood import cross_entropy
from burnish.model.checkpoint import save_model
from burnish.model.decoder import Decoder
from burnish.model.families import find_model, read_json
from burnish.optim.schedule import multiplier
from burnish.settings import AdapterSettings, ModelSettings, OptimSettings, RunSettings
from burnish.types import Batch, Example, Message, Text
from burnish.types import Sequence as TokenSequence
from burnish.world import FAMILIES, SEEN, UNSEEN, documents
from burnish.world.instructions import is_held_out, new_questions

SIZES = {  # width, inner, layers, heads: 2, 156 and 280 million parameters
    "tiny": (64, 128, 2, 4),
    "150m": (1024, 2816, 12, 16),
    "300m": (1280, 3456, 14, 20),
}
WORDS = {
    "params": "150m",
    "steps": "1000",
    "every": "200",
    "seeds": "2",
    "pretrain_tokens": "40000000",
    "seconds": "470",
    "workers": str(os.cpu_count() or 1),
    "out": "benchmarks/safety.csv",
    "commit": "",
}
"""What can be asked for, and what is measured where it is not."""
MAX_LENGTH = 1024
STEP_TOKENS, PRETRAIN_STEP_TOKENS, PASS_TOKENS = 4096, 32768, 16384
SHARD = 500
"""Documents that one worker writes at a time; what they hold does not depend on how many workers there are."""
TOKENS_PER_DOCUMENT, TOKENS_PER_QUESTION = 340, 20  # about
PRETRAIN = OptimSettings(lr=1e-3, schedule="wsd", warmup=40, decay=0.3, weight_decay=0.05, beta2=0.98)
TUNE = OptimSettings(lr=5e-4, schedule="cosine", warmup=0.03)
WARM_UP, TIMED = 10, 10
"""Steps of pre-training before its pace is known."""
SEEN_QUESTIONS, UNSEEN_QUESTIONS = 64, 128
"""Held-out questions of each family."""

T = TypeVar("T")
R = TypeVar("R")


class Data(NamedTuple):
    """What is trained on, and what is measured."""

    text: Corpus
    questions: Corpus
    held_out: Mapping[str, Sequence[TokenSequence]]


class Entry(NamedTuple):
    """One run."""

    storage: str
    fp8: bool
    seed: int

    @property
    def maths(self) -> str:
        """What its matmuls multiply."""
        return "fp8" if self.fp8 else "bf16"


class Measured(NamedTuple):
    """What a run had learnt at a step."""

    entry: Entry
    step: int
    reads: str  # the maths of the measurement itself: what FP8 has trained is, at the end, also read in bf16
    losses: Mapping[str, float]
    accuracies: Mapping[str, float]
    train_loss: float
    seconds: float


def main(asked: Mapping[str, str]) -> list[Measured]:
    """Makes the data and the model, trains and measures every run, writes the file and prints the table."""
    clock, began = Clock(float(asked["seconds"])), time.perf_counter()
    data = make_data(int(asked["pretrain_tokens"]), int(asked["steps"]), int(asked["workers"]))
    sizes = f"{len(data.text.ids):,} tokens of text, {len(data.questions):,} questions"
    print(f"{sizes} of {len(data.questions.ids):,} tokens in {time.perf_counter() - began:.0f} s", flush=True)
    mesh, measured = Mesh(here()), list[Measured]()
    known = {"date": datetime.now(UTC).date().isoformat(), "commit": asked["commit"] or current_commit()}
    known |= {"device": device_name(mesh.device), "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as folder:
        base, about = pretrain(asked, data, Path(folder), mesh, min(clock.left(), float(asked["seconds"]) / 3))
        longest = 0.0
        for storage, seed, fp8 in product(("bf16", "nf4"), range(int(asked["seeds"])), (False, True)):
            entry, before = Entry(storage, fp8, seed), clock.left()
            if longest > before:
                print(f"{entry} is not run: {before:.0f} s are left, and one took {longest:.0f} s", flush=True)
                continue
            found = tune(entry, base, data, mesh, (int(asked["steps"]), int(asked["every"])))
            write(Path(asked["out"]), found, known | about)
            measured += found
            longest = max(longest, before - clock.left())
    print("\n".join(table(measured)), flush=True)
    return measured


def make_data(pretrain_tokens: int, steps: int, workers: int) -> Data:
    """Text for pre-training, questions enough for so many steps, and what is held out: the same every time."""
    shards = -(-pretrain_tokens // (TOKENS_PER_DOCUMENT * SHARD))
    count = SHARD if shards > 1 else -(-pretrain_tokens // TOKENS_PER_DOCUMENT)
    most = max(10, steps * STEP_TOKENS // (TOKENS_PER_QUESTION * len(SEEN)))
    text = joined(spread(partial(shard, count=count), range(shards), workers))
    questions = joined(spread(partial(training_questions, most=most), SEEN, workers))
    tokenizer = Tokenizer.load(find_model("embedded"))
    template = ChatTemplate.open("auto", tokenizer)
    held_out = {
        "seen": [one for name in SEEN for one in held_out_questions(name, SEEN_QUESTIONS, tokenizer)],
        "unseen": [one for name in UNSEEN for one in held_out_questions(name, UNSEEN_QUESTIONS, tokenizer)],
        "general": general_sequences("embedded", tokenizer, template, MAX_LENGTH),
    }
    return Data(text, questions, held_out)


def spread(work: Callable[[T], R], given: Sequence[T], workers: int) -> list[R]:
    """What the work makes of each, in order, by so many processes."""
    if workers == 1:
        return [work(one) for one in given]
    with multiprocessing.get_context("fork").Pool(workers) as pool:  # nothing has used threads or CUDA yet
        return pool.map(work, given, chunksize=1)


def shard(seed: int, count: int) -> Corpus:
    """The first documents of a seed, every token of them trained."""
    tokenizer = Tokenizer.load(find_model("embedded"))
    template, texts = ChatTemplate.open("auto", tokenizer), islice(documents(seed), count)
    return Corpus.of(encode(Text(((text, True),)), tokenizer, template, row=i) for i, text in enumerate(texts))


def training_questions(name: str, most: int) -> Corpus:
    """New questions of a family, until there are so many, or hardly any more that differ."""
    tokenizer = Tokenizer.load(find_model("embedded"))
    found: dict[str, str] = {}
    for draw in range(12):
        before = len(found)
        found |= dict(islice(new_questions(FAMILIES[name], f"safety {draw}"), most))
        if len(found) >= most or len(found) < 1.05 * before:
            break
    return Corpus.of(conversations(list(found.items())[:most], tokenizer))


def held_out_questions(name: str, most: int, tokenizer: Tokenizer) -> list[TokenSequence]:
    """Questions of a family that no training row asks, in wordings of which half are held out as well."""
    family, rng = FAMILIES[name], random.Random(f"safety held out {name}")
    found: dict[str, str] = {}
    for _ in range(100 * most):
        case = family.draw(rng)
        if len(found) < most and (family.unseen or is_held_out(family, case)):
            wordings = (family.phrasings, family.held_out_phrasings)[len(found) % 2]
            found.setdefault(rng.choice(wordings).format(**case.slots), case.answer)
    return conversations(list(found.items()), tokenizer)


def conversations(asked: Sequence[tuple[str, str]], tokenizer: Tokenizer) -> list[TokenSequence]:
    """Questions and answers in the chat template, the answers trained."""
    template = ChatTemplate.open("auto", tokenizer)
    turns = [Example((Message("user", question), Message("assistant", answer))) for question, answer in asked]
    return [encode(example, tokenizer, template, row=i) for i, example in enumerate(turns)]


def joined(parts: Sequence[Corpus]) -> Corpus:
    """One corpus of several, its rows counted anew."""
    lengths = numpy.concatenate([part.lengths for part in parts])
    return Corpus(
        numpy.concatenate([part.ids for part in parts]),
        numpy.concatenate([part.weights for part in parts]),
        numpy.concatenate([numpy.zeros(1, numpy.int64), numpy.cumsum(lengths)]),
        numpy.arange(len(lengths), dtype=numpy.int32),
    )


def pretrain(
    asked: Mapping[str, str], data: Data, folder: Path, mesh: Mesh, seconds: float
) -> tuple[Path, dict[str, object]]:
    """The folder of a base trained for at most so many seconds, and what there is to say of it."""
    clock, untrained, base = Clock(seconds), folder / "untrained", folder / "base"
    untrained.mkdir()
    (untrained / "config.json").write_text(json.dumps(config_of(asked["params"])))
    full, none = ModelSettings(path=str(untrained), storage="full", init="random"), AdapterSettings(kind="none")
    model, _ = open_model(Start(untrained), full, none, run_settings(mesh), mesh)
    stream = Stream(data.text, PASS_TOKENS, PRETRAIN_STEP_TOKENS // PASS_TOKENS, seed=0)
    steps = stream.steps_in(int(asked["pretrain_tokens"]) / len(data.text.ids))
    tokens = learn_text(model, stream, steps, clock, mesh)
    count = sum(parameter.numel() for parameter in model.parameters())
    took, losses = seconds - clock.left(), measure(model, None, data)[0]
    print(f"{count:,} parameters after {tokens:,} tokens in {took:.0f} s: {shown(losses)}", flush=True)
    save_model(model, base, untrained)
    return base, {"parameters": count, "pretrain_tokens": tokens}


def config_of(size: str) -> dict[str, Any]:
    """The configuration of a Llama of this size, with the vocabulary of the embedded base."""
    width, inner, layers, heads = SIZES[size]
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": width // heads}
    return read_json(find_model("embedded")) | sizes


def learn_text(model: Decoder, stream: Stream, steps: int, clock: Clock, mesh: Mesh) -> int:
    """Takes so many steps, or as many as the clock allows at the pace of the first; how many tokens they held."""
    learner = open_learner(model, None, PRETRAIN, steps, mesh)
    began, step, tokens = 0.0, 0, 0.0
    while step < steps:
        if step == WARM_UP:
            began = time.perf_counter()
        if step == WARM_UP + TIMED:
            pace = (time.perf_counter() - began) / TIMED
            steps = max(step + 1, min(steps, step + int(clock.left() / pace)))
            learner.learning_rate = partial(rate, steps=steps)
            print(f"{PRETRAIN_STEP_TOKENS / pace:,.0f} tokens a second: {steps} steps of pre-training", flush=True)
        metrics = take_step(learner, stream, model, None)
        tokens += metrics["tokens"]
        step += 1
        if step % 100 == 0 or step == steps:
            print(f"pre-training step {step}: loss {metrics['loss']:.4f}", flush=True)
    return int(tokens)


def rate(step: int, steps: int) -> float:
    """The learning rate of pre-training, of so many steps."""
    assert PRETRAIN.lr is not None
    return PRETRAIN.lr * multiplier(step, steps, PRETRAIN.schedule, PRETRAIN.warmup, PRETRAIN.decay)


def take_step(learner: Learner, stream: Stream, model: Decoder, adapter: str | None) -> dict[str, float]:
    """The learner's next step, as `recipes/sft.py` has it."""

    def objective(batch: Batch):
        scores = model.score(batch, adapter)
        return cross_entropy(scores.log_probs, batch.weights, scores.correct)

    batches = [batch.to(learner.mesh.device) for batch in stream.step(learner.steps_taken)]
    return learner.step(batches, objective, count=lambda batch: batch.total_weight)


def run_settings(mesh: Mesh, **given: object) -> RunSettings:
    """The settings of a run on this device."""
    return build(RunSettings, {"device": mesh.device.type, **given})


def tune(entry: Entry, base: Path, data: Data, mesh: Mesh, length: tuple[int, int]) -> list[Measured]:
    """A run, measured before it, every so many steps, and at its end."""
    steps, every = length
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    began = time.perf_counter()
    on_cpu = mesh.device.type == "cpu"  # where the script is only tried out
    run = run_settings(mesh, seed=entry.seed, dtype="fp8" if entry.fp8 else "auto")
    settings = build(ModelSettings, {"path": str(base), "storage": entry.storage})
    model, adapter = open_model(Start(base), settings, AdapterSettings(kind="lora", rank=16, alpha=32), run, mesh)
    if on_cpu:
        model.fuse_blocks(entry.fp8)
    if entry.fp8 and model.fused is None:
        raise ValueError(f"{entry}: nothing here multiplies in 8 bits")
    stream = Stream(data.questions, STEP_TOKENS, 1, entry.seed)
    learner = open_learner(model, adapter, TUNE, steps, mesh)
    measured: list[Measured] = []
    recent: list[float] = []

    def note(step: int, reads: str) -> None:
        found, took = measure(model, adapter, data), time.perf_counter() - began
        measured.append(Measured(entry, step, reads, *found, sum(recent) / max(1, len(recent)), took))
        print(f"{entry} step {step}: {shown(found[0])}", flush=True)

    note(0, entry.maths)
    for step in range(steps):
        recent = [*recent[1 - every :], take_step(learner, stream, model, adapter)["loss"]]
        if (step + 1) % every == 0 or step + 1 == steps:
            note(step + 1, entry.maths)
    if entry.fp8:
        model.fuse_blocks(fp8=False)
        note(steps, "bf16")
    return measured


def measure(model: Decoder, adapter: str | None, data: Data) -> tuple[dict[str, float], dict[str, float]]:
    """Loss and accuracy per token of everything held out."""
    found = {name: held_out_loss(model, rows, adapter, PASS_TOKENS) for name, rows in data.held_out.items()}
    losses = {name: values["loss"] for name, values in found.items()}
    return losses, {name: values["mean_token_accuracy"] for name, values in found.items()}


def shown(losses: Mapping[str, float]) -> str:
    """Losses by name."""
    return " ".join(f"{name} {loss:.4f}" for name, loss in losses.items())


def write(path: Path, measured: Sequence[Measured], known: Mapping[str, object]) -> None:
    """Adds a line for each measurement to a file; each begins with what is known of all of them."""
    with path.open("a", newline="", encoding="utf-8") as file:
        for one in measured:
            row = {**known, "storage": one.entry.storage, "maths": one.entry.maths, "seed": one.entry.seed}
            row |= {"step": one.step, "reads": one.reads, "train_loss": f"{one.train_loss:.5f}"}
            row |= {f"{name}_loss": f"{value:.5f}" for name, value in one.losses.items()}
            row |= {f"{name}_accuracy": f"{value:.4f}" for name, value in one.accuracies.items()}
            row |= {"seconds": f"{one.seconds:.1f}"}
            writer = csv.DictWriter(file, row, lineterminator="\n")
            if not file.tell():
                writer.writeheader()
            writer.writerow(row)


def table(measured: Sequence[Measured]) -> list[str]:
    """The losses at the end of each run; then, by storage, what FP8 changes and what another seed changes."""
    last = max((one.step for one in measured), default=0)
    ends = [one for one in measured if one.step == last]
    names = list(ends[0].losses) if ends else []
    lines = [" | ".join(["run", "read in", *names, "accuracy on seen"])]
    for one in ends:
        cells = [f"{one.losses[name]:.4f}" for name in names]
        run = f"{one.entry.storage} {one.entry.maths} seed {one.entry.seed}"
        lines.append(" | ".join([run, one.reads, *cells, f"{one.accuracies['seen']:.4f}"]))
    own = {one.entry: one.losses for one in ends if one.reads == one.entry.maths}
    for storage, name in product(("bf16", "nf4"), names):
        pairs = [
            (own[entry][name], own[entry._replace(fp8=True)][name])
            for entry in own
            if entry.storage == storage and not entry.fp8 and entry._replace(fp8=True) in own
        ]
        if len(pairs) > 1:
            lines.append(f"{storage}, {name}: {comparison(pairs)}")
    return lines


def comparison(pairs: Sequence[tuple[float, float]]) -> str:
    """What FP8 changes in (bf16, fp8) losses of each seed, beside the widest that seeds are apart in one maths."""
    changes = [fp8 - bf16 for bf16, fp8 in pairs]
    spreads = [max(losses) - min(losses) for losses in zip(*pairs, strict=True)]
    mean = sum(changes) / len(changes)
    verdict = "within" if abs(mean) <= max(spreads) else "beyond"
    each = ", ".join(f"{change:+.4f}" for change in changes)
    apart = " and ".join(f"{spread:.4f}" for spread in spreads)
    return f"fp8 - bf16 {each} (mean {mean:+.4f}); seeds differ by {apart} in bf16 and fp8: {verdict} the spread"


def read_words(words: list[str]) -> dict[str, str]:
    """Every word of `WORDS`, with the value that is asked for. Raises ValueError naming the word that is wrong."""
    return read(words, WORDS, {"params": SIZES}, WORDS.keys() - {"params", "out", "commit"})


if __name__ == "__main__":
    try:
        asked = read_words(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"benchmarks/safety.py: {error}")
    main(asked)
