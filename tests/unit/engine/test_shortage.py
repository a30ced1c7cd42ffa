"""Runs on a device with too little memory: what they come to, and what they say."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from burnish.cli import main
from burnish.config import build
from burnish.data.dividing import within
from burnish.engine.learner import Learner
from burnish.engine.mesh import Mesh
from burnish.engine.room import Halfway, NoRoom
from burnish.engine.shortage import Moment, holdings, needing_less, out_of_memory, told_taking
from burnish.model.decoder import Decoder
from burnish.optim.adamw import adamw, state_bytes
from burnish.recipes.grpo import Config as Grpo
from burnish.settings import TrainingSettings
from tests.letters import assert_close, letters_world, train
from tests.tiny import instead, tiny_batch, tiny_data, tiny_folder

TIMES = ("seconds", "tokens_per_second", "memory_bytes")


@pytest.fixture
def words(tmp_path, monkeypatch) -> list[str]:
    """A small run, as the words of its command line."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tiny_folder(tmp_path / "model")
    tiny_data(tmp_path / "data.jsonl")
    shared = [f"model.path={tmp_path / 'model'}", f"data.path={tmp_path / 'data.jsonl'}", "data.max_length=128"]
    shared += [f"run.folder={tmp_path / 'run'}", "run.steps=6", "run.step_tokens=256", "run.microbatch_tokens=128"]
    shared += ["adapter.dropout=0.1", "adapter.rank=4"]
    return ["sft", *shared, "run.device=cpu", "save.every=2", "save.trackers=[]", "optim.lr=0.01"]


def room_for(monkeypatch: pytest.MonkeyPatch, most: int, calls: range = range(1, 10**9), training: bool = True) -> None:
    """From now on passes with gradients (or with `training` false all passes) over more tokens run out of memory.

    Only those of these numbers do, counted from 1.
    """
    hidden, count = Decoder.hidden, [0]

    def limited(self: Decoder, batch: Any, adapter: str | None = None) -> torch.Tensor:
        if torch.is_grad_enabled() or not training:
            count[0] += 1
            if len(batch.tokens) > most and count[0] in calls:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return hidden(self, batch, adapter)

    monkeypatch.setattr(Decoder, "hidden", limited)


def divided_from_the_start(monkeypatch: pytest.MonkeyPatch, limit: int, from_step: int) -> None:
    """Every learner divides its batches by this limit from a step on, without having run out of memory."""
    step = Learner.step

    def smaller(self: Learner, microbatches: Any, objective: Any, count: Any) -> dict[str, float]:
        if self.steps_taken >= from_step:
            microbatches = [part for batch in microbatches for part in within(batch, limit)]
        return step(self, microbatches, objective, count)

    monkeypatch.setattr(Learner, "step", smaller)


def lines(folder: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in found]


def state(folder: Path, step: int) -> dict[str, torch.Tensor]:
    checkpoint = folder / "checkpoints" / f"step-{step:08d}"
    return {f"{p.stem}.{k}": v for p in checkpoint.glob("*.safetensors") for k, v in load_file(p).items()}


def assert_same(folder: Path, expected: Path) -> None:
    found, wanted = state(folder, 6), state(expected, 6)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


# A run of 6 steps with 2 micro-batches each: the fifth pass with gradients is the first of step 3.
THIRD = range(5, 10**9)


def test_a_run_goes_on_with_smaller_micro_batches_and_says_so(words, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        room_for(patched, 100, THIRD)
        assert main(words) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "memory" in line and line.startswith("step")]
    assert len(said) == 2
    assert said[0].startswith("step 3 ran out of memory: blocks are computed again ")
    assert said[1].startswith("step 3 ran out of memory with ")
    own = lines(tmp_path / "run")
    limits = [line.get("microbatch_tokens") for line in own if "loss" in line]
    assert limits == [None, None, *[limits[-1]] * 4]
    assert said[1].endswith(f"from now on one holds at most {limits[-1]}")  # less than data.max_length: no setting
    assert 50 <= limits[-1] <= 64
    with monkeypatch.context() as patched:
        divided_from_the_start(patched, int(limits[-1]), from_step=2)
        assert main(instead(words, f"run.folder={tmp_path / 'small'}")) == 0
    assert_same(tmp_path / "run", tmp_path / "small")
    expected = lines(tmp_path / "small")
    assert [{k: v for k, v in line.items() if k != "microbatch_tokens"} for line in own] == expected


def test_a_run_that_is_continued_after_it_is_the_one_that_was_not(words, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        room_for(patched, 100, THIRD)
        assert main(words) == 0
    parted = tmp_path / "parted"
    shutil.copytree(tmp_path / "run", parted)
    shutil.rmtree(parted / "checkpoints" / "step-00000006")
    for name in ("after.json", "results.json"):
        (parted / name).unlink()
    assert main(instead(words, f"run.folder={parted}", "save.resume=true")) == 0  # with all the memory in the world
    assert_same(parted, tmp_path / "run")
    assert lines(parted) == lines(tmp_path / "run")


def test_a_checkpoint_from_before_limits_were_kept_is_continued(words, tmp_path):
    assert main(words) == 0
    path = tmp_path / "run" / "checkpoints" / "step-00000004" / "state.json"
    stored = json.loads(path.read_text())
    assert stored.pop("limits") == [None]
    path.write_text(json.dumps(stored))
    whole = tmp_path / "whole"
    shutil.copytree(tmp_path / "run", whole)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    assert main(instead(words, "save.resume=true")) == 0
    assert_same(tmp_path / "run", whole)


def test_below_one_sequence_it_ends_with_what_holds_the_memory(words, tmp_path, monkeypatch, capsys):
    room_for(monkeypatch, 5, THIRD)
    assert main(instead(words, "optim.kind=adamw8bit")) == 1
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "out of memory at step 3" in line]
    assert "one sequence, " in said
    assert "no weight was changed by that step" in said
    for name in ("weights", "adapters", "gradients", "optimizer states"):
        assert f" {name} 0." in said
    assert "run.memory=least" in said
    assert "model.storage=nf4" in said
    assert "adamw8bit" not in said  # it is in use
    assert "run.microbatch_tokens" not in said
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(instead(words, "optim.kind=adamw8bit", "save.resume=true")) == 0
    assert main(instead(words, "optim.kind=adamw8bit", f"run.folder={tmp_path / 'whole'}")) == 0
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_settings_that_are_in_use_already_are_not_named():
    least = {"run": {"memory": "least"}, "model": {"storage": "nf4"}, "optim": {"kind": "adamw8bit"}}
    assert needing_less(build(TrainingSettings, least), 1, 700) == ["a data.max_length below 700"]
    full = needing_less(build(TrainingSettings, {"model": {"storage": "full"}}), 1, 700)
    assert "model.storage=full16" in full
    assert "model.storage=nf4" not in full
    assert "optim.kind=adamw8bit" not in needing_less(build(TrainingSettings, {}), 2, 700)
    answers = needing_less(build(Grpo, {"reward": {"url": "http://localhost/"}}), 1, 700)
    assert "a data.max_length below 700, with rollout.max_tokens" in answers


def test_elsewhere_it_names_the_micro_batch_first_and_on_ranks_why():
    config, held = build(TrainingSettings, {"data": {"max_length": 1024}}), {"weights": 3 * 2**30, "adapters": 2**20}
    error, places = torch.OutOfMemoryError("CUDA out of memory"), [Mesh(torch.device("cpu"), 0, n) for n in (1, 2)]
    alone, several = (out_of_memory(error, Moment(7), config, place, held) for place in places)
    assert "out of memory at step 7 with " in alone
    assert "weights 3.0 GiB, adapters 1.0 MiB. Any of these needs less: run.microbatch_tokens=2048, " in alone
    assert "several ranks" not in alone
    assert "on several ranks no step is tried again with smaller micro-batches" in several
    assert "run.microbatch_tokens=2048" in several
    short = build(TrainingSettings, {"run": {"microbatch_tokens": 2048}, "data": {"max_length": 2048}})
    assert "a smaller run.microbatch_tokens and data.max_length" in out_of_memory(
        error, Moment(7), short, places[0], held
    )
    half = out_of_memory(Halfway(), Moment(7), config, places[0], held)
    assert "at step 7, when some weights had been changed already: it cannot be taken again. What stays" in half
    assert "run.microbatch_tokens" not in half
    batch = tiny_batch([700])
    assert "one sequence, 700 tokens, does not fit" in out_of_memory(NoRoom(batch), Moment(7), config, places[0], held)


def test_holdings_are_the_bytes_of_what_there_is():
    model = torch.nn.ModuleDict({"base": torch.nn.Linear(8, 4, bias=False), "own": torch.nn.Linear(4, 2, bias=False)})
    model.register_buffer("table", torch.zeros(3))
    trained = {"q_proj.adapters.policy.A": model["own"].weight}
    optimizer = adamw(trained, 0.1, (0.9, 0.999), 1e-8, 0.0)
    model["own"].weight.grad = torch.ones(2, 4)
    optimizer.step()
    found = holdings(model, trained, state_bytes(optimizer))
    assert found == {"weights": 4 * 32 + 12, "adapters": 32, "gradients": 32, "optimizer states": 64 + 4}
    assert "computed twice (optim.clip=0 needs none)" in told_taking(True)
    assert "others have changed by then" in told_taking(False)
    everything = dict(model.named_parameters())
    assert holdings(model, everything, 0) == {"weights": 4 * 40 + 12, "gradients": 160}


def test_evaluation_divides_what_it_has_no_room_for(words, tmp_path, monkeypatch):
    measured = instead(words, "run.steps=0", "evaluate.fraction=0.3")
    assert main(instead(measured, f"run.folder={tmp_path / 'whole'}")) == 0
    room_for(monkeypatch, 48, training=False)
    assert main(measured) == 0
    whole, found = (json.loads((tmp_path / name / "after.json").read_text()) for name in ("whole", "run"))
    assert found["metrics"] == pytest.approx(whole["metrics"], rel=1e-5)


@pytest.mark.parametrize("method", ["reward", "dpo", "dpo loss=kto"])
def test_learning_from_comparisons_goes_on_with_smaller_micro_batches(method, words, tmp_path, monkeypatch, capsys):
    answers = [("ab " * (i % 4) + "yes", "no " * (1 + i % 3) + "end") for i in range(16)]
    rows = [{"prompt": f"say {i} plus {i * i}", "chosen": a, "rejected": b} for i, (a, b) in enumerate(answers)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ["run.microbatch_tokens=256", "run.step_tokens=512", "run.steps=3", "adapter.dropout=0"]
    words = [*method.split(), *instead(words[1:], *more)]
    assert main(instead(words, f"run.folder={tmp_path / 'whole'}")) == 0
    room_for(monkeypatch, 120)
    assert main(words) == 0
    assert "step 1 ran out of memory with " in capsys.readouterr().out
    for line, wanted in zip(lines(tmp_path / "run"), lines(tmp_path / "whole"), strict=True):
        assert line.pop("microbatch_tokens", 0) <= 128
        assert line == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    found, expected = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("run", "whole"))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-2, atol=2e-4)


@pytest.mark.parametrize("method", ["ppo", "grpo", "rloo", "reinforce"])
@pytest.mark.parametrize("first", [1, 2], ids=["observing", "updating"])
def test_learning_from_answers_goes_on_with_smaller_micro_batches(method, first, tmp_path, monkeypatch, capsys):
    world = letters_world(tmp_path / "letters")
    more: dict[str, Any] = {"run": {"steps": 3, "microbatch_tokens": 96, "step_tokens": 96}}
    more |= {"minibatches": 1} if method == "ppo" else {}  # all answers of a step in one micro-batch
    expected = train(method, world, tmp_path / "whole", **more)
    capsys.readouterr()
    room_for(monkeypatch, 24, range(first, 10**9))
    run = train(method, world, tmp_path / "run", **more)
    assert "step 1 ran out of memory" in capsys.readouterr().out
    metrics = (run / "metrics.jsonl").read_text().splitlines()
    kept = [json.loads(line) for line in metrics]
    assert all(line.pop("microbatch_tokens") <= 48 for line in kept)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert_close(run, expected)
