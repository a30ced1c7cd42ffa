"""A run's folder: what is in it, and what is left when something goes wrong."""

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from burnish.cli import main
from burnish.engine.learner import Learner
from tests.tiny import tiny_folder

TIMES = ("seconds", "tokens_per_second", "memory_bytes")


@pytest.fixture
def words(tmp_path, monkeypatch):
    """A small run, as the words of its command line."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tiny_folder(tmp_path / "model")
    rows = [{"instruction": f"say {i} plus {i * i}", "output": "ab " * (i % 7) + "end"} for i in range(60)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = [f"model.path={tmp_path / 'model'}", f"data.path={tmp_path / 'data.jsonl'}", "data.max_length=128"]
    shared += [f"run.folder={tmp_path / 'run'}", "run.steps=6", "run.step_tokens=128", "run.microbatch_tokens=128"]
    return ["sft", *shared, "run.device=cpu", "save.every=2", "save.trackers=[]", "optim.lr=0.01"]


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def failing(monkeypatch, at_step: int, error: BaseException) -> None:
    """The learner fails with this error at a step."""
    step = Learner.step

    def fail(self, microbatches, objective, count):
        if self.steps_taken == at_step:
            raise error
        return step(self, microbatches, objective, count)

    monkeypatch.setattr(Learner, "step", fail)


def test_a_run_folder_tells_the_whole_story(words, tmp_path):
    assert main([*words, "save.trackers=[tensorboard]", "evaluate.every=3", "evaluate.prompts=2"]) == 0
    run = tmp_path / "run"
    names = {path.name for path in run.iterdir()}
    assert names >= {"config.yaml", "environment.json", "audit.json", "metrics.jsonl", "results.json", "report.html"}
    assert {"torch", "safetensors"} <= json.loads((run / "environment.json").read_text())["packages"].keys()
    trained = [line for line in lines(run) if "loss" in line]
    assert [line["step"] for line in trained] == [1, 2, 3, 4, 5, 6]
    assert trained[-1]["num_tokens"] == sum(line["tokens"] for line in trained)
    assert [line["step"] for line in lines(run) if "eval_loss" in line] == [3, 6]
    (events,) = (run / "tensorboard").iterdir()
    assert b"mean_token_accuracy" in events.read_bytes()
    (row,) = json.loads((run / "results.json").read_text())
    assert row["trainable_parameters"] == sum(
        t.numel() for t in load_file(run / "adapter/adapter_model.safetensors").values()
    )
    assert row["peak_memory_bytes"] > row["trainable_parameters"] * 16


def test_the_written_config_repeats_the_run(words, tmp_path):
    assert main([*words, "adapter.dropout=0.2"]) == 0
    assert main(["sft", str(tmp_path / "run" / "config.yaml"), f"run.folder={tmp_path / 'again'}"]) == 0
    first, second = (
        [{k: v for k, v in line.items() if k not in TIMES} for line in lines(tmp_path / name)]
        for name in ("run", "again")
    )
    assert first == second
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (tmp_path / "again" / weights).read_bytes()


def test_the_newest_and_the_best_checkpoint_are_kept(words, tmp_path):
    assert main([*words, "evaluate.every=2", "save.keep=1", "run.steps=8", "optim.lr=0.5"]) == 0
    losses = {line["step"]: line["eval_loss"] for line in lines(tmp_path / "run") if "eval_loss" in line}
    best = min(losses, key=lambda step: losses[step])
    kept = {int(path.name.removeprefix("step-")) for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {best, 8}


def test_out_of_memory_says_what_was_in_use_and_what_to_change(words, tmp_path, monkeypatch, capsys):
    failing(monkeypatch, 3, torch.OutOfMemoryError("CUDA out of memory"))
    assert main(words) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "out of memory at step 4 with" in said
    assert "run.microbatch_tokens" in said
    assert (tmp_path / "run" / "checkpoints" / "step-00000002").is_dir()


def test_a_loss_that_is_not_finite_stops_with_the_rows_of_the_step(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "burnish.losses.likelihood.cross_entropy", lambda log_probs, *_: (log_probs.sum() * float("nan"), {})
    )
    assert main([*words, "evaluate.fraction=0"]) == 1
    assert "the loss of step 1 is not finite" in capsys.readouterr().err
    record = json.loads((tmp_path / "run" / "non_finite.json").read_text())
    assert record["step"] == 1
    assert 0 < len(record["rows"]) <= 60


def test_a_full_disk_keeps_the_last_good_checkpoint_and_says_so(words, tmp_path, monkeypatch, capsys):
    from burnish.engine import checkpoints

    save, calls = checkpoints.save_file, [0]

    def full(tensors, path):
        calls[0] += 1
        if calls[0] > 3:  # three files make the first checkpoint
            raise OSError(28, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", full)
    assert main(words) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "No space left on device" in said
    assert "the last good checkpoint is" in said
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_finish_and_saves_it(words, tmp_path, monkeypatch, capsys, number):
    step = Learner.step

    def interrupted(self, microbatches, objective, count):
        if self.steps_taken == 2:
            signal.raise_signal(number)
            if number == signal.SIGTERM:
                signal.raise_signal(number)  # sent twice by some schedulers
        return step(self, microbatches, objective, count)

    monkeypatch.setattr(Learner, "step", interrupted)
    assert main(words) == 130
    assert "save.resume=true" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()
    assert len(lines(tmp_path / "run")) == 3
