"""A run's folder: what is in it, and what is left when something goes wrong."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from burnish.cli import main
from burnish.config import build, to_yaml
from burnish.data.prepare import prepare
from burnish.data.stream import Stream
from burnish.data.templates import ChatTemplate
from burnish.data.tokenizer import Tokenizer
from burnish.engine.learner import Learner, NonFinite
from burnish.engine.preflight import check_run_folder
from burnish.engine.room import Halfway
from burnish.evaluate.likelihood import held_out_loss
from burnish.model.checkpoint import load_model
from burnish.settings import DataSettings, EvaluateSettings, TrainingSettings
from burnish.types import Sequence
from tests.tiny import instead, tiny_data, tiny_folder

TIMES = ("seconds", "tokens_per_second", "memory_bytes")


@pytest.fixture
def words(tmp_path, monkeypatch):
    """A small run, as the words of its command line."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tiny_folder(tmp_path / "model")
    tiny_data(tmp_path / "data.jsonl")
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
    assert main(instead(words, "save.trackers=[tensorboard]", "evaluate.every=3", "evaluate.prompts=2")) == 0
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
    assert row["peak"]["bytes"] == row["peak_memory_bytes"] == sum(row["peak"]["classes"].values())
    assert row["peak"]["step"] == 2
    assert row["peak"]["classes"]["weights"] > 0


def test_the_written_config_repeats_the_run(words, tmp_path):
    assert main(instead(words, "adapter.dropout=0.2")) == 0
    assert main(["sft", str(tmp_path / "run" / "config.yaml"), f"run.folder={tmp_path / 'again'}"]) == 0
    first, second = (
        [{k: v for k, v in line.items() if k not in TIMES} for line in lines(tmp_path / name)]
        for name in ("run", "again")
    )
    assert first == second
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (tmp_path / "again" / weights).read_bytes()


def test_the_newest_and_the_best_checkpoint_are_kept(words, tmp_path):
    assert main(instead(words, "evaluate.every=2", "save.keep=1", "run.steps=8", "optim.lr=0.5")) == 0
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


def rows_of_the_first_step(place: Path) -> list[int]:
    tokenizer = Tokenizer.load(place / "model")
    settings = build(DataSettings, {"path": str(place / "data.jsonl"), "max_length": 128})
    nothing_held_out = build(EvaluateSettings, {"fraction": 0})
    data = prepare(settings, nothing_held_out, tokenizer, ChatTemplate.open("auto", tokenizer), seed=0)
    (batch,) = Stream(data.train, 128, 1, seed=0).step(0)
    return sorted(batch.rows)


def test_a_loss_that_is_not_finite_stops_with_the_rows_of_the_step(words, tmp_path, monkeypatch, capsys):
    step = Learner.step

    def poisoned(self, microbatches, objective, count):
        return step(self, microbatches, lambda batch: (objective(batch)[0] * float("nan"), {}), count)

    monkeypatch.setattr(Learner, "step", poisoned)
    assert main(instead(words, "evaluate.fraction=0")) == 1
    assert "the loss of step 1 is not finite" in capsys.readouterr().err
    record = json.loads((tmp_path / "run" / "non_finite.json").read_text())
    assert record["step"] == 1
    assert record["rows"] == rows_of_the_first_step(tmp_path)


def test_what_is_found_not_finite_too_late_says_where_to_go_on(words, tmp_path, monkeypatch, capsys):
    failing(monkeypatch, at_step=3, error=NonFinite(2, "grad_norm", [1], changed=True))
    assert main(instead(words, "save.every=2")) == 1
    said = capsys.readouterr().err
    assert "Weights with finite gradients were changed: the last good checkpoint is " in said
    assert "step-00000002" in said
    assert "No weight was changed" not in said


def test_memory_that_ran_out_too_late_says_where_to_go_on(words, tmp_path, monkeypatch, capsys):
    failing(monkeypatch, at_step=3, error=Halfway())
    assert main(instead(words, "save.every=2")) == 1
    said = capsys.readouterr().err
    assert "out of memory at step 4, when some weights had been changed already" in said
    assert "step-00000002: make room, and go on with save.resume=true" in said


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


def test_what_is_saved_is_what_was_measured(words, tmp_path, capsys):
    """A full model's files hold the weights that the last verdict was about, to the last bit."""
    data = ["evaluate.fraction=0.3", "model.storage=full", "optim.lr=0.0001"]
    assert main(instead(words, *data)) == 0
    after = json.loads((tmp_path / "run" / "after.json").read_text())["metrics"]
    state = load_file(tmp_path / "run" / "checkpoints" / "step-00000006" / "weights.safetensors")
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    stored = {name.replace(".stored.", "."): tensor for name, tensor in state.items()}
    assert all(torch.equal(saved[name], stored[name]) for name in saved)
    model = load_model(tmp_path / "run" / "model", "fp32", torch.device("cpu"), torch.float32)
    tokenizer = Tokenizer.load(tmp_path / "model")
    settings = build(DataSettings, {"path": str(tmp_path / "data.jsonl"), "max_length": 128})
    held_out = prepare(
        settings, build(EvaluateSettings, {"fraction": 0.3}), tokenizer, ChatTemplate.open("auto", tokenizer), seed=0
    ).held_out
    assert held_out_loss(model, held_out, None, 4096)["loss"] == pytest.approx(after["eval_loss"], rel=1e-6)


def test_general_text_is_measured_the_same_whatever_the_micro_batch(words, tmp_path):
    (tmp_path / "general.txt").write_text("The cat sat on the mat and looked. " * 40 + "\n\nWhat is 3 plus 4?\n")
    losses = []
    for budget in (128, 1024):
        run = f"run.folder={tmp_path / str(budget)}"
        more = [
            run,
            f"run.microbatch_tokens={budget}",
            "run.step_tokens=1024",
            f"evaluate.general={tmp_path}/general.txt",
        ]
        assert main(instead(words, *more, "run.steps=0")) == 0
        losses.append(json.loads((tmp_path / str(budget) / "before.json").read_text())["metrics"]["eval_general_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_epochs_are_passes_over_the_data():
    sequences = [Sequence((1, 2, 3, 4), (1.0,) * 4, row) for row in range(10)]
    stream = Stream(sequences, 4, 8, seed=0)
    assert stream.num_packs == 10
    assert (stream.steps_in(1), stream.steps_in(4), stream.steps_in(0.5)) == (2, 5, 1)


def test_other_data_under_the_same_name_is_not_continued(words, tmp_path, capsys):
    assert main(instead(words, "run.steps=2")) == 0
    text = (tmp_path / "data.jsonl").read_text()
    (tmp_path / "data.jsonl").write_text(text.replace("say 3 ", "tell 3 "))
    assert main(instead(words, "run.steps=2", "save.resume=true")) == 1
    assert "the data, its order or the number of ranks" in capsys.readouterr().err.splitlines()[-1]


def test_a_checkpoint_half_deleted_is_no_obstacle(words, tmp_path, monkeypatch):
    real, calls = shutil.rmtree, [0]

    def cut_short(path, *args, **kwargs):
        if ".old-step" in str(path) and path.exists():
            calls[0] += 1
            if calls[0] == 1:
                next(path.iterdir()).unlink()
                raise KeyboardInterrupt
        real(path, *args, **kwargs)

    monkeypatch.setattr("burnish.engine.checkpoints.shutil.rmtree", cut_short)
    assert main(instead(words, "save.keep=1")) == 130
    assert main(instead(words, "save.keep=1", "save.resume=true")) == 0
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000006"]


def test_a_run_is_continued_under_any_name_of_its_folder(words, tmp_path, monkeypatch):
    assert main(words) == 0
    for checkpoint in ("step-00000006", "step-00000004"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / checkpoint)
    (tmp_path / "run").rename(tmp_path / "moved")
    assert main(instead(words, f"run.folder={tmp_path}/./moved/", "save.resume=true")) == 0
    assert [line["step"] for line in lines(tmp_path / "moved")] == [1, 2, 3, 4, 5, 6]
    assert "resume: false" in (tmp_path / "moved" / "config.yaml").read_text()


def test_a_signal_outside_the_steps_is_answered_in_one_line(words, monkeypatch, capsys):
    def verdict(self):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("burnish.evaluate.judge.Judge.verdict", verdict)
    before = signal.getsignal(signal.SIGTERM)
    assert main(words) == 130
    assert "save.resume=true" in capsys.readouterr().err.splitlines()[-1]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_run_that_failed_before_its_first_step_leaves_its_folder_free(tmp_path):
    folder = tmp_path / "run"
    settings = build(TrainingSettings, {"run": {"folder": str(folder)}})
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(settings))
    (folder / "before.json").write_text('{"metrics": {"eval_loss": 1.0}}')
    other = build(TrainingSettings, {"run": {"folder": str(folder), "seed": 1}})
    check_run_folder(folder, other)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="already holds a run"):
        check_run_folder(folder, other)
