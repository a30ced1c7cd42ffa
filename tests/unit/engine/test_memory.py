"""The count of live tensor bytes on the CPU, and what holds them in a step, against sums done by hand."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from burnish.config import build
from burnish.engine.assemble import open_learner, open_model
from burnish.engine.learner import Learner
from burnish.engine.memory import CLASSES, Event, Record, capped, events_of, explained_peak, measured_peak
from burnish.engine.mesh import Mesh
from burnish.engine.start import Start
from burnish.losses.likelihood import cross_entropy
from burnish.model.decoder import Decoder
from burnish.model.shapes import SHAPES
from burnish.settings import TrainingSettings
from burnish.types import Batch
from tests.tiny import tiny_batch

CPU = torch.device("cpu")
KIB = 1024


def test_freed_tensors_do_not_add_up():
    with measured_peak(CPU, []) as peak:
        for _ in range(50):
            x = torch.zeros(256)  # 1 KiB; the old one lives until the new one has its name
            del x
    assert peak.bytes == KIB


def test_what_was_held_before_counts_and_views_do_not():
    weight = torch.ones(256, 4)
    with measured_peak(CPU, [weight]) as peak:
        view = weight.view(4, 256)
        doubled = view * 2
        del doubled
    assert peak.bytes == 4 * KIB + 4 * KIB


def test_saved_activations_and_gradients_count():
    weight = torch.ones(256, 256, requires_grad=True)  # 256 KiB
    x = torch.ones(1, 256)
    with measured_peak(CPU, [weight, x]) as peak:
        y = torch.exp(x @ weight)  # the product is freed at once, exp keeps its 1 KiB output
        y.sum().backward()
    assert 2 * 256 * KIB <= peak.bytes <= 2 * 256 * KIB + 16 * KIB


def test_what_a_step_made_is_told_apart_by_when_it_was_made_and_for_how_long() -> None:
    events: list[Event] = []
    record = Record(lambda: len(events))
    parameter = torch.zeros(4, requires_grad=True)
    parameter.grad = torch.ones(4)
    at_grad = parameter.grad.untyped_storage().data_ptr()
    record.begin("forward pass")
    events += [Event(1, 100), Event(2, 50), Event(2, -50), Event(3, 30)]  # 2 does not wait for the backward pass
    record.begin("head")
    events += [Event(2, 7), Event(4, 5), Event(4, -5)]  # its place is taken anew
    record.begin("backward pass")
    events += [Event(at_grad, 16), Event(9, 1000), Event(3, -30), Event(1, -100), Event(9, -1000), Event(2, -7)]
    record.update([parameter])
    events += [Event(8, 20), Event(8, -20), Event(at_grad, -16)]
    assert record.made(events) == ("backward pass", {"gradients": 16, "activations": 130, "head": 7})


def test_a_step_that_only_gives_back_was_at_its_peak_before() -> None:
    record = Record(lambda: 0)
    record.begin("forward pass")
    assert record.made([Event(5, -100), Event(6, 60)]) == ("", {"gradients": 0, "activations": 0, "head": 0})


def test_the_record_of_the_allocator_becomes_events() -> None:
    entries = [("segment_alloc", 9), ("alloc", 4), ("free_requested", 4), ("free_completed", 4), ("snapshot", 0)]
    trace = [{"action": action, "addr": 512, "size": size, "stream": 0} for action, size in entries]
    assert events_of(trace) == [Event(512, 4), Event(512, -4)]


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 100), st.integers(0, 3)), max_size=40))
def test_what_is_told_apart_is_never_more_than_what_was_held(steps: list[tuple[int, int, int]]) -> None:
    events: list[Event] = []
    live: dict[int, int] = {}
    record, held = Record(lambda: len(events)), [0]
    for address, size, phase in steps:
        if phase < 3:
            record.begin(("forward pass", "head", "backward pass")[phase])
        events.append(Event(address, -live.pop(address)) if address in live else Event(address, size))
        if events[-1].size > 0:
            live[address] = size
        held.append(held[-1] + events[-1].size)
    found = record.made(events)[1]
    assert min(found.values()) >= 0
    assert sum(found.values()) <= max(held)


def opened(folder: Path, storage: str, kind: str, **run: str) -> tuple[Decoder, str | None, Learner]:
    (folder / "config.json").write_text(json.dumps(SHAPE))
    groups = {
        "model": {"path": str(folder), "init": "random", "storage": storage},
        "adapter": {"kind": kind, "rank": 4},
        "run": {"device": "cpu", "microbatch_tokens": 64} | run,
        "optim": {"lr": 0.01, "warmup": 0},
    }
    settings, mesh = build(TrainingSettings, groups), Mesh(CPU)
    decoder, name = open_model(Start(folder), settings.model, settings.adapter, settings.run, mesh)
    return decoder, name, open_learner(decoder, name, settings.optim, 10, mesh)


SHAPE = SHAPES["tiny"]
BATCH = tiny_batch([40, 24])


def step(decoder: Decoder, name: str | None, learner: Learner, times: int = 1) -> float:
    def objective(batch: Batch):
        scores = decoder.score(batch, name)
        return cross_entropy(scores.log_probs, batch.weights, scores.correct)

    for _ in range(times):
        metrics = learner.step([BATCH], objective, lambda batch: batch.total_weight)
    return metrics["loss"]


METHODS = [
    ("full", "none", {}),
    ("full", "none", {"memory": "least"}),
    ("full16", "none", {}),
    ("bf16", "lora", {}),
    ("bf16", "dora", {"memory": "least"}),
    ("nf4", "lora", {"dtype": "fp8"}),
]


@pytest.mark.parametrize(("storage", "kind", "run"), METHODS, ids=str)
def test_what_holds_the_peak_of_a_step_adds_up_to_it(tmp_path: Path, storage: str, kind: str, run: dict) -> None:
    decoder, name, learner = opened(tmp_path, storage, kind, **run)
    step(decoder, name, learner, 2)
    with explained_peak(decoder, [learner]) as found:
        step(decoder, name, learner)
    assert tuple(found.classes) == CLASSES
    assert sum(found.classes.values()) == found.bytes
    assert min(found.classes.values()) >= 0
    parameters = dict(decoder.named_parameters())
    adapters = sum(p.nbytes for key, p in parameters.items() if ".adapters." in key)
    rest = sum(p.nbytes for p in parameters.values()) - adapters
    if run.get("dtype") != "fp8":  # which multiplies with copies of the factors, and keeps scales of the weights
        buffers = sum(buffer.nbytes for key, buffer in decoder.named_buffers() if ".adapters." in key)
        assert (found.classes["weights"], found.classes["adapters"]) == (rest, adapters + buffers)
    assert (found.classes["adapters"] > 0) == (name is not None)
    trained = sum(p.numel() for p in learner.parameters.values())
    assert 8 * trained <= found.classes["optimizer"] <= 8 * trained + 64 * len(learner.parameters)


def test_of_blocks_that_are_computed_again_only_their_inputs_wait(tmp_path: Path) -> None:
    decoder, name, learner = opened(tmp_path, "bf16", "lora", memory="least")
    step(decoder, name, learner)
    with explained_peak(decoder, [learner]) as found:
        step(decoder, name, learner)
    tokens, width = len(BATCH.tokens), SHAPE["hidden_size"]
    tables = 2 * tokens * (width // SHAPE["num_attention_heads"]) * 4
    streams = SHAPE["num_hidden_layers"] + 2  # what the last norm reads and gives, besides
    assert 2 * 4 * tokens * width <= found.classes["activations"] <= 4 * tokens * width * streams + tables + 4096


def test_the_gradient_of_the_head_is_there_before_the_backward_pass_of_blocks(tmp_path: Path) -> None:
    decoder, name, learner = opened(tmp_path, "full", "none")
    step(decoder, name, learner)
    with explained_peak(decoder, [learner]) as found:
        step(decoder, name, learner)
    assert found.phase == "head"
    assert found.classes["gradients"] == decoder.lm_head.weight.dense(torch.float32).nbytes


def test_a_step_that_is_explained_changes_the_weights_as_any_other(tmp_path: Path) -> None:
    found: list[dict[str, torch.Tensor]] = []
    for explained in (False, True):
        decoder, name, learner = opened(tmp_path, "nf4", "lora")
        step(decoder, name, learner)
        if explained:
            with explained_peak(decoder, [learner]):
                step(decoder, name, learner)
        else:
            step(decoder, name, learner)
        step(decoder, name, learner)
        found.append({key: p.detach().clone() for key, p in learner.parameters.items()})
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_nothing_is_watched_any_more_after_a_step_that_failed(tmp_path: Path) -> None:
    decoder, name, learner = opened(tmp_path, "bf16", "lora")
    with pytest.raises(ZeroDivisionError), explained_peak(decoder, [learner]) as found:
        raise ZeroDivisionError
    assert (found.phase, sum(found.classes.values())) == ("", 0)
    assert "hidden" not in vars(decoder)
    assert not learner.optimizer._optimizer_step_pre_hooks
    assert step(decoder, name, learner) > 0


def test_no_cap_is_none() -> None:
    with capped(CPU, None):
        assert torch.ones(4).sum() == 4
