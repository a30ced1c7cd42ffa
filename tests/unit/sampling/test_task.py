"""What reinforcement learning refuses, in one line each, and what it does with rewards that misbehave."""

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from burnish.cli import main
from burnish.config import ConfigError, build
from burnish.recipes import ppo
from burnish.sampling.task import open_task
from tests.letters import METHODS, letters_world, lines, policy_adapter, prompts_file, reward_adapter, settings, train

HERE = Path(__file__)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = letters_world(tmp_path_factory.mktemp("letters"))
    reward_adapter(folder / "base", folder / "reward")
    policy_adapter(folder / "base", folder / "sft")
    return folder


def config(method: str, world: Path, **more: Any) -> Any:
    return build(importlib.import_module(f"burnish.recipes.{method}").Config, settings(world, world / "never", more))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"kl": {"beta": 0}}, r"'kl\.beta' should be float, not 0 \(input should be greater than 0\)"),
        ({"kl": {"beta": -0.1}}, r"'kl\.beta' should be float, not -0\.1"),
        ({"kl": {"target": 0}}, r"'kl\.target' should be"),
        ({"kl": {"target": 1, "horizon": 1}}, r"kl\.horizon=1 is too short for \d+ answers a step: .*write kl\.h"),
        (
            {"rollout": {"top_p": 0.9}},
            r"rollout\.top_p=0\.9: answers would be drawn from another distribution than the",
        ),
        ({"rollout": {"top_k": 40}}, r"rollout\.top_k=40: .* biases every ratio and the KL; leave it out"),
        ({"rollout": {"temperature": 0}}, r"'rollout\.temperature' should be"),
        (
            {"adapter": {"dropout": 0.1}},
            r"adapter\.dropout=0\.1: with dropout the policy that is updated is not the one",
        ),
        (
            {"data": {"max_length": 6}},
            r"data\.max_length=6 leaves no room for a prompt .*rollout\.max_tokens=6: write a",
        ),
        ({"reward": {"whiten": True, "url": "http://here"}}, r"unknown key 'reward\.whiten'"),
        (
            {"reward": {"url": "http://here", "function": "reward.py:score"}},
            r"reward\.function and reward\.url are both given: write one of them",
        ),
    ],
)
def test_settings_that_cannot_work(method: str, more: dict[str, Any], message: str, world: Path) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        config(method, world, **more)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("method", METHODS)
def test_a_reward_is_asked_for(method: str) -> None:
    with pytest.raises(ConfigError, match=r"write reward\.path=RUN, reward\.function=FILE\.py:NAME or reward\.url="):
        build(importlib.import_module(f"burnish.recipes.{method}").Config, {})


def test_dropout_on_an_adapter_that_is_there_already_is_refused_too(world: Path) -> None:
    given = config("ppo", world, **{"from": str(world / "sft"), "adapter": {"dropout": 0.2}})
    with pytest.raises(ConfigError, match=r"adapter\.dropout=0\.2: with dropout"):
        open_task(given)


def test_groups_have_at_least_two_answers(world: Path) -> None:
    for method in ("grpo", "rloo"):
        with pytest.raises(ConfigError, match=r"'rollout\.samples' should be int, not 1"):
            config(method, world, rollout={"samples": 1})
    assert config("ppo", world, rollout={"samples": 1}).rollout.samples == 1


# Stages that are not there


def test_a_stage_before_that_is_missing(world: Path, tmp_path: Path) -> None:
    def refused(**more: Any) -> str:
        with pytest.raises(ValueError, match=r"\w") as error:
            open_task(config("ppo", world, **more))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert refused(**{"from": str(tmp_path / "sft")}) == f"from: there is no folder {tmp_path / 'sft'}"
    (tmp_path / "half").mkdir()
    assert refused(**{"from": str(tmp_path / "half")}).endswith(
        "half holds neither a model nor an adapter: name the folder of a finished run"
    )
    assert refused(**{"from": str(tmp_path / "hlf")}).endswith(f"hlf; did you mean {tmp_path / 'half'}?")
    (tmp_path / "half/config.yaml").write_text("run: {}\n")
    assert "is a run that has not finished: resume it first" in refused(**{"from": str(tmp_path / "half")})
    assert "is a reward model, which writes no text" in refused(**{"from": str(world / "reward")})
    assert "reward.path" in refused(reward={"path": str(tmp_path / "nothing")})
    assert "is a run that has not finished" in refused(reward={"path": str(tmp_path / "half")})
    assert "without a head that scores" in refused(reward={"path": str(world / "sft")})
    assert "cannot be read" in refused(reward={"function": str(tmp_path / "reward.py:score")})
    gone = tmp_path / "gone"
    shutil.copytree(world / "sft", gone)
    about = json.loads((gone / "adapter_config.json").read_text())
    (gone / "adapter_config.json").write_text(json.dumps(about | {"base_model_name_or_path": str(tmp_path / "no")}))
    assert str(tmp_path / "no") in refused(**{"from": str(gone)})


def test_all_this_is_said_before_torch_is_loaded(world: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from burnish.cli import main\n"
        f"code = main(['ppo', 'from={tmp_path / 'sft'}', 'reward.url=http://here'])\n"
        "assert 'torch' not in sys.modules\n"
        "raise SystemExit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\n") == 1
    assert "there is no folder" in done.stderr


# Prompts that are too long


def test_prompts_that_leave_no_room_are_dropped_and_counted(world: Path, tmp_path: Path) -> None:
    data = prompts_file(tmp_path / "prompts.jsonl", ("a", "b " * 30, "c d", "e " * 18))
    task = open_task(config("ppo", world, data={"path": str(data)}))
    assert [prompt.messages[0].content.strip() for prompt in task.data.train] == ["a", "c d", ("e " * 18).strip()]
    assert any("leave room for an answer" in line for line in task.data.audit.lines())
    with pytest.raises(ValueError, match=r"more than 18 tokens, which leave no room for an answer, in .*:2"):
        open_task(config("ppo", world, data={"path": str(data), "too_long": "error"}))


def test_a_prompt_and_its_answer_must_fit_the_models_positions(world: Path, tmp_path: Path) -> None:
    data = prompts_file(tmp_path / "prompts.jsonl", ("a b", "c " * 125))
    lengths = {"data": {"path": str(data), "max_length": 200}, "run": {"microbatch_tokens": 200, "step_tokens": 200}}
    with pytest.raises(ValueError, match=r"131 tokens and the model in .* is made for 128: write data\.max_length=128"):
        open_task(config("ppo", world, **lengths))
    lengths["data"]["max_length"] = 128
    assert len(open_task(config("ppo", world, **lengths)).data.train) == 1
    # That longer ones would not fit does not matter where there are none.
    short = prompts_file(tmp_path / "short.jsonl", ("a b", "c"))
    lengths["data"] = {"path": str(short), "max_length": 200}
    assert len(open_task(config("ppo", world, **lengths)).data.train) == 2


def test_without_a_single_prompt_there_is_nothing_to_do(world: Path, tmp_path: Path) -> None:
    data = prompts_file(tmp_path / "prompts.jsonl", ("b " * 30, "c " * 40))
    with pytest.raises(ValueError, match=r"prompt|row") as refused:
        open_task(config("ppo", world, data={"path": str(data)}))
    assert "\n" not in str(refused.value)


# Reward functions that misbehave


def raises(samples: list[dict[str, Any]]) -> list[float]:
    raise RuntimeError("out of order")


def says_nan(samples: list[dict[str, Any]]) -> list[float]:
    return [float("nan") for _ in samples]


def says_nan_at_times(samples: list[dict[str, Any]]) -> list[float]:
    return [float("nan") if sample["answer"].startswith("b") else 1.0 * len(sample["answer"]) for sample in samples]


def too_few(samples: list[dict[str, Any]]) -> list[float]:
    return [1.0 for _ in samples][1:]


def words(samples: list[dict[str, Any]]) -> list[str]:
    return ["good" for _ in samples]


def one_number(samples: list[dict[str, Any]]) -> float:
    return 1.0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "raises",
            r"scored none of the 12 answers of this step: .*raises raised RuntimeError at .*py:\d+: out of order",
        ),
        ("says_nan", r"scored none of the 12 answers of this step: .*says_nan gave the score nan"),
        ("too_few", r"too_few gave 11 scores for 12 samples: it must give one for each"),
        ("words", r"words gave a score that is no number: 'good' is no number"),
        ("one_number", r"one_number gave a float: it must give a list of 12 numbers"),
    ],
)
def test_a_reward_function_that_is_wrong_stops_the_run(name: str, message: str, world: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as stopped:
        train("rloo", world, tmp_path / "run", reward={"function": f"{HERE}:{name}"})
    assert "\n" not in str(stopped.value)
    assert not list((tmp_path / "run/checkpoints").glob("*"))


@pytest.mark.parametrize("method", METHODS)
def test_a_reward_that_is_no_number_at_times_is_left_out(
    method: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(method, world, tmp_path / "run", reward={"function": f"{HERE}:says_nan_at_times"})
    assert 0 < lines(run)[0]["failed"] < 12
    assert all(abs(line[name]) < 1e3 for line in lines(run) for name in ("loss", "grad_norm", "reward"))
    said = capsys.readouterr()
    told = re.findall(r"says_nan_at_times gave the score nan; \d+ of 12 answers are left out of this step", said.err)
    assert len(told) == 1
    assert said.out.count("failed is") == 1


def test_the_command_line_says_it_in_one_line(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["rloo", f"model.path={world / 'base'}", f"data.path={world / 'prompts.jsonl'}", "data.max_length=24"]
    given += ["rollout.prompts=4", "rollout.samples=3", "rollout.max_tokens=6", "evaluate.fraction=0", "run.device=cpu"]
    given += [f"reward.function={HERE}:too_few", f"run.folder={tmp_path / 'run'}", "save.trackers=[]"]
    assert main(given) == 1
    assert "too_few gave 11 scores for 12 samples" in capsys.readouterr().err.splitlines()[-1]


def test_minibatches_that_are_asked_for_fit_the_prompts_of_a_step() -> None:
    asked: dict[str, Any] = {"reward": {"function": "a.py:b"}, "rollout": {"prompts": 2}}
    assert build(ppo.Config, asked).minibatches == 4  # nobody asked: a step has as many as it can
    with pytest.raises(ConfigError, match=r"minibatches=3 is more than the rollout\.prompts=2"):
        build(ppo.Config, asked | {"minibatches": 3})
