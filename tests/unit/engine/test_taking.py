"""Gradients that are taken as they appear: the same bits, one layer's at a time, and what a failure leaves."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.config import build
from burnish.engine.assemble import open_learner, open_model
from burnish.engine.learner import Learner, NonFinite
from burnish.engine.memory import explained_peak
from burnish.engine.mesh import Mesh
from burnish.engine.planner import Planner
from burnish.engine.room import Halfway, NoRoom
from burnish.engine.shortage import Moment, holdings, out_of_memory
from burnish.engine.start import Start
from burnish.losses.likelihood import cross_entropy
from burnish.model.decoder import Decoder
from burnish.model.shapes import SHAPES
from burnish.model.shelf import Plan
from burnish.optim.adamw import AdamW, optimizer_tensors
from burnish.settings import TrainingSettings
from burnish.types import Batch
from tests.tiny import tiny_batch

CPU = torch.device("cpu")
BATCHES = [tiny_batch([40, 24], 256, seed) for seed in range(3)]
Meddle = Callable[[Tensor], Tensor]


class Opened:
    """A tiny model whose weights all train in bf16, its blocks run by hand, and its learner."""

    def __init__(self, folder: Path, clip: float, wanted: bool, kind: str = "adamw8bit", least: bool = False) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(SHAPES["tiny"]))
        groups: dict[str, Any] = {
            "model": {"path": str(folder), "init": "random", "storage": "full16"},
            "adapter": {"kind": "none"},
            "run": {"device": "cpu"},
            "optim": {"lr": 0.01, "warmup": 0, "kind": kind, "clip": clip},
        }
        settings, mesh = build(TrainingSettings, groups), Mesh(CPU)
        self.decoder: Decoder = open_model(Start(folder), settings.model, settings.adapter, settings.run, mesh)[0]
        assert self.decoder.fuse_blocks()
        if least:
            blocks = len(self.decoder.config.layers)
            self.decoder.follow(Plan((frozenset({"x"}),) * blocks, (frozenset[str](),) * blocks))
        self.learner: Learner = open_learner(self.decoder, None, settings.optim, 10, mesh)
        assert self.decoder.fused is not None
        self.taking = self.decoder.fused.taking
        self.taking.wanted = wanted
        self.most = 0
        """The most bytes of gradients of matrices that there were at once, as the optimizer saw it."""
        self.passes = 0

    def step(self, batches: Sequence[Batch], meddle: Meddle = lambda loss: loss) -> dict[str, float]:
        def objective(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            self.passes += 1
            scores = self.decoder.score(batch)
            loss, metrics = cross_entropy(scores.log_probs, batch.weights, scores.correct)
            return meddle(loss), metrics

        return self.learner.step(batches, objective, lambda batch: batch.total_weight)

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.learner.parameters.items()}

    def all(self) -> dict[str, Tensor]:
        return self.weights() | optimizer_tensors(self.learner.optimizer, self.learner.parameters)

    def matrices(self) -> list[torch.nn.Parameter]:
        assert self.decoder.fused is not None
        return [weight for weights in self.decoder.fused.trained_matrices() for weight in weights]


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("clip", [0.0, 0.3])
@pytest.mark.parametrize("least", [False, True])
def test_the_bits_are_those_of_the_ordinary_step(tmp_path: Path, kind: str, clip: float, least: bool) -> None:
    ordinary, taken = (Opened(tmp_path, clip, wanted, kind, least) for wanted in (False, True))
    for batch in BATCHES:
        assert taken.step([batch]) == ordinary.step([batch])
    assert same(taken.all(), ordinary.all())
    assert taken.passes == (6 if clip else 4)  # unclipped, the first step alone is measured before it changes anything


@pytest.mark.parametrize("clip", [0.0, 0.3])
def test_gradients_of_one_layer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: float) -> None:
    run = Opened(tmp_path, clip, True)
    matrices, most = run.matrices(), [0]
    for name, own in (("measure_one", AdamW.measure_one), ("step_one", AdamW.step_one)):

        def watched(self: AdamW, *given: Any, own: Any = own) -> None:
            most[0] = max(most[0], sum(p.grad.nbytes for p in matrices if p.grad is not None))
            own(self, *given)

        monkeypatch.setattr(AdamW, name, watched)
    run.step([BATCHES[0]])
    largest = max(sum(w.nbytes for w in weights) for weights in run.decoder.fused.trained_matrices())
    assert 0 < most[0] <= largest
    assert all(p.grad is None for p in run.learner.parameters.values())


def test_several_micro_batches_add_up_as_ever(tmp_path: Path) -> None:
    ordinary, taken = (Opened(tmp_path, 0.3, wanted) for wanted in (False, True))
    for run in (ordinary, taken):
        run.step(BATCHES)
        run.step(BATCHES[:1])
    assert same(taken.all(), ordinary.all())
    assert (ordinary.passes, taken.passes) == (4, 5)


def test_a_micro_batch_that_goes_through_the_model_twice_adds_up_as_ever(tmp_path: Path) -> None:
    """Its first backward pass must not change what the second one multiplies with."""
    ordinary, taken = (Opened(tmp_path, 0.0, wanted) for wanted in (False, True))
    for run in (ordinary, taken):

        def objective(batch: Batch, run: Opened = run) -> tuple[Tensor, dict[str, Tensor]]:
            first, second = (run.decoder.log_probs(part) for part in (batch, BATCHES[1]))
            return -(first * batch.weights).sum() - (second * BATCHES[1].weights).sum(), {}

        run.learner.step([BATCHES[0]], objective, lambda batch: batch.total_weight)
    assert same(taken.all(), ordinary.all())


@pytest.mark.parametrize("clip", [0.0, 0.3])
@pytest.mark.parametrize("what", ["loss", "grad_norm"])
def test_what_is_not_finite_changes_nothing_or_says_so(tmp_path: Path, clip: float, what: str) -> None:
    run = Opened(tmp_path, clip, True)
    run.step([BATCHES[0]])
    before = run.weights()
    middle = run.decoder.model.layers[0].mlp.down_proj.stored.weight

    def spoil(gradient: Tensor) -> None:
        if gradient.shape == middle.shape:
            gradient.fill_(math.inf)

    if what == "grad_norm":  # of one kind of weight, on its way to the optimizer
        run.taking.noted = spoil
    with pytest.raises(NonFinite) as error:
        run.step([BATCHES[1]], lambda loss: loss * (math.nan if what == "loss" else 1))
    assert error.value.quantity == what
    after = run.weights()
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    assert error.value.changed == (clip == 0 and what == "grad_norm")
    if not error.value.changed:
        assert unchanged == set(before)
    else:
        assert {name for name, p in run.learner.parameters.items() if p.shape == middle.shape} <= unchanged
        assert "model.embed_tokens.weight" in unchanged  # of all that comes at the end the norm is known by then
        assert any("q_proj" in name for name in set(before) - unchanged)
    assert all(p.grad is None for p in run.learner.parameters.values())


class Full:
    """Memory that runs out at some gradient of a matrix, counted from the first step's."""

    def __init__(self, run: Opened, at: int) -> None:
        self.left = at
        run.taking.noted = self

    def __call__(self, gradient: Tensor) -> None:
        self.left -= 1
        if self.left == 0:
            raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_step_is_taken_again_until_it_has_changed_a_weight(tmp_path: Path) -> None:
    """Clipped, the first of its two passes; otherwise only before the second layer."""
    ordinary = Opened(tmp_path, 0.3, False)
    wanted = [ordinary.step([batch]) for batch in BATCHES[:2]]
    layers = len(ordinary.matrices())
    for at in (1, 3, layers, layers + 1):
        run = Opened(tmp_path, 0.3, True)
        run.learner.room.relieve = lambda: "what there was"
        Full(run, at)
        assert [run.step([batch]) for batch in BATCHES[:2]] == wanted
        assert same(run.all(), ordinary.all())
    run = Opened(tmp_path, 0.3, True)
    run.learner.room.relieve = lambda: "what there was"
    Full(run, layers + 5)
    with pytest.raises(Halfway):
        run.step([BATCHES[0]])


def test_without_clipping_a_step_is_taken_again_until_memory_has_sufficed_for_one(tmp_path: Path) -> None:
    ordinary = Opened(tmp_path, 0.0, False)
    wanted = [ordinary.step([batch]) for batch in BATCHES]
    for at in (3, 5):
        run = Opened(tmp_path, 0.0, True)
        run.learner.room.relieve = lambda: "what there was"
        Full(run, at)
        assert [run.step([batch]) for batch in BATCHES] == wanted
        assert same(run.all(), ordinary.all())
        assert run.passes == 5  # what failed, what measured, and three that stepped
    largest = Opened(tmp_path, 0.0, True)
    for sizes, passes in (([20], 2), ([20], 3), ([24], 5), ([20], 6)):
        largest.step([tiny_batch(sizes, 256)])
        assert largest.passes == passes
    largest.learner.room.recover = lambda: True  # states are back: there is less room than there was
    for passes in (7, 9):
        largest.step([tiny_batch([20], 256)])
        assert largest.passes == passes
    Full(largest, 2)
    largest.learner.room.recover, largest.learner.room.relieve = None, lambda: "what there was"
    largest.step([tiny_batch([20], 256)])
    Full(largest, 5)
    with pytest.raises(Halfway):
        largest.step([tiny_batch([20], 256)])


@pytest.mark.parametrize("clip", [0.0, 0.3])
def test_a_step_whose_gradients_are_taken_is_not_divided(tmp_path: Path, clip: float) -> None:
    """Of two parts all gradients would be there together: more than there was no room for."""
    run = Opened(tmp_path, clip, True)
    before = run.weights()
    run.learner.room.relieve = None
    Full(run, 2)
    with pytest.raises(NoRoom) as error:
        run.step([BATCHES[0]])
    assert (error.value.whole, error.value.in_step, run.learner.room.limit) == (True, True, None)
    assert same(run.weights(), before)
    config = build(TrainingSettings, {"data": {"max_length": 24}, "run": {"microbatch_tokens": 64, "step_tokens": 64}})
    said = out_of_memory(error.value, Moment(3), config, Mesh(CPU), {})
    assert "at step 3: a micro-batch of 64 tokens, whole so that gradients are taken as they appear, does not" in said
    assert "needs less: run.step_tokens=32 run.microbatch_tokens=32, " in said
    same_length = {"data": {"max_length": 64}, "run": {"microbatch_tokens": 64, "step_tokens": 64}}
    said = out_of_memory(error.value, Moment(3), build(TrainingSettings, same_length), Mesh(CPU), {})
    assert "a smaller data.max_length with run.microbatch_tokens and run.step_tokens" in said


def test_below_one_sequence_no_weight_is_changed(tmp_path: Path) -> None:
    run = Opened(tmp_path, 0.3, True)
    before = run.weights()
    run.learner.room.relieve = None
    Full(run, 2)
    with pytest.raises(NoRoom):
        run.step([tiny_batch([40], 256)])
    assert same(run.weights(), before)


def test_the_peak_holds_gradients_of_a_layer_and_of_what_the_blocks_are_not(tmp_path: Path) -> None:
    found: list[int] = []
    for wanted in (False, True):
        run = Opened(tmp_path, 0.0, wanted)
        run.step([BATCHES[0]])
        with explained_peak(run.decoder, [run.learner]) as peak:
            run.step([BATCHES[1]])
        assert run.taking.noted is None
        assert sum(peak.classes.values()) == peak.bytes
        found.append(peak.bytes)
    assert found[1] < found[0]


def test_what_holds_memory_from_step_to_step_has_gradients_of_one_layer(tmp_path: Path) -> None:
    found: list[int] = []
    for wanted in (False, True):
        run = Opened(tmp_path, 0.3, wanted)
        held = holdings(run.decoder, run.learner.parameters, 12)
        assert held["optimizer states"] == 12
        found.append(held["gradients"])
    matrices = [p.nbytes for p in run.matrices()]
    assert 0 < found[0] - found[1] < sum(matrices)
    assert found[1] > found[0] - sum(matrices) + max(matrices)  # gate and up are one layer here


def test_a_plan_wants_it_only_for_steps_of_one_micro_batch(tmp_path: Path) -> None:
    run = Opened(tmp_path, 0.3, False)
    sizes = [sum(w.nbytes for w in weights) for weights in run.decoder.fused.trained_matrices()]
    trained = sum(p.nbytes for p in run.learner.parameters.values())
    for tokens, passing in ((64, sum(sizes) - max(sizes)), (65, 0)):
        settings = build(TrainingSettings, {"run": {"microbatch_tokens": 64, "step_tokens": tokens}}).run
        planner = Planner(run.decoder, settings, 2.04, CPU, [run.learner.optimizer])
        held = planner.held()
        assert held.passing == passing
        assert held.to_come == trained + run.learner.optimizer.to_come()
    run.taking.wanted = True
    settings = build(TrainingSettings, {"run": {"microbatch_tokens": 64, "step_tokens": 64}}).run
    held = Planner(run.decoder, settings, 2.04, CPU, [run.learner.optimizer]).held()
    assert held.to_come == trained - sum(sizes) + max(sizes) + run.learner.optimizer.to_come()
    assert held.passing == 0
