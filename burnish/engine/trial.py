"""What a method costs on a model: a few steps on random ids, timed, and what held memory at the peak of one of them."""

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import torch

from burnish.data.comparing import collate_comparisons
from burnish.data.packing import collate
from burnish.engine.assemble import open_learner, open_model, reference_role
from burnish.engine.learner import Learner
from burnish.engine.memory import Explained, explained_peak
from burnish.engine.mesh import Mesh
from burnish.engine.reference import asked
from burnish.engine.room import Shortage
from burnish.engine.start import Start
from burnish.losses.likelihood import cross_entropy
from burnish.losses.preference import Options, pairs_of, preference_loss
from burnish.model.decoder import Decoder
from burnish.model.shapes import FIRST_ID
from burnish.model.shelf import Plan
from burnish.optim.adamw import AdamW
from burnish.settings import TrainingSettings
from burnish.types import Batch, Comparison, PreferenceBatch
from burnish.types import Sequence as TokenSequence

T = TypeVar("T")

WARM_UP = 3
"""Steps before those that are timed: compilation, memory pools and clocks settle in them."""
TIMED = 5
"""Steps that are timed where nobody says how many."""


@dataclass(frozen=True, slots=True)
class Trial:
    """The work of a step: sequences of so many tokens, or, for DPO, pairs of them that share their first half."""

    method: Literal["sft", "dpo"]
    length: int
    sequences: int
    together: int
    """Sequences, or pairs, in a micro-batch."""


class Cost(NamedTuple):
    """What was measured."""

    opened: float
    """Seconds until the model was on the device."""
    first: float
    """Seconds of the first step, compilation among them."""
    step: float
    """Seconds of a later one, the median."""
    tokens: float
    """Of a step."""
    peak: Explained
    """The highest of the timed steps and of one whose memory is explained; between the two only workspace differs."""
    reserved: int | None
    """The most that CUDA's allocator held, unused parts among it."""
    trained: int
    """Numbers in training."""
    dtype: str
    """Of activations, with fp8 where matrix products are in 8 bits."""
    plan: Plan | None
    """What was kept of each block; None: its own code ran, which keeps all, or computes blocks again as a whole."""
    again: bool
    """Without a plan, whether blocks were computed again."""
    host: int
    """Bytes of buffers on the host that activations were sent to."""
    states_away: int
    """Bytes of the optimizer's states on the host."""
    embedding_away: bool
    """Whether the embedding lies on the host."""
    graphs: bool
    """Whether CUDA graphs may have been replayed, whose memory counts as reserved alone."""
    taken: bool
    """Whether gradients of matrices were taken as they appeared."""
    twice: bool
    """Whether each step was computed twice for that, first for the norm of all gradients."""
    limit: int | None
    """To how many tokens micro-batches were divided, because memory did not suffice."""


def try_out(start: Start, settings: TrainingSettings, trial: Trial, mesh: Mesh) -> Cost:
    """What these steps cost here, with a model that is made, or read, for them.

    Raises ValueError or torch.OutOfMemoryError where it does not fit.
    """
    device, num_timed = mesh.device, settings.run.steps or TIMED
    began = _now(device)
    decoder, adapter = open_model(start, settings.model, settings.adapter, settings.run, mesh, optim=settings.optim)
    learner = open_learner(decoder, adapter, settings.optim, WARM_UP + num_timed + 1, mesh)
    opened = _now(device) - began
    prepare = _sft if trial.method == "sft" else _dpo
    step = prepare(decoder, adapter, learner, trial)
    seconds: list[float] = []
    short: list[Shortage] = []
    learner.room.told = short.append
    highest, tokens = 0, 0.0
    while len(seconds) < WARM_UP + num_timed:
        if len(seconds) == WARM_UP and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        began = _now(device)
        tokens = step()["tokens"]
        seconds.append(_now(device) - began)
        if short:  # in one attempt more; and from now on steps are others
            short.clear()
            del seconds[WARM_UP:]
            learner.steps_taken = len(seconds)
    reserved = None
    if device.type == "cuda":
        highest, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    peak = _explained(decoder, learner, step, short)
    fused = decoder.fused if decoder.takes(adapter) else None
    more = max(0, highest - peak.bytes)
    taken = fused is not None and fused.taking.wanted
    classes = peak.classes | {"workspace": peak.classes["workspace"] + more}
    return Cost(
        opened=opened,
        first=seconds[0],
        step=statistics.median(seconds[WARM_UP:]),
        tokens=tokens,
        peak=Explained(peak.bytes + more, peak.phase, classes),
        reserved=reserved,
        trained=sum(parameter.numel() for parameter in learner.parameters.values()),
        dtype="fp8" if settings.run.fp8 else {torch.bfloat16: "bf16"}.get(decoder.dtype, "fp32"),
        plan=decoder.plan if fused else None,
        again=decoder.checkpointing,
        host=fused.host.total if fused else 0,
        states_away=learner.optimizer.away() if isinstance(learner.optimizer, AdamW) else 0,
        embedding_away=decoder.model.embed_tokens.weight.device.type != decoder.device.type,
        graphs=fused is not None and fused.graphs is not None,
        taken=taken,
        twice=taken and learner.clip > 0,
        limit=learner.room.limit,
    )


def _explained(
    decoder: Decoder, learner: Learner, step: Callable[[], dict[str, float]], short: list[Shortage]
) -> Explained:
    """The peak of a step in which memory does not run out: `short` is told when it does."""
    while True:
        with explained_peak(decoder, [learner]) as peak:
            step()
        if not short:
            return peak
        short.clear()
        learner.steps_taken -= 1


def let_go(device: torch.device) -> None:
    """Hand back the memory of a model that nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _sft(decoder: Decoder, adapter: str | None, learner: Learner, trial: Trial) -> Callable[[], dict[str, float]]:
    """A step of supervised fine-tuning on every token."""
    ids = _Ids(decoder.config.vocab_size)
    rows = [ids.sequence((), trial.length, row) for row in range(trial.sequences)]
    batches = [collate(part).to(decoder.device) for part in _parts(rows, trial.together)]

    def objective(batch: Batch):
        scores = decoder.score(batch, adapter)
        return cross_entropy(scores.log_probs, batch.weights, scores.correct)

    return lambda: learner.step(batches, objective, lambda batch: batch.total_weight)


def _dpo(decoder: Decoder, adapter: str | None, learner: Learner, trial: Trial) -> Callable[[], dict[str, float]]:
    """A step of DPO; the reference is asked in each step, or, where all weights train, before the first one."""
    ids, prompt = _Ids(decoder.config.vocab_size), trial.length // 2
    units: list[Comparison] = []
    for row in range(trial.sequences):
        shared = ids.draw(prompt)
        answers = tuple(ids.sequence(shared, trial.length - prompt, row) for _ in range(2))
        units.append(Comparison(answers, ((0, 1, 0.0),)))
    batches = [collate_comparisons(part) for part in _parts(units, trial.together)]
    refer, options = asked(reference_role(decoder), learner.mesh), Options()
    known = None if adapter is not None else [refer(batch) for batch in batches]

    def objective(batch: PreferenceBatch):
        pairs = pairs_of(decoder.log_probs(batch, adapter), batch.reference_log_probs, batch)
        return preference_loss(pairs, batch.pair_weights, {"sigmoid": 1.0}, options)

    def step() -> dict[str, float]:
        referred = known or [refer(batch) for batch in batches]
        return learner.step(referred, objective, lambda batch: batch.num_pairs)

    return step


class _Ids:
    """Random ids, always the same."""

    def __init__(self, vocab_size: int) -> None:
        self._draw, self._most = random.Random(0), vocab_size

    def draw(self, count: int) -> tuple[int, ...]:
        return tuple(self._draw.randrange(min(FIRST_ID, self._most - 1), self._most) for _ in range(count))

    def sequence(self, before: tuple[int, ...], count: int, row: int) -> TokenSequence:
        """What comes before is not trained on."""
        return TokenSequence(before + self.draw(count), (0.0,) * len(before) + (1.0,) * count, row)


def _parts(items: Sequence[T], size: int) -> list[list[T]]:
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
