"""Pipelines on a tiny model: what is read, what is run, what is left alone, and how one goes on that was killed."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from burnish.cli import main
from tests.tiny import forkserver
from tests.unit.pipelines.trees import all_recipes, base_folder, tree, written

TIMES = ("seconds", "tokens_per_second", "memory_bytes")
"""What two equal runs may differ in."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("pipelines"))


def run(*words: str | Path) -> int:
    return main(["run", *map(str, words)])


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines that say what was done about each stage."""
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("[")]


def result(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """What a stage left: its adapter, and its metrics without times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    weights = load_file(folder / "adapter" / "adapter_model.safetensors")
    return weights, [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def assert_same(folder: Path, expected: Path) -> None:
    (weights, lines), (wanted, wanted_lines) = result(folder), result(expected)
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    assert lines == wanted_lines


@pytest.fixture(scope="module")
def done(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of two stages that has run."""
    place = tmp_path_factory.mktemp("done")
    assert run(written(tree(base, place / "out"), place)) == 0
    return place


@pytest.fixture
def again(done: Path, base: Path, tmp_path: Path) -> Path:
    """A copy of the pipeline that has run, to change."""
    shutil.copytree(done / "out", tmp_path / "out")
    return written(tree(base, tmp_path / "out"), tmp_path)


def test_stages_run_one_on_the_other_and_leave_adapters_a_lineage_and_one_report(done: Path, base: Path) -> None:
    out = done / "out"
    left = {path.name for path in out.iterdir()}
    assert left == {"first", "second", "lineage.json", "report.html", "results.json", "table.md"}
    assert not list(out.rglob("model.safetensors")), "the base is not copied"
    assert not list(out.rglob("checkpoints"))
    rows = json.loads((out / "results.json").read_text())
    assert [(row["run"], row.get("from")) for row in rows] == [("first", None), ("second", "first")]
    assert rows[1]["before"]["eval_loss"] == rows[0]["metrics"]["eval_loss"]
    stages = json.loads((out / "lineage.json").read_text())["stages"]
    assert list(stages) == ["first", "second"]
    assert stages["second"]["from"] == {"from": "first"}
    assert stages["second"]["inputs"]["stage from=first"] == stages["first"]["key"]
    assert stages["second"]["base"] == stages["first"]["base"] == str(base / "model")
    assert stages["second"]["versions"]["packages"]["torch"] == torch.__version__
    adapter = out / "second" / "adapter"
    assert stages["second"]["left"]["adapter"]["bytes"] == sum(p.stat().st_size for p in adapter.iterdir())
    assert yaml.safe_load((out / stages["second"]["settings"]).read_text())["optim"]["lr"] == 0.02


def test_a_pipeline_gives_what_its_recipes_give_alone(done: Path, base: Path, tmp_path: Path) -> None:
    words = [f"model.path={base / 'model'}", f"data.path={base / 'data.jsonl'}", "data.max_length=128", "optim.lr=0.02"]
    words += ["run.steps=3", "run.step_tokens=128", "run.device=cpu", "save.trackers=[]", "evaluate.fraction=0.1"]
    assert main(["sft", *words, f"from={done / 'out' / 'first'}", f"run.folder={tmp_path / 'alone'}"]) == 0
    assert_same(tmp_path / "alone", done / "out" / "second")


def test_what_is_done_is_left_alone(again: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = again.parent / "out"
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*")}
    assert run(again, "--json") == 0
    captured = capsys.readouterr()
    assert [row["run"] for row in json.loads(captured.out)["stages"]] == ["first", "second"]
    lines = [line for line in captured.err.splitlines() if line.startswith("[")]
    assert lines == [f"[{n}/2] {name}: done before, in {out / name}" for n, name in ((1, "first"), (2, "second"))]
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/*")} == before


def test_what_does_not_change_the_result_changes_nothing(again: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run(again, "shared.save.every=2", "shared.save.log_every=3", "stages.second.save.trackers=[tensorboard]") == 0
    )
    assert all("done before" in line for line in said(capsys))


def test_a_changed_setting_runs_its_stage_anew_and_keeps_what_was(
    again: Path, done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = again.parent / "out"
    assert run(again, "stages.second.optim.lr=0.03") == 0
    first, second = said(capsys)
    assert "done before" in first
    assert "anew: optim.lr (0.02 before, 0.03 now) changed" in second
    assert str(out / "second.before-1") in second
    assert_same(out / "second.before-1", done / "out" / "second")
    assert result(out / "second")[1][1]["loss"] != result(out / "second.before-1")[1][1]["loss"]
    assert run(again) == 0
    assert (out / "second.before-2").is_dir()
    assert_same(out / "second", done / "out" / "second")


def test_a_changed_first_stage_runs_those_that_name_it_anew(again: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(again, "stages.first.run.seed=5") == 0
    first, second = said(capsys)
    assert "run.seed (0 before, 5 now) changed" in first
    assert "anew: stage from=first changed" in second


def test_changed_data_and_a_changed_base_are_noticed(
    base: Path, again: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = (base / "data.jsonl").read_text()
    pipeline = tree(base, tmp_path / "new", only={"data.path": str(tmp_path / "rows.jsonl"), "run.steps": 1})
    shutil.copytree(base / "model", tmp_path / "model")
    pipeline["shared"]["model"]["path"] = str(tmp_path / "model")
    path = written(pipeline, tmp_path / "place")
    (tmp_path / "rows.jsonl").write_text(rows)
    assert run(path) == 0
    (tmp_path / "rows.jsonl").write_text(rows.replace("say 3 ", "say 4 "))
    assert run(path) == 0
    assert "the content of data.path changed" in said(capsys)[-1]
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"rope_theta": 5000.0}))
    assert run(path) == 0
    assert "the content of model.path changed" in said(capsys)[-1]


def test_a_stage_of_another_pipeline_is_not_touched(again: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = again.parent / "out"
    (out / "lineage.json").unlink()
    assert run(again) == 1
    assert f"{out / 'results.json'} is in the way and was not made by this pipeline" in capsys.readouterr().err
    for name in ("results.json", "report.html", "table.md"):
        (out / name).unlink()
    assert run(again) == 1
    assert f"{out / 'first'} is in the way" in capsys.readouterr().err
    assert run(again, f"folder={out / 'first'}") == 1
    assert f"{out / 'first' / 'config.yaml'} is in the way" in capsys.readouterr().err
    (out / "lineage.json").write_text("{")
    assert run(again) == 1
    assert "lineage.json cannot be read" in capsys.readouterr().err


def test_a_stage_that_fails_is_named_and_the_others_stay(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = tree(base, tmp_path / "out", good={}, bad={"from": "good", "adapter.rank": 8})
    assert run(written(pipeline, tmp_path)) == 1
    assert "burnish run: stage 'bad': adapter.rank=8, but" in capsys.readouterr().err.splitlines()[-1]
    assert run(written(tree(base, tmp_path / "out", good={}, bad={"from": "good"}), tmp_path)) == 0
    good, bad = said(capsys)
    assert "done before" in good
    assert "anew" not in bad


# Killed and stopped.


def pipeline_in_process(words: list[str], kill_in: str | None, at_call: int, quiet: bool = True) -> None:
    """Run the pipeline in this process; with `kill_in`, end it by SIGKILL at the n-th call of that function."""
    torch.set_num_threads(1)
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    if quiet:
        os.dup2(sink, 2)
    if kill_in is not None:
        module, _, name = kill_in.rpartition(":")
        owner: Any = __import__(module, fromlist=["_"])
        holder, _, last = name.rpartition(".")
        target = getattr(owner, holder) if holder else owner
        original, calls = getattr(target, last), [0]

        def deadly(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == at_call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(target, last, deadly)
    raise SystemExit(main(["run", *words]))


def ranked(path: Path, words: list[str], rank: int, port: int) -> None:
    """One of two ranks, as torchrun would start it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.dup2(os.open(path.with_name(f"said.{rank}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    pipeline_in_process([str(path), *words], None, 0, quiet=False)


@pytest.fixture(scope="module")
def processes():
    return forkserver()


KILLS = [
    ("burnish.tools.run:write_lineage", 1),  # before anything was noted
    ("burnish.engine.run:Run._write_text", 1),  # in the first stage's folder, which is empty yet
    ("burnish.engine.learner:Learner._clip", 2),  # in the first stage
    ("burnish.report.results:write_page", 1),  # the first stage's results are there, its page is not
    ("burnish.tools.run:left", 1),  # the first stage is done, which is not noted yet
    ("burnish.engine.learner:Learner._clip", 2),  # in the second stage
    ("burnish.engine.checkpoints:save_file", 2),  # while that one saves
    ("burnish.tools.run:write_lineage", 1),  # when the second is done
    ("burnish.tools.run:_report", 1),  # only the report is missing
]


def test_killed_again_and_again_it_goes_on_as_if_nothing_had_happened(
    processes: Any, base: Path, done: Path, tmp_path: Path
) -> None:
    words = [str(written(tree(base, tmp_path / "out"), tmp_path))]
    for kill_in, at_call in (*KILLS, (None, 0)):
        process = processes.Process(target=pipeline_in_process, args=(words, kill_in, at_call))
        process.start()
        process.join()
        assert process.exitcode == (-signal.SIGKILL if kill_in else 0), kill_in
    for name in ("first", "second"):
        assert_same(tmp_path / "out" / name, done / "out" / name)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in (done / "out").iterdir()}


def test_killed_while_it_runs_anew_nothing_is_lost(processes: Any, again: Path, done: Path) -> None:
    words, out = [str(again), "stages.first.optim.lr=0.03"], again.parent / "out"
    for kill, status in (("burnish.tools.run:write_lineage", -signal.SIGKILL), (None, 0)):
        process = processes.Process(target=pipeline_in_process, args=(words, kill, 1))
        process.start()
        process.join()
        assert process.exitcode == status
    for name in ("first", "second"):
        assert_same(out / f"{name}.before-1", done / "out" / name)
    assert not list(out.glob("*.before-2"))


def test_two_ranks_agree_on_what_there_is_to_do(processes: Any, base: Path, tmp_path: Path) -> None:
    pipeline = tree(base, tmp_path / "out")
    pipeline["shared"]["run"] |= {"microbatch_tokens": 64}
    pipeline["shared"]["data"]["max_length"] = 64
    path = written(pipeline, tmp_path)
    said: list[list[str]] = []
    for words in ([], ["stages.second.optim.lr=0.03"]):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        ranks = [processes.Process(target=ranked, args=(path, words, rank, port)) for rank in range(2)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(120)
        assert [process.exitcode for process in ranks] == [0, 0]
        main_rank, other = ((tmp_path / f"said.{rank}").read_text().splitlines() for rank in range(2))
        said.append([line for line in main_rank if line.startswith("[") and "/2]" in line])
        assert not [line for line in other if "/2]" in line]
    assert "done before" in said[1][0]
    assert "optim.lr (0.02 before, 0.03 now) changed" in said[1][1]
    assert (tmp_path / "out" / "second.before-1").is_dir()
    assert json.loads((tmp_path / "out" / "second" / "environment.json").read_text())["ranks"] == 2


def test_asked_to_stop_it_saves_and_the_same_command_goes_on(base: Path, tmp_path: Path) -> None:
    pipeline = tree(base, tmp_path / "out", short={}, long={"run.steps": 100_000, "save.every": 0, "from": "short"})
    command = [sys.executable, "-m", "burnish", "run", str(written(pipeline, tmp_path))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "out" / "long" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    assert process.returncode == 130
    assert out == ""
    assert "burnish run: stage 'long': asked to stop, and saved at step" in err.splitlines()[-1]
    assert "the same command goes on from there" in err.splitlines()[-1]
    assert len(list((tmp_path / "out" / "long" / "checkpoints").iterdir())) == 1


def test_a_pipeline_of_all_kinds_killed_in_reinforcement_goes_on_bit_for_bit(
    processes: Any, base: Path, tmp_path: Path
) -> None:
    whole, killed = (
        written(all_recipes(base, tmp_path / name / "out"), tmp_path / name) for name in ("whole", "killed")
    )
    kill_in, in_ppo = "burnish.engine.run:Run.log", 40 + 2 + 2  # the second step of the third stage
    for path, kill, at_call, status in (
        (whole, None, 0, 0),
        (killed, kill_in, in_ppo, -signal.SIGKILL),
        (killed, None, 0, 0),
    ):
        process = processes.Process(target=pipeline_in_process, args=([str(path)], kill, at_call))
        process.start()
        process.join()
        assert process.exitcode == status
    expected, found = tmp_path / "whole" / "out", tmp_path / "killed" / "out"
    for name in ("sft", "reward", "ppo", "dpo"):
        weights = [path.relative_to(expected) for path in (expected / name).glob("*/*.safetensors")]
        assert len(weights) == (2 if name == "ppo" else 1)
        for path in weights:
            ours, theirs = load_file(found / path), load_file(expected / path)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours), path
    before, after = (json.loads((place / "results.json").read_text()) for place in (expected, found))
    assert [row["metrics"] for row in before] == [row["metrics"] for row in after]
    assert [row["method"] for row in after] == ["LoRA", "LoRA + reward model", "LoRA + PPO", "LoRA + DPO"]
    assert [row.get("from") for row in after] == [None, "sft", "sft", "sft"]
    stages = json.loads((found / "lineage.json").read_text())["stages"]
    assert stages["ppo"]["from"] == {"from": "sft", "reward.path": "reward"}
    assert stages["ppo"]["left"].keys() == {"adapter", "value"}
    assert "eval_win_rate" in after[2]["metrics"]
