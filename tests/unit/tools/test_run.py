"""Pipelines on a tiny model: what is read, what is run, what is left alone, and how one goes on that was killed."""

import json
import os
import shutil
import signal
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
from burnish.config import ConfigError, build, parse
from burnish.tools.run import Config, _check, read_stages
from tests.tiny import forkserver, tiny_data, tiny_folder

TIMES = ("seconds", "tokens_per_second", "memory_bytes")
"""What two equal runs may differ in."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines")
    tiny_folder(folder / "model")
    tiny_data(folder / "data.jsonl")
    return folder


def tree(base: Path, folder: Path, **stages: dict[str, Any]) -> dict[str, Any]:
    """A pipeline of small stages: those given, or two of fine-tuning, the second on what the first left."""
    given = stages or {"first": {}, "second": {"from": "first", "optim.lr": 0.02}}
    return {
        "folder": str(folder),
        "shared": {
            "model": {"path": str(base / "model")},
            "data": {"path": str(base / "data.jsonl"), "max_length": 128},
            "adapter": {"rank": 2},
            "evaluate.fraction": 0.1,
            "optim": {"lr": 0.01},
            "run": {"steps": 3, "step_tokens": 128, "device": "cpu"},
            "save": {"trackers": [], "every": 1},
        },
        "stages": {name: {"recipe": "sft", **own} for name, own in given.items()},
    }


def written(pipeline: dict[str, Any], place: Path) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    path = place / "pipeline.yaml"
    path.write_text(yaml.safe_dump(pipeline, sort_keys=False))
    return path


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


def pipeline_in_process(words: list[str], kill_in: str | None, at_call: int) -> None:
    """Run the pipeline in this process; with `kill_in`, end it by SIGKILL at the n-th call of that function."""
    torch.set_num_threads(1)
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
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


def all_recipes(base: Path, folder: Path) -> dict[str, Any]:
    """Fine-tuning, then a reward model and reinforcement, and DPO beside them, in as few steps as possible."""
    answers = "".join(
        json.dumps({"prompt": f"say {i}", "chosen": f"{i} is what I say", "rejected": "no " * (1 + i % 3)}) + "\n"
        for i in range(30)
    )
    (base / "pairs.jsonl").write_text(answers)
    pairs = {"path": str(base / "pairs.jsonl")}
    pipeline = tree(
        base,
        folder,
        sft={"run.steps": 40, "optim.lr": 0.03},  # until some answers end by themselves
        reward={"recipe": "reward", "from": "sft", "data": pairs},
        ppo={
            "recipe": "ppo",
            "from": "sft",
            "reward.path": "reward",
            "data": pairs,
            "rollout": {"prompts": 12, "max_tokens": 20},
            "minibatches": 2,
            "evaluate": {"prompts": 3, "max_tokens": 6},
        },
        dpo={"recipe": "dpo", "from": "sft", "data": pairs, "beta": 0.5, "evaluate": {"prompts": 3, "max_tokens": 6}},
    )
    pipeline["shared"]["run"]["steps"] = 2
    return pipeline


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


# What is read.


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[3] / "examples").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_example_is_read_and_its_stages_follow_each_other(path: Path) -> None:
    config = parse(Config, [str(path)])
    stages = read_stages(config)
    assert config.folder == f"runs/{path.stem}"
    assert f"burnish run examples/{path.name}" in path.read_text().splitlines()[0]
    for stage in stages:
        _check(stage)
    assert [stage.references.get("from") is None for stage in stages] == [True, *[False] * (len(stages) - 1)]
    assert [stage.recipe for stage in stages] == {
        "sft-dpo": ["sft", "dpo"],
        "qlora-dpo": ["sft", "dpo"],
        "sft-lora-dpo": ["sft", "sft", "dpo"],
        "sft-reward-ppo": ["sft", "reward", "ppo"],
    }[path.stem]


def stages_of(base: Path, folder: Path, **stages: Any) -> dict[str, Any]:
    return {stage.name: stage for stage in read_stages(build(Config, tree(base, folder, **stages)))}


def test_a_stages_own_settings_count_more_than_shared_ones_and_names_become_folders(base: Path, tmp_path: Path) -> None:
    found = stages_of(base, tmp_path, a={}, b={"from": "a", "optim": {"lr": 0.5}, "evaluate.general": "none"})
    assert found["a"].config.optim.lr == 0.01
    assert found["b"].config.optim.lr == 0.5
    assert found["b"].config.evaluate.general is None
    assert found["b"].config.from_ == str(tmp_path / "a")
    assert found["b"].config.run.folder == str(tmp_path / "b")
    assert found["b"].config.run.steps == 3
    assert found["a"].config.model.path == str(base / "model")
    assert "path" not in found["b"].config.model.model_fields_set


def test_a_reward_is_a_stage_too_and_a_path_is_a_path(base: Path, tmp_path: Path) -> None:
    ppo = {"recipe": "ppo", "from": "sft", "reward": {"path": "rm"}, "data.max_length": 128, "rollout.max_tokens": 16}
    stages = {"sft": {}, "rm": {"recipe": "reward", "from": "sft"}, "ppo": ppo, "again": {"from": str(tmp_path)}}
    found = stages_of(base, tmp_path, **stages)
    assert found["ppo"].config.reward.path == str(tmp_path / "rm")
    assert dict(found["ppo"].references) == {"from": "sft", "reward.path": "rm"}
    assert found["again"].references == {}


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"a": {}, "b": {"from": "aa"}}, r"stage 'b': from: there is no stage and no folder 'aa'; did you mean 'a'\?"),
        ({"b": {"from": "a"}, "a": {}}, "stage 'b': from=a is a later stage: move it above"),
        ({"b": {"from": "a"}, "a": {"from": "b"}}, "stage 'b': from=a is and 'a' needs this stage|from=a .* a circle"),
        ({"b": {"from": "b"}}, "stage 'b': from=b is this stage itself"),
        ({"a": {"recipe": "sfft"}}, r"stage 'a': there is no recipe 'sfft'; did you mean 'sft'\?"),
        ({"a": {"optim.lrr": 1}}, r"stage 'a': unknown key 'optim.lrr'; did you mean 'optim.lr'\?"),
        ({"a": {"optim.lr": "fast"}}, "stage 'a': 'optim.lr' should be float"),
        ({"a": {"optim": 3}}, "stage 'a': 'optim' is a group of settings"),
        ({"a": {"run.folder": "x"}}, "stage 'a': run.folder is for the pipeline to say"),
        ({"a": {"save.resume": True}}, "stage 'a': save.resume is for the pipeline to say"),
        ({"a/b": {}}, "stage 'a/b': a stage's name is its folder's"),
        ({"sft": {}, "r": {"recipe": "reward"}, "x": {"from": "r"}}, "stage 'x': from=r is a reward model"),
        (
            {"sft": {}, "x": {"recipe": "ppo", "reward.path": "sft", "rollout.max_tokens": 9}},
            "stage 'x': reward.path=sft is a stage of recipe sft, not reward",
        ),
        ({"a": {"recipe": None}}, "stage 'a': there is no recipe 'None'"),
    ],
)
def test_mistakes_name_the_stage(base: Path, tmp_path: Path, stages: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        stages_of(base, tmp_path, **stages)
    assert "\n" not in str(caught.value)


def test_mistakes_of_the_file_as_a_whole(base: Path, tmp_path: Path) -> None:
    pipeline = tree(base, tmp_path)
    cases = [
        (
            {"shared": {"optm": {"lr": 1}}},
            r"shared: no stage's recipe has the setting 'optm.lr'; did you mean 'optim.lr'",
        ),
        (
            {"stages": {**pipeline["stages"], "secnd": {"beta": 1}}},
            "'secnd': it has no recipe.*did you mean stage 'second'",
        ),
        ({"stages": {"a": "sft"}}, "stage 'a': it has no recipe: write recipe: .*sft"),
        ({"stages": {}}, "a pipeline has stages: write"),
        ({"stage": 1}, "unknown key 'stage'; did you mean 'stages'"),
    ]
    for change, message in cases:
        with pytest.raises(ConfigError, match=message) as caught:
            read_stages(build(Config, {**pipeline, **change}))
        assert "\n" not in str(caught.value)


def test_mistakes_come_before_torch_and_before_anything_runs(base: Path, tmp_path: Path) -> None:
    good = tree(base, tmp_path / "out")
    changes: list[dict[str, Any]] = [
        {"recipe": "sft", "from": "frst"},
        {"recipe": "sft", "from": "first", "data.path": str(tmp_path / "missing.jsonl")},
        {"recipe": "sft", "from": "first", "evaluate.general": "missing.txt"},
        {"recipe": "sft", "model.path": str(tmp_path / "missing")},
        {"recipe": "sft", "from": str(tmp_path / "missing")},
        {"recipe": "sft", "from": "first", "save.trackers": ["wandb"]},
    ]
    files = [
        written({**good, "stages": {**good["stages"], "second": change}}, tmp_path / str(i))
        for i, change in enumerate(changes)
    ]
    script = (
        "import sys; from burnish.cli import main\n"
        f"for path in {[str(file) for file in files]!r}:\n"
        "    assert main(['run', path]) in (1, 2)\n"
        "    assert 'torch' not in sys.modules, path\n"
        "assert main(['run', '--help']) == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(changes)
    assert all(line.startswith("burnish run: stage 'second': ") for line in lines), lines
    assert "stages.dpo.beta=0.2" in done.stdout
    assert not (tmp_path / "out").exists()
