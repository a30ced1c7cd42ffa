"""Room is made in every recipe; what is said of a shortage is true whenever it comes."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from burnish.config import build
from burnish.engine import relief
from burnish.engine.assemble import open_learner, open_model
from burnish.engine.learner import Learner
from burnish.engine.mesh import Mesh
from burnish.engine.planner import Planner
from burnish.engine.relief import Relief
from burnish.engine.room import Room, Shortage
from burnish.engine.run import Run
from burnish.engine.shortage import told
from burnish.engine.start import Start
from burnish.model.adapters import AdapterSpec, adapter_parameters, add_adapter
from burnish.model.decoder import Decoder
from burnish.model.shapes import SHAPES
from burnish.optim.adamw import AdamW, state_bytes
from burnish.settings import TrainingSettings
from tests.letters import letters_world, reward_adapter, train
from tests.tiny import tiny_batch, tiny_data, tiny_folder

CPU = torch.device("cpu")
ANSWERS = ("ppo", "grpo", "rloo", "reinforce")


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Runs a method of comparisons, or sft, and gives its folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tiny_folder(tmp_path / "model")
    tiny_data(tmp_path / "rows.jsonl", 12)
    answers = [("ab " * (i % 4) + "yes", "no " * (1 + i % 3) + "end") for i in range(8)]
    pairs = [{"prompt": f"say {i} plus {i * i}", "chosen": a, "rejected": b} for i, (a, b) in enumerate(answers)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))

    def run(method: str, name: str, **more: Any) -> Path:
        groups: dict[str, Any] = {
            "model": {"path": str(tmp_path / "model")},
            "adapter": {"rank": 4},
            "data": {"path": str(tmp_path / ("rows" if method == "sft" else "pairs")) + ".jsonl", "max_length": 96},
            "evaluate": {"fraction": 0.3, "every": 1},
            "run": {"steps": 2, "step_tokens": 192, "microbatch_tokens": 192, "device": "cpu"},
            "optim": {"lr": 0.01},
            "save": {"every": 0, "trackers": []},
        }
        for group, given in more.items():
            groups[group] = groups.get(group, {}) | given if isinstance(given, dict) else given
        groups["run"]["folder"] = str(tmp_path / name)
        recipe = importlib.import_module(f"burnish.recipes.{method}")
        recipe.main(build(recipe.Config, groups))
        return tmp_path / name

    return run


def fails(monkeypatch: pytest.MonkeyPatch, chosen: Callable[[int, bool], bool]) -> None:
    """Passes run out of memory by their number, from 1, among those with gradients or among those without."""
    hidden, counts = Decoder.hidden, {True: 0, False: 0}

    def limited(self: Decoder, batch: Any, adapter: str | None = None) -> torch.Tensor:
        goes_back = torch.is_grad_enabled()
        counts[goes_back] += 1
        if chosen(counts[goes_back], goes_back):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden(self, batch, adapter)

    monkeypatch.setattr(Decoder, "hidden", limited)


def metrics(folder: Path) -> list[dict[str, float]]:
    times = ("seconds", "tokens_per_second", "memory_bytes")
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.endswith(times)} for line in found]


@pytest.mark.parametrize("method", ["sft", "dpo", "reward", *ANSWERS])
def test_room_is_made_before_batches_are_divided(
    method: str, start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the run is, to the last bit, the one that never ran out of memory."""

    def run(name: str) -> Path:
        more = {"run": {"steps": 2, "microbatch_tokens": 96, "step_tokens": 96}}
        if method not in ANSWERS:
            return start(method, name)
        return train(method, letters_world(tmp_path / f"of-{name}"), tmp_path / name, **more)

    whole = run("whole")
    capsys.readouterr()
    fails(monkeypatch, lambda number, goes_back: goes_back and number == 2)
    again = run("again")
    assert "ran out of memory: blocks are computed again in the backward pass" in capsys.readouterr().out
    assert metrics(again) == metrics(whole)


def test_both_learners_of_ppo_give_way_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learners: list[Learner] = []
    own = Run.__init__

    def watched(self: Run, *given: Any) -> None:
        own(self, *given)
        learners.extend(self.learners)

    monkeypatch.setattr(Run, "__init__", watched)
    train("ppo", letters_world(tmp_path / "letters"), tmp_path / "run", run={"steps": 1})
    policy, value = learners
    assert isinstance(policy.room.relieve, Relief)
    assert policy.room.relieve is value.room.relieve
    assert policy.room is not value.room


def opened(tmp_path: Path, **optim: Any) -> tuple[Decoder, Learner, Learner]:
    """Two learners on one decoder, as those of PPO, with a plan; the second trains an adapter called value."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["tiny"]))
    groups = {
        "model": {"path": str(tmp_path), "init": "random", "storage": "nf4"},
        "adapter": {"kind": "lora", "rank": 16},
        "run": {"device": "cpu", "dtype": "fp8", "microbatch_tokens": 64, "step_tokens": 64},
        "optim": {"lr": 0.01, "kind": "adamw8bit"} | optim,
    }
    settings, mesh = build(TrainingSettings, groups), Mesh(CPU)

    def furnish(decoder: Decoder) -> None:
        add_adapter(decoder, "value", AdapterSpec(rank=16), torch.Generator().manual_seed(1))

    decoder, name = open_model(Start(tmp_path), settings.model, settings.adapter, settings.run, mesh, furnish)
    first = open_learner(decoder, name, settings.optim, 10, mesh, counted=False)
    own = adapter_parameters(decoder, "value")
    return decoder, first, open_learner(decoder, "value", settings.optim, 10, mesh, own, False, first)


def test_a_plan_counts_the_states_of_all_learners_once(tmp_path: Path) -> None:
    decoder, *learners = opened(tmp_path)
    planner = decoder.planner
    assert isinstance(planner, Planner)
    gradients = sum(p.nbytes for own in learners for p in own.parameters.values())
    before = planner.held().to_come
    assert before == gradients + sum(own.optimizer.to_come() for own in learners)
    for learner in learners:
        for parameter in learner.parameters.values():
            parameter.grad = torch.ones_like(parameter)
        learner.optimizer.step()
        learner.optimizer.zero_grad()
    assert planner.held().to_come == gradients < before
    assert planner.held().passing == 0  # of answers to come nobody knows how many micro-batches they fill
    assert sum(state_bytes(own.optimizer) for own in learners) > before - gradients - 2**16


def test_states_of_all_optimizers_go_and_come_back_with_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relief, "has_host", lambda device: True)
    giver, optimizers = Relief(CPU), list[AdamW]()
    for model in (Bare(), Bare()):
        weight = nn.Parameter(torch.zeros(64, 4096))
        optimizers.append(AdamW([{"params": [weight]}], 1e-2, (0.9, 0.99), 1e-8, False, 0, None, 2**17))
        weight.grad = torch.ones_like(weight)
        optimizers[-1].step()
        giver.add(model, optimizers[-1], Fixed())  # pyright: ignore[reportArgumentType]
    spare = Fixed.left
    held = sum(own.held() for own in optimizers)
    assert "states wait on the host" in str(giver())
    assert sum(own.held() for own in optimizers) <= held // 2
    while giver() is not None:
        pass
    assert all(own.away() > 0 for own in optimizers)
    found = [giver.recover() for _ in range(5 * relief.PATIENCE)]
    assert not any(found)
    spare[0] = 2**40  # there is room again: looked for after as many steps as ever, not after ever more
    found = [giver.recover() for _ in range(relief.PATIENCE)]
    assert found.count(True) == 1
    assert all(own.away() == 0 for own in optimizers)


class Bare(nn.Module):
    """A decoder that has nothing to give."""

    fused = planner = None


class Fixed:
    """A planner that leaves so much."""

    left: ClassVar[list[int]] = [0]

    def smaller(self) -> None:
        return None

    def spare(self) -> int:
        return self.left[0]


def test_a_shortage_is_told_with_settings_that_are_taken() -> None:
    assert told(3, Shortage(256, 128), 128).endswith("at most 128; run.microbatch_tokens=128 begins with about that")
    assert told(3, Shortage(256, 127), 128).endswith("from now on one holds at most 127")
    beside = Room(told=(heard := list[Shortage]()).append, relieve=lambda: "cups").beside("evaluation")
    batch = tiny_batch([5, 5], 50)
    assert beside.again([batch], 0) == [batch]
    assert told(3, heard[0], 128) == "evaluation at step 3 ran out of memory: cups, and it is tried again"
    assert told(3, heard[0]._replace(limit=5, made=""), 1).endswith(": it goes on with at most 5")


def ending(folder: Path) -> str:
    kept = sorted((folder / "checkpoints").glob("step-*"))
    if not kept:
        return "there is no earlier checkpoint: make room, and start anew with another run.folder"
    return f"the last good checkpoint is {kept[-1]}: make room, and go on with save.resume=true"


def test_the_end_says_before_any_step_in_it_or_after_it(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner_step, on = Learner.step, [True]
    for name, fail_from in (("before", 0), ("in", None), ("after", 1)):
        taken = [0]

        def counted(self: Learner, *given: Any, taken: list[int] = taken, **more: Any) -> dict[str, float]:
            found = learner_step(self, *given, **more)
            taken[0] += 1
            return found

        def due(number: int, goes_back: bool, taken: list[int] = taken, fail_from: int | None = fail_from) -> bool:
            return on[0] and (goes_back if fail_from is None else not goes_back and taken[0] >= fail_from)

        with monkeypatch.context() as patched:
            patched.setattr(Learner, "step", counted)
            fails(patched, due)
            with pytest.raises(MemoryError) as error:
                start("sft", name)
        said = str(error.value)
        assert ("no weight was changed by that step" in said) == (name == "in")
        assert ("out of memory before step 1: one sequence" in said) == (name == "before")
        assert ("out of memory after the updates of step 1: one sequence" in said) == (name == "after")
        assert said.endswith(ending(tmp_path / name)) == (name == "after")


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_the_end_says_that_earlier_updates_have_changed_weights(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second minibatch of grpo; in the first step of PPO's value model, after the policy's."""
    learner_step, taken, within = Learner.step, [0], [False]

    def counted(self: Learner, *given: Any, **more: Any) -> dict[str, float]:
        within[0] = True
        found = learner_step(self, *given, **more)
        within[0] = False
        taken[0] += 1
        return found

    monkeypatch.setattr(Learner, "step", counted)
    fails(monkeypatch, lambda number, goes_back: within[0] and taken[0] == 1)
    more = {"run": {"steps": 3, "microbatch_tokens": 96, "step_tokens": 96}, "minibatches": 2}
    with pytest.raises(MemoryError) as error:
        train(method, letters_world(tmp_path / "letters"), tmp_path / "run", **more)
    said = str(error.value)
    assert "out of memory at step 1, of which earlier updates have changed weights: " in said
    assert "no weight was changed" not in said
    assert said.endswith(ending(tmp_path / "run"))


@pytest.mark.parametrize("method", ["dpo", "kto", "reward", "sft", "ppo"])
def test_measuring_makes_room_and_remembers_how_much(
    method: str, start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hidden, own, rooms = Decoder.hidden, Room.beside, list[tuple[str, Room]]()
    most = 12 if method == "ppo" else 60

    def limited(self: Decoder, batch: Any, adapter: str | None = None) -> torch.Tensor:
        if not torch.is_grad_enabled() and len(batch.tokens) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden(self, batch, adapter)

    def beside(self: Room, work: str) -> Room:
        rooms.append((work, own(self, work)))
        return rooms[-1][1]

    monkeypatch.setattr(Decoder, "hidden", limited)
    monkeypatch.setattr(Room, "beside", beside)
    more: dict[str, Any] = {"run": {"steps": 1, "microbatch_tokens": 192, "step_tokens": 192}}
    if method == "ppo":
        world = letters_world(tmp_path / "letters")
        more |= {"evaluate": {"fraction": 0.3}, "reward": {"path": str(reward_adapter(world / "base", tmp_path / "r"))}}
        train(method, world, tmp_path / "run", **more)
    else:
        more |= {"loss": "kto", "run": {"steps": 0}} if method == "kto" else {}
        folder = start("dpo" if method == "kto" else method, "run", **more)
        assert {"before.json", "after.json"} <= {path.name for path in folder.iterdir()}
    said = capsys.readouterr().out
    works = {work for work, room in rooms if room.shortages}
    assert ("scoring" if method == "ppo" else "evaluation") in works
    for work, room in rooms:
        if room.shortages:
            assert f"{work} at step " in said
            assert room.limit is not None
            assert "ran out of memory with" in said


@pytest.mark.parametrize("loss", ["sigmoid", "kto"])
def test_a_reference_is_asked_in_parts(
    loss: str, start: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And so is KTO's policy, for the divergence; training goes on in the parts that it was asked about."""
    whole = start("dpo", "whole", loss=loss)
    capsys.readouterr()
    hidden = Decoder.hidden

    def limited(self: Decoder, batch: Any, adapter: str | None = None) -> torch.Tensor:
        if not torch.is_grad_enabled() and len(batch.tokens) > 60:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden(self, batch, adapter)

    monkeypatch.setattr(Decoder, "hidden", limited)
    again = start("dpo", "again", loss=loss)
    for line, wanted in zip(metrics(again), metrics(whole), strict=True):
        if "loss" in line:
            assert 0 < line.pop("microbatch_tokens") <= 60
            assert (line["tokens"], line["num_tokens"]) == (wanted["tokens"], wanted["num_tokens"])
        assert line == pytest.approx(wanted, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_as_many_tokens_are_counted_where_prompts_are_copied(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, more = letters_world(tmp_path / "letters"), {"run": {"steps": 2, "microbatch_tokens": 96, "step_tokens": 96}}
    whole = train(method, world, tmp_path / "whole", **more, epochs=2)
    hidden = Decoder.hidden

    def limited(self: Decoder, batch: Any, adapter: str | None = None) -> torch.Tensor:
        if torch.is_grad_enabled() and len(batch.tokens) > 14:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden(self, batch, adapter)

    monkeypatch.setattr(Decoder, "hidden", limited)
    again = train(method, world, tmp_path / "again", **more, epochs=2)
    names = [name for name in metrics(whole)[0] if name.endswith("tokens")]
    assert {"tokens", "num_tokens"} <= set(names)
    for line, wanted in zip(metrics(again), metrics(whole), strict=True):
        assert 0 < line["microbatch_tokens"] <= 14
        assert {name: line[name] for name in names} == {name: wanted[name] for name in names}


def test_the_first_ratio_may_be_another_after_room_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is given back may change how a pass rounds: here by far more, so that it cannot be missed."""
    hidden = Decoder.hidden

    def limited(self: Decoder, batch: Any, adapter: str | None = None) -> torch.Tensor:
        return hidden(self, batch, adapter) * (1.01 if self.checkpointing else 1.0)

    learner_step, failed = Learner.step, [False]

    def short(self: Learner, microbatches: Any, objective: Any, count: Any) -> dict[str, float]:
        def once(batch: Any) -> Any:
            if not failed[0]:
                failed[0] = True
                raise torch.OutOfMemoryError("CUDA out of memory")
            return objective(batch)

        return learner_step(self, microbatches, once, count)

    monkeypatch.setattr(Decoder, "hidden", limited)
    monkeypatch.setattr(Learner, "step", short)
    run = train("grpo", letters_world(tmp_path / "letters"), tmp_path / "run", run={"steps": 2})
    first, second = (line["approx_kl"] for line in metrics(run))
    assert first != 0
    assert second == 0  # observed with as little as the update
