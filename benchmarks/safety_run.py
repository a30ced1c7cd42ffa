"""A base made from nothing, and the runs that train LoRA on it with one kind of maths each, measured as they go."""

import json
import pickle
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.meter import give_back, here
from benchmarks.safety_data import SCALES, Data, Scale, config_of
from benchmarks.turns import Clock
from burnish.config import build
from burnish.data.corpus import Corpus
from burnish.data.packing import collate, pack
from burnish.data.stream import Stream
from burnish.engine.assemble import open_learner, open_model, trained_parameters
from burnish.engine.learner import Learner
from burnish.engine.mesh import Mesh
from burnish.engine.start import Start
from burnish.losses.likelihood import cross_entropy
from burnish.model.checkpoint import save_model
from burnish.model.decoder import Decoder
from burnish.ops import fp8
from burnish.optim.schedule import multiplier
from burnish.settings import AdapterSettings, ModelSettings, OptimSettings, RunSettings
from burnish.types import Batch
from burnish.types import Sequence as TokenSequence

PRETRAIN = OptimSettings(lr=1e-3, schedule="wsd", warmup=40, decay=0.3, weight_decay=0.05, beta2=0.98)
TUNE = OptimSettings(lr=2e-4, schedule="cosine", warmup=0.03)
"""2e-4 is what QLoRA takes up to 13B (Dettmers et al. 2023, table 9) and what Burnish takes for adapters unless asked:
safety is wanted where people train. At 5e-4 seeds were 0.02 apart at a loss of 0.15, and plain text lost 0.35 nats."""
MATHS = ("bf16", "fp8", "fp8-slow")
"""What matmuls of frozen weights multiply; `fp8-slow` adds up in fp32 every 128 terms, `fp8` (fast) does not."""
GRADIENTS = 16
"""Batches whose gradients are compared."""


class Course(NamedTuple):
    """What all runs have in common."""

    folder: Path
    """Where the base is, and the data."""
    scale: str
    steps: int
    every: int
    """Steps between two measurements."""


class Entry(NamedTuple):
    """One run."""

    storage: str
    maths: str
    seed: int


class Reading(NamedTuple):
    """What the model makes of some of the held-out data."""

    loss: float
    """Of a token."""
    accuracy: float
    questions: tuple[float, ...]
    """The loss of each question, a mean over its tokens: every question counts the same in a mean of these."""


class Gradients(NamedTuple):
    """How far the gradient of a batch moves, over its own norm, root mean squares over batches."""

    error: float
    """When it is taken in FP8."""
    shared: float
    """The part of it that all batches have in common: what does not average out over steps."""
    noise: float
    """When another batch is taken."""


class Measured(NamedTuple):
    """What a run had learnt at a step."""

    entry: Entry
    step: int
    reads: str
    """The maths of the measurement itself, where training is over; that of training before."""
    end: bool
    held_out: Mapping[str, Reading]
    train_loss: float
    seconds: float
    gradients: Gradients | None = None


def pretrain(course: Course, data: Data, tokens: int, seconds: float) -> dict[str, object]:
    """A base trained for at most so many seconds, in the course's folder beside the data; what is to be said of it."""
    scale, mesh, clock = SCALES[course.scale], Mesh(here()), Clock(seconds)
    untrained = course.folder / "untrained"
    untrained.mkdir()
    (untrained / "config.json").write_text(json.dumps(config_of(scale)))
    full, none = ModelSettings(path=str(untrained), storage="full", init="random"), AdapterSettings(kind="none")
    model, _ = open_model(Start(untrained), full, none, run_settings(mesh), mesh)
    stream = Stream(data.text, scale.pass_tokens, max(1, scale.pretrain_tokens // scale.pass_tokens), seed=0)
    steps = stream.steps_in(tokens / len(data.text.ids))
    taken = learn_text(model, stream, steps, scale, clock)
    count = sum(parameter.numel() for parameter in model.parameters())
    found = shown(measure(model, None, held_out_batches(data.held_out, scale, mesh.device)))
    print(f"{count:,} parameters after {taken:,} tokens in {seconds - clock.left():.0f} s: {found}", flush=True)
    save_model(model, course.folder / "base", untrained)
    (course.folder / "data").write_bytes(pickle.dumps(data._replace(text=Corpus.of(()))))
    del model
    give_back(mesh.device)
    return {"parameters": count, "pretrain_tokens": taken}


def learn_text(model: Decoder, stream: Stream, steps: int, scale: Scale, clock: Clock) -> int:
    """Takes so many steps, or as many as the clock allows at the pace of the first; how many tokens they held."""
    learner = open_learner(model, None, PRETRAIN, steps, Mesh(model.device))
    began, step, tokens = 0.0, 0, 0.0
    warm_up, timed = scale.pace
    while step < steps:
        if step == warm_up:
            began = time.perf_counter()
        if step == warm_up + timed:
            pace = (time.perf_counter() - began) / timed
            steps = max(step + 1, min(steps, step + int(clock.left() / pace)))
            learner.learning_rate = partial(rate, steps=steps)
            print(f"{tokens / step / pace:,.0f} tokens a second: {steps} steps of pre-training", flush=True)
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
    batches = [batch.to(learner.mesh.device) for batch in stream.step(learner.steps_taken)]
    return learner.step(batches, partial(objective, model, adapter), count=lambda batch: batch.total_weight)


def objective(model: Decoder, adapter: str | None, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch, a sum."""
    scores = model.score(batch, adapter)
    return cross_entropy(scores.log_probs, batch.weights, scores.correct)


def run_settings(mesh: Mesh, **given: object) -> RunSettings:
    """The settings of a run on this device."""
    return build(RunSettings, {"device": mesh.device.type, **given})


@cache
def data_in(folder: Path) -> Data:
    """What `pretrain` has left there, read once in each process."""
    return pickle.loads((folder / "data").read_bytes())


def tune(entry: Entry, course: Course) -> Iterator[Measured]:
    """A run, measured before it, every so many steps, and at its end: there in bf16 too, and a run in bf16 in FP8."""
    torch.set_num_threads(1)  # others run beside it
    began, mesh, scale, data = time.perf_counter(), Mesh(here()), SCALES[course.scale], data_in(course.folder)
    give_back(mesh.device)
    model, adapter = open_run(entry, course.folder / "base", mesh)
    stream = Stream(data.questions, scale.step_tokens, 1, entry.seed)
    learner = open_learner(model, adapter, TUNE, course.steps, mesh)
    held_out = held_out_batches(data.held_out, scale, mesh.device)
    recent: list[float] = []

    def measured(step: int, reads: str, end: bool = False, gradients: Gradients | None = None) -> Measured:
        found, loss = measure(model, adapter, held_out), sum(recent) / max(1, len(recent))
        return Measured(entry, step, reads, end, found, loss, time.perf_counter() - began, gradients)

    yield measured(0, entry.maths)
    for step in range(course.steps):
        recent = [*recent[1 - course.every :], take_step(learner, stream, model, adapter)["loss"]]
        if (step + 1) % course.every == 0 and step + 1 < course.steps:
            yield measured(step + 1, entry.maths)
    for maths in MATHS if entry.maths == "bf16" else ("bf16", entry.maths):
        compared = None
        if entry.maths == "bf16" != maths:
            later = [batch for step in range(GRADIENTS) for batch in stream.step(course.steps + step)]
            compared = compare_gradients(model, adapter, [batch.to(mesh.device) for batch in later], maths)
        use_maths(model, maths)
        yield measured(course.steps, maths, end=True, gradients=compared)


def open_run(entry: Entry, base: Path, mesh: Mesh) -> tuple[Decoder, str]:
    """The model of a run with its adapter, which the seed alone decides."""
    settings = build(ModelSettings, {"path": str(base), "storage": entry.storage})
    run = run_settings(mesh, seed=entry.seed, dtype="auto" if entry.maths == "bf16" else "fp8")
    model, adapter = open_model(Start(base), settings, AdapterSettings(kind="lora", rank=16, alpha=32), run, mesh)
    assert adapter is not None
    fp8.FAST_ACCUMULATION = entry.maths != "fp8-slow"
    if mesh.device.type == "cpu":  # where the script is only tried out
        use_maths(model, entry.maths)
    return model, adapter


def use_maths(model: Decoder, maths: str) -> None:
    """Multiply in this way from now on, without CUDA graphs: in the same way for every run that is over."""
    fp8.FAST_ACCUMULATION = maths != "fp8-slow"
    if not model.fuse_blocks(fp8=maths != "bf16"):
        raise ValueError(f"{maths}: the blocks of this model cannot be run by hand")


def compare_gradients(model: Decoder, adapter: str, batches: Sequence[Batch], maths: str) -> Gradients:
    """What other maths does to the adapter's gradient, and what other data does."""
    by_maths: list[list[Tensor]] = []
    for used in ("bf16", maths):
        use_maths(model, used)
        by_maths.append([gradient(model, adapter, batch) for batch in batches])
    return moved(*(torch.stack(gradients) for gradients in by_maths))


def moved(exact_BN: Tensor, rough_BN: Tensor) -> Gradients:
    """How far gradients of batches are from exact ones. What the mean of errors owes to chance is taken off it."""
    count, error_BN = len(exact_BN), rough_BN - exact_BN
    size, total = exact_BN.square().sum() / count, error_BN.square().sum() / count
    noise, scatter = (part.var(dim=0).sum() for part in (exact_BN, error_BN))
    shared = (error_BN.mean(dim=0).square().sum() - scatter / count).clamp(min=0.0)
    error, common, other = (torch.stack([total, shared, noise]) / size).sqrt().tolist()
    return Gradients(error, common, other)


def gradient(model: Decoder, adapter: str, batch: Batch) -> Tensor:
    """That of the mean loss of a token in all of the adapter's parameters."""
    parameters = list(trained_parameters(model, adapter).values())
    loss, _ = objective(model, adapter, batch)
    parts = torch.autograd.grad(loss / batch.total_weight, parameters)
    return torch.cat([part.flatten().float() for part in parts])


Parts = Mapping[str, Sequence[tuple[list[int], Batch]]]
"""Held-out data: by name batches, and which of its sequences are in each."""


def held_out_batches(held_out: Mapping[str, Sequence[TokenSequence]], scale: Scale, device: torch.device) -> Parts:
    """What is measured, on the device once for all measurements."""
    return {
        name: [
            (members, collate([rows[i] for i in members]).to(device))
            for members in pack([len(row.ids) for row in rows], scale.pass_tokens)
        ]
        for name, rows in held_out.items()
    }


def measure(model: Decoder, adapter: str | None, held_out: Parts) -> dict[str, Reading]:
    """What the model makes of everything held out."""
    model.eval()
    found = {name: read(model, adapter, parts) for name, parts in held_out.items()}
    model.train()
    return found


@torch.no_grad()
def read(model: Decoder, adapter: str | None, parts: Sequence[tuple[list[int], Batch]]) -> Reading:
    """Loss and accuracy per token, and the loss of each question, added up in fp64."""
    questions: dict[int, float] = {}
    loss, correct, total = 0.0, 0.0, 0.0
    for members, batch in parts:
        scores, weights_T = model.score(batch, adapter), batch.weights.double()
        summed_2S = weights_T.new_zeros(2, batch.num_sequences)
        summed_2S.index_add_(1, batch.sequence, torch.stack([-weights_T * scores.log_probs.double(), weights_T]))
        questions |= dict(zip(members, (summed_2S[0] / summed_2S[1]).tolist(), strict=True))
        loss, total = loss + summed_2S[0].sum().item(), total + batch.total_weight
        correct += (weights_T * scores.correct).sum().item()
    return Reading(loss / total, correct / total, tuple(questions[i] for i in range(len(questions))))


def shown(found: Mapping[str, Reading]) -> str:
    """Losses by name."""
    return " ".join(f"{name} {reading.loss:.4f}" for name, reading in found.items())
