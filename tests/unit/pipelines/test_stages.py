"""What a pipeline's file is read as, and what is answered to mistakes in it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from burnish.config import ConfigError, build, parse
from burnish.pipelines.stages import Stage, check_stage, read_stages
from burnish.tools.run import Config
from tests.unit.pipelines.trees import base_folder, tree, written


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("stages"))


def read(config: Config) -> list[Stage]:
    return read_stages(Path(config.folder), config.shared, config.stages)


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[3] / "examples").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_example_is_read_and_its_stages_follow_each_other(path: Path) -> None:
    config = parse(Config, [str(path)])
    stages = read(config)
    assert config.folder == f"runs/{path.stem}"
    assert f"burnish run examples/{path.name}" in path.read_text().splitlines()[0]
    for stage in stages:
        check_stage(stage)
    assert [stage.references.get("from") is None for stage in stages] == [True, *[False] * (len(stages) - 1)]
    assert [stage.recipe for stage in stages] == {
        "sft-dpo": ["sft", "dpo"],
        "qlora-dpo": ["sft", "dpo"],
        "sft-lora-dpo": ["sft", "sft", "dpo"],
        "sft-reward-ppo": ["sft", "reward", "ppo"],
    }[path.stem]


def stages_of(base: Path, folder: Path, **stages: Any) -> dict[str, Any]:
    return {stage.name: stage for stage in read(build(Config, tree(base, folder, **stages)))}


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


def test_a_group_and_other_settings_of_it_dotted_go_together(base: Path, tmp_path: Path) -> None:
    found = stages_of(base, tmp_path, a={"run": {"seed": 5}, "run.steps": 6}, b={"run.steps": 6, "run": {"seed": 5}})
    assert [(stage.config.run.seed, stage.config.run.steps) for stage in found.values()] == [(5, 6), (5, 6)]


@pytest.mark.parametrize("own", [{"run": {"seed": 5}, "run.steps": 6}, {"run.steps": 6, "run": {"seed": 5}}])
def test_a_word_counts_more_than_the_file_however_that_has_it(base: Path, tmp_path: Path, own: dict[str, Any]) -> None:
    path = written(tree(base, tmp_path, a=own), tmp_path)
    stage = read(parse(Config, [str(path), "stages.a.run.steps=7"]))[0]
    assert (stage.config.run.seed, stage.config.run.steps) == (5, 7)


def test_a_stage_that_a_file_has_twice_is_refused(base: Path, tmp_path: Path) -> None:
    path = written(tree(base, tmp_path, a={}), tmp_path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, "  a: {recipe: dpo}"]))
    said = f"{path}: 'a' is given twice, on lines {lines.index('  a:') + 1} and {len(lines) + 1}: leave one out"
    with pytest.raises(ConfigError) as caught:
        parse(Config, [str(path)])
    assert str(caught.value) == said


def test_a_reward_is_a_stage_too_and_a_path_is_a_path(base: Path, tmp_path: Path) -> None:
    ppo = {"recipe": "ppo", "from": "sft", "reward": {"path": "rm"}, "data.max_length": 128, "rollout.max_tokens": 16}
    stages = {"sft": {}, "rm": {"recipe": "reward", "from": "sft"}, "ppo": ppo, "again": {"from": str(tmp_path)}}
    found = stages_of(base, tmp_path, **stages)
    assert found["ppo"].config.reward.path == str(tmp_path / "rm")
    assert dict(found["ppo"].references) == {"from": "sft", "reward.path": "rm"}
    assert found["again"].references == {}


def test_none_is_a_choice_where_it_is_one_of_several(base: Path, tmp_path: Path) -> None:
    reward = {"recipe": "reward", "from": "a", "normalise": "none", "optim.lr": "none"}
    found = stages_of(base, tmp_path, a={"adapter.kind": "none"}, b=reward)
    assert found["a"].config.adapter.kind == "none"
    assert found["a"].config.model.storage == "full"
    assert found["b"].config.normalise == "none"


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
        (
            {"a": {"run": {"steps": 5, "seed": 1}, "run.steps": 6}},
            "^stage 'a': 'run.steps' is given twice, in the group 'run' and dotted: leave one out$",
        ),
        (
            {"a": {"adapter.rank_pattern": {"q_proj": 1}, "adapter": {"rank_pattern": {"k_proj": 1}}}},
            "^stage 'a': 'adapter.rank_pattern' is given twice, in the group 'adapter' and dotted: leave one out$",
        ),
        ({"a": {"run.steps": 6, "run": {}}}, "^stage 'a': 'run' is a group .* are given dotted: leave it out$"),
        ({"a": {"recipe": None}}, "stage 'a': there is no recipe 'None'"),
        ({"a": {}, "b": {"from": ["a"]}}, "stage 'b': 'from' should be"),
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
            "'secnd': it has no recipe.*did you mean 'second'",
        ),
        ({"stages": {"a": "sft"}}, "stage 'a': it has no recipe: write recipe: .*sft"),
        ({"stages": {}}, "a pipeline has stages: write"),
        (
            {"shared": {**pipeline["shared"], "optim.lr": 1}},
            "^shared: 'optim.lr' is given twice, in the group 'optim' and dotted: leave one out$",
        ),
        ({"stage": 1}, "unknown key 'stage'; did you mean 'stages'"),
    ]
    for change, message in cases:
        with pytest.raises(ConfigError, match=message) as caught:
            read(build(Config, {**pipeline, **change}))
        assert "\n" not in str(caught.value)


def test_mistakes_come_before_torch_and_before_anything_runs(base: Path, tmp_path: Path) -> None:
    good = tree(base, tmp_path / "out")
    changes: list[dict[str, Any]] = [
        {"recipe": "sft", "from": "frst"},
        {"recipe": "sft", "from": "first", "data.path": str(tmp_path / "missing.jsonl")},
        {"recipe": "sft", "from": "first", "evaluate.general": "missing.txt"},
        {"recipe": "sft", "model.path": str(tmp_path / "missing")},
        {"recipe": "sft", "from": str(tmp_path / "missing")},
        {"recipe": "ppo", "from": "first", "reward.function": "missing.py:score", "rollout.max_tokens": 9},
        {"recipe": "ppo", "from": "first", "reward.path": str(tmp_path / "missing"), "rollout.max_tokens": 9},
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
