"""The verdict on a model: what it holds, and when."""

from collections.abc import Sequence

import pytest
import torch

from burnish.data.templates import ChatTemplate
from burnish.data.tokenizer import Tokenizer
from burnish.engine.roles import Role
from burnish.evaluate.judge import NUM_SAMPLES, Judge
from burnish.evaluate.tasks import answer_prompts
from burnish.model.checkpoint import load_model
from burnish.settings import EvaluateSettings
from burnish.types import Message, Prompt, Rollout
from tests.tiny import tiny_folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory):
    folder = tiny_folder(tmp_path_factory.mktemp("judge") / "model")
    tokenizer = Tokenizer.load(folder)
    model = load_model(folder, "fp32", torch.device("cpu"), torch.float32)
    return model, tokenizer, ChatTemplate.open("auto", tokenizer)


def prompts(count: int, answer: str | None = None, task: str | None = None) -> list[Prompt]:
    return [Prompt((Message("user", f"say {i}"),), answer, task) for i in range(count)]


def judge(parts, asked: Sequence[Prompt]) -> Judge:
    model, *text = parts
    return Judge(model, None, *text, [], asked, EvaluateSettings(max_tokens=5), (128, 128))


def test_only_prompts_with_a_reference_are_graded(parts) -> None:
    model, tokenizer, template = parts
    (own,) = answer_prompts(model, tokenizer, template, prompts(1), None, 5)
    assert own.correct is None
    right, wrong = prompts(1, answer=own.text, task="t"), prompts(1, answer="x", task="t")
    found = judge(parts, [*right, *wrong, *prompts(3)]).verdict()
    assert found["metrics"] == {"eval_exact_match": 0.5}
    assert found["by_task"] == {"t": 0.5}
    assert [sample["correct"] for sample in found["samples"]] == [True, False, None, None, None]
    assert judge(parts, prompts(2)).verdict()["metrics"] == {}
    assert judge(parts, []).verdict() == {"metrics": {}, "samples": []}


def test_samples_are_few_and_spread(parts) -> None:
    samples = judge(parts, prompts(100)).verdict()["samples"]
    assert len(samples) == NUM_SAMPLES
    assert [sample["prompt"] for sample in samples[:3]] == ["say 0", "say 4", "say 8"]


def test_an_answer_ends_at_the_limit_or_with_its_end_token_and_never_beyond_the_positions(parts) -> None:
    model, tokenizer, template = parts
    long = Prompt((Message("user", "word " * 200),))
    answers = answer_prompts(model, tokenizer, template, [*prompts(20), long], None, 5)
    assert answers[-1].text == ""
    assert answers[-1].rollout.answer_ids == ()
    for answer in answers[:-1]:
        assert len(answer.rollout.answer_ids) == 5 or answer.rollout.ended
        assert answer.rollout.ended == (answer.rollout.answer_ids[-1] in tokenizer.end_ids)


def test_against_a_reference_the_verdict_says_who_scored_and_what(parts) -> None:
    def scorer(rollouts: Sequence[Rollout]) -> list[float | None]:
        return [float(i) for i, _ in enumerate(rollouts)]

    found = judge(parts, prompts(3)).against(Role(parts[0], None), scorer, "a rule").verdict()
    assert found["scorer"] == "a rule"
    assert found["metrics"].keys() == {"eval_kl", "eval_answer_tokens", "eval_reward", "eval_win_rate"}
    assert (found["metrics"]["eval_reward"], found["metrics"]["eval_win_rate"]) == (1.0, 0.5)
    assert [sample["reward"] for sample in found["samples"]] == [0.0, 1.0, 2.0]


def test_a_continued_run_is_told_what_there_is_to_win_against(parts) -> None:
    def scorer(rollouts: Sequence[Rollout]) -> list[float | None]:
        return [1.0 for _ in rollouts]

    asked = judge(parts, prompts(2)).against(None, scorer, "a rule")
    assert asked.verdict({"scores": [0.0, 1.0]})["metrics"]["eval_win_rate"] == 0.75
    assert "scorer" not in judge(parts, prompts(2)).against(None).verdict()
