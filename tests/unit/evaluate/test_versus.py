"""A policy against its reference on held-out prompts: rewards, wins, and the divergence between the two."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish import world
from burnish.data.chat import prompt_ids
from burnish.data.packing import collate
from burnish.data.templates import ChatTemplate
from burnish.data.tokenizer import Tokenizer
from burnish.engine.roles import Role
from burnish.evaluate import versus
from burnish.evaluate.tasks import write_answers
from burnish.evaluate.versus import Versus, gold, has_gold, win_rate
from burnish.model.adapters import AdapterSpec, adapter_parameters, add_adapter, copy_adapter
from burnish.model.checkpoint import load_model
from burnish.model.decoder import Decoder
from burnish.types import Message, Prompt, Rollout
from burnish.types import Sequence as TokenSequence
from tests.tiny import tiny_folder

PROMPTS = [
    Prompt((Message("user", f"{words} ?"),)) for words in ("a cat", "3 plus 4", "once upon a time", "b", "red sea")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("versus") / "model")


@pytest.fixture
def model(folder: Path) -> Decoder:
    """A base with a reference adapter, and a policy that is a copy of it."""
    decoder = load_model(folder, "fp32", torch.device("cpu"), torch.float32)
    add_adapter(decoder, "reference", AdapterSpec(kind="lora", rank=4, alpha=8.0), torch.Generator().manual_seed(1))
    move(decoder, "reference", 0.3)
    copy_adapter(decoder, "reference", "policy")
    return decoder


def move(decoder: Decoder, adapter: str, size: float, seed: int = 2) -> None:
    """Train, so to speak: add noise to an adapter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(decoder, adapter).values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


class Counting:
    """Scores answers by their length, and counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        self.asked += 1
        return [float(len(rollout.answer)) for rollout in rollouts]


def against(
    model: Decoder, scorer: Any, folder: Path, max_tokens: int = 6, microbatch: int = 512, **roles: str
) -> Versus:
    policy, reference = (Role(model, roles.get(name, name), temperature=0.5) for name in ("policy", "reference"))
    tokenizer = Tokenizer.load(folder)
    template = ChatTemplate.open("auto", tokenizer)
    return Versus(policy, reference, scorer, tokenizer, template, max_tokens, microbatch)


def divergence(judge: Versus, prompts: Sequence[Prompt]) -> tuple[float, bool]:
    assert judge.reference is not None
    return judge.divergence(prompts, judge.reference)


def greedy(judge: Versus, adapter: str = "policy") -> list[Rollout]:
    text = (judge.tokenizer, judge.template)
    return write_answers(judge.policy.model, *text, PROMPTS, adapter, judge.max_tokens)


def test_a_policy_that_is_its_reference_diverges_by_nothing_and_ties(model: Decoder, folder: Path) -> None:
    judge = against(model, scorer := Counting(), folder)
    metrics, scores = judge.measure(answers := greedy(judge))
    assert metrics["eval_kl"] == 0
    assert metrics["eval_win_rate"] == 0.5
    assert metrics["eval_reward"] == sum(len(a.answer) for a in answers) / len(answers) == sum(scores) / len(scores)
    assert metrics["eval_answer_tokens"] == sum(len(a.answer_ids) for a in answers) / len(answers)
    assert scorer.asked == 1


def test_the_references_answers_are_written_once_and_are_its_own(model: Decoder, folder: Path) -> None:
    judge = against(model, scorer := Counting(), folder)
    judge.measure(greedy(judge))
    move(model, "policy", 0.5)
    before, _ = judge.measure(greedy(judge))
    assert scorer.asked == 2
    resumed = against(model, other := Counting(), folder)
    assert resumed.measure(greedy(resumed))[0] == before
    assert other.asked == 2
    theirs = [len(answer.answer) for answer in greedy(judge, "reference")]
    ours = [len(answer.answer) for answer in greedy(judge)]
    assert ours != theirs
    assert before["eval_win_rate"] == sum((a > b) + (a == b) / 2 for a, b in zip(ours, theirs)) / len(PROMPTS)  # noqa: B905


def test_without_a_reference_wins_are_against_the_first_time(model: Decoder, folder: Path) -> None:
    judge = against(model, Counting(), folder)
    judge.reference = None
    first, start = judge.measure(greedy(judge))
    assert first.keys() == {"eval_answer_tokens", "eval_reward", "eval_win_rate"}
    move(model, "policy", 0.5)
    now, scores = judge.measure(greedy(judge))
    assert now["eval_win_rate"] == win_rate(scores, start) != 0.5
    judge.scorer = None
    assert judge.measure(greedy(judge))[0].keys() == {"eval_answer_tokens"}


def test_the_divergence_of_one_token_is_that_of_the_two_distributions(
    model: Decoder, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    move(model, "policy", 0.15)
    judge = against(model, Counting(), folder, max_tokens=1)
    ids = prompt_ids(PROMPTS[0].messages, judge.tokenizer, judge.template)
    batch = collate([TokenSequence(tuple(ids), (0.0,) * len(ids), row=0)])
    with torch.no_grad():
        log_p, log_q = (
            torch.log_softmax(model.logits(batch, adapter)[-1].double(), -1) for adapter in ("policy", "reference")
        )
    exact = float((log_p.exp() * (log_p - log_q)).sum())
    deviation = math.sqrt(float((log_p.exp() * (log_p - log_q - exact) ** 2).sum()))
    monkeypatch.setattr(versus, "NUM_DRAWN", 3000)
    estimate, moved = divergence(judge, [PROMPTS[0]] * 3000)
    assert moved
    assert exact > 0.05
    assert abs(estimate - exact) < 4 * deviation / math.sqrt(3000)


def test_the_divergence_is_a_sum_over_the_answer_whatever_the_batches(model: Decoder, folder: Path) -> None:
    move(model, "policy", 0.3)
    wide, narrow = (against(model, Counting(), folder, microbatch=tokens) for tokens in (512, 8))
    kl = divergence(wide, PROMPTS)[0]
    assert kl == pytest.approx(divergence(narrow, PROMPTS)[0], rel=1e-5)
    text = (wide.tokenizer, wide.template)
    drawn = write_answers(model, *text, PROMPTS, "policy", 6, temperature=1.0)
    total = 0.0
    for answer in drawn:
        ids = answer.prompt_ids + answer.answer_ids
        batch = collate([TokenSequence(ids, (1.0,) * len(ids), row=0)])
        with torch.no_grad():
            gap = model.log_probs(batch, "policy").double() - model.log_probs(batch, "reference").double()
        total += float(gap[len(answer.prompt_ids) - 1 : -1].sum())
    assert kl == pytest.approx(total / len(drawn), rel=1e-5)


def test_at_most_so_many_prompts_are_drawn_from_evenly(
    model: Decoder, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    move(model, "policy", 0.3)
    judge = against(model, Counting(), folder)
    every_other = divergence(judge, PROMPTS[0:4:2])
    monkeypatch.setattr(versus, "NUM_DRAWN", 2)
    assert divergence(judge, PROMPTS[:4]) == every_other


def test_answers_without_a_score_are_left_out_and_counted(model: Decoder, folder: Path) -> None:
    def partly(rollouts: Sequence[Rollout]) -> list[float | None]:
        return [None if i == 0 else float(i) for i, _ in enumerate(rollouts)]

    metrics, scores = (judge := against(model, partly, folder)).measure(greedy(judge))
    assert scores[0] is None
    assert metrics["eval_unscored"] == 1
    assert metrics["eval_reward"] == (1 + 2 + 3 + 4) / 4
    nothing, _ = (judge := against(model, lambda rollouts: [None] * len(rollouts), folder)).measure(greedy(judge))
    assert nothing.keys() == {"eval_kl", "eval_answer_tokens", "eval_unscored"}


@pytest.mark.parametrize(
    ("ours", "theirs", "rate"),
    [
        ([1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 5.0, 5.0], 0.375),
        ([1.0, None], [None, 1.0], None),
        ([2.0, None], [1.0, 1.0], 1.0),
    ],
)
def test_win_rate(ours: list[float | None], theirs: list[float | None], rate: float | None) -> None:
    assert win_rate(ours, theirs) == rate


def test_the_embedded_worlds_own_score_prefers_right_answers() -> None:
    row = world.rows("held_out_seen")[0]
    *turns, last = row["messages"]
    prompt = Prompt(tuple(Message(turn["role"], turn["content"]) for turn in turns), last["content"], row["task"])
    right, wrong = (Rollout(prompt, (1,), (2,), text, True, 0) for text in (last["content"], "no idea at all"))
    good, bad = gold([right, wrong])
    assert good is not None
    assert bad is not None
    assert good > bad
    assert has_gold([prompt])
    assert not has_gold([prompt, Prompt(prompt.messages)])
    assert gold([Rollout(Prompt(prompt.messages), (1,), (2,), "x", True, 0)]) == [None]
