"""From answers to micro-batches: what an answer is, who shares a minibatch, what is compared with what."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.data.templates import ChatTemplate
from burnish.data.tokenizer import Tokenizer
from burnish.engine.mesh import Mesh
from burnish.engine.roles import Role
from burnish.losses.advantage import leave_one_out
from burnish.model.checkpoint import load_model
from burnish.sampling.experience import (
    Actor,
    Minibatches,
    Phases,
    arrange,
    averaged,
    compared,
    num_answers,
    num_tokens,
    num_values,
    passes,
    whitened,
    worth_of,
)
from burnish.sampling.sampler import Sampler
from burnish.settings import RolloutSettings
from burnish.types import Message, Prompt, Rollout, RolloutBatch
from tests.letters import END, letters_folder

MESH = Mesh(torch.device("cpu"))


class Ranks:
    """One of two ranks that never waits: `others` is what the other one brings to each collection."""

    device, world, is_main = torch.device("cpu"), 2, True

    def __init__(self, rank: int, other: Any) -> None:
        self.rank, self.other = rank, other

    def collect(self, value: Any) -> list[Any]:
        return [value, self.other]

    def any(self, flag: bool) -> bool:
        return True


def asked(text: str) -> Prompt:
    return Prompt((Message("user", text),))


# Answers


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return letters_folder(tmp_path_factory.mktemp("letters") / "base")


@pytest.fixture(scope="module")
def policy(base: Path) -> Role:
    return Role(load_model(base, "bf16").eval(), None, temperature=1.3)


def actor(base: Path, policy: Role, mesh: Any = MESH, seed: int = 0, **settings: Any) -> Actor:
    tokenizer = Tokenizer.load(base)
    given = RolloutSettings(**{"max_tokens": 6, "samples": 3, "temperature": 1.3, "slots": 4, **settings})
    return Actor(policy, tokenizer, ChatTemplate.open("auto", tokenizer), given, seed, mesh)


PROMPTS = [asked(text) for text in ("a", "b c", "d e f", "g")]


def test_answers_to_a_prompt_stand_side_by_side(base: Path, policy: Role) -> None:
    found = actor(base, policy).answer(PROMPTS, step=0)
    assert [(rollout.prompt, rollout.group) for rollout in found] == [(PROMPTS[i // 3], i // 3) for i in range(12)]
    assert found[3].prompt_ids == (1, 2)
    for rollout in found:
        assert rollout.ended == (rollout.answer_ids[-1] == END)
        assert END not in rollout.answer_ids[:-1]
        assert len(rollout.answer_ids) == 6 or rollout.ended
        assert rollout.answer == " ".join("abcdefghi"[i] for i in rollout.answer_ids if i != END)
        assert rollout.score is None
    assert {rollout.ended for rollout in found} == {True, False}


def test_what_is_drawn_depends_on_seed_step_prompt_and_sample(base: Path, policy: Role) -> None:
    def answers(seed: int, step: int) -> list[tuple[int, ...]]:
        return [rollout.answer_ids for rollout in actor(base, policy, seed=seed).answer(PROMPTS, step)]

    found = answers(0, 0)
    assert found == answers(0, 0)
    assert found != answers(0, 1) != answers(1, 0)
    assert len(set(found)) > 9
    same = actor(base, policy).answer([PROMPTS[0], PROMPTS[0]], 0)
    assert len({rollout.answer_ids for rollout in same}) > 4


def test_ranks_that_deal_the_prompts_draw_what_one_draws(base: Path, policy: Role) -> None:
    whole = actor(base, policy).answer(PROMPTS, step=2)
    for rank in (0, 1):
        mesh = Ranks(rank, 0)
        mine = actor(base, policy, mesh)
        mine.sampler = Sampler(policy.model, 4)
        found = mine.answer(PROMPTS[rank::2], step=2)
        assert found == [rollout for rollout in whole if rollout.group % 2 == rank]


def test_text_ends_before_a_stop_string(base: Path, policy: Role) -> None:
    found = actor(base, policy, stop=("a", "h i")).answer(PROMPTS, step=0)
    free = actor(base, policy).answer(PROMPTS, step=0)
    stopped = [(rollout, before) for rollout, before in zip(found, free, strict=True) if "a" in before.answer]
    assert stopped
    for rollout, before in stopped:
        assert rollout.ended
        if rollout.answer_ids[-1] == 0:  # `a`
            count = len(rollout.answer_ids)
            assert rollout.answer_ids == before.answer_ids[:count]
            assert rollout.answer == " ".join("abcdefghi"[i] for i in rollout.answer_ids[:-1])


def test_answers_that_are_all_cut_stop_the_run(base: Path, policy: Role) -> None:
    with pytest.raises(ValueError, match=r"all answers of step 4 were cut at rollout\.max_tokens=1: write a larger"):
        actor(base, policy, max_tokens=1).answer(PROMPTS[:1], step=3)


@pytest.mark.parametrize(
    ("slots", "at_once", "named"),
    [(4, "4 answers", "rollout.slots=2, "), (99, "12 answers", "rollout.slots=6, "), (1, "1 answer", "")],
)
def test_memory_that_runs_out_meanwhile_is_told_with_the_settings_that_it_depends_on(
    base: Path, policy: Role, monkeypatch: pytest.MonkeyPatch, slots: int, at_once: str, named: str
) -> None:
    def short(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(type(policy.model), "decode", short)
    with pytest.raises(MemoryError) as told:
        actor(base, policy, slots=slots).answer(PROMPTS, step=1)
    assert str(told.value) == (
        f"out of memory at step 2, while answers were written: {at_once} at once, of up to 9 tokens with the prompt. "
        f"Any of these needs less: {named}a data.max_length below 9, with rollout.max_tokens; with other settings it "
        "starts anew, with another run.folder"
    )


def test_a_model_that_cannot_end_is_not_blamed_for_it(base: Path, policy: Role) -> None:
    endless = actor(base, policy, max_tokens=1)
    endless.sampling = replace(endless.sampling, end_ids=())
    assert [rollout.ended for rollout in endless.answer(PROMPTS[:1], step=0)] == [False] * 3


# Minibatches


def rollouts(groups: int, samples: int = 3, seed: int = 0) -> list[Rollout]:
    draw = random.Random(seed)
    return [
        Rollout(
            asked(str(group)),
            (group,) * (2 + group % 3),
            tuple(draw.randrange(9) for _ in range(draw.randrange(1, 6))),
            "",
            draw.random() < 0.5,
            group,
            draw.gauss(0, 1),
        )
        for group in range(groups)
        for _ in range(samples)
    ]


def content(minibatch: list[RolloutBatch]) -> list[tuple[int, list[int], float, bool]]:
    """The answers of a minibatch, in the order of their groups: group, answer's tokens, score, whether it ended."""
    found = []
    for batch in minibatch:
        for s in range(batch.num_sequences):
            mine = (batch.sequence == s) & (batch.weights != 0)
            answer = batch.targets[mine].tolist()
            found.append((int(batch.groups[s]), answer, float(batch.scores[s]), bool(batch.ended[s])))
    return sorted(found)


@pytest.mark.parametrize("budget", [12, 30, 500])
@pytest.mark.parametrize("minibatches", [1, 2, 3, 5])
def test_every_answer_is_in_one_minibatch_whole_and_with_its_own(budget: int, minibatches: int) -> None:
    given = rollouts(7)
    found = arrange(given, minibatches, budget, MESH)
    parts = [content(minibatch) for minibatch in found]
    expected = [(r.group, list(r.answer_ids), pytest.approx(r.score), r.ended) for r in given]
    assert sorted(entry for part in parts for entry in part) == sorted(expected, key=lambda entry: entry[:2])
    groups = [{group for group, *_ in part} for part in parts]
    assert len(found) == minibatches
    assert sum(map(len, groups)) == 7  # no prompt is in two of them
    assert max(map(len, groups)) - min(map(len, groups)) <= 1
    for minibatch in found:
        for batch in minibatch:
            assert len(batch.tokens) <= budget
            assert batch.total_weight == float(batch.weights.sum()) == len(batch.scored)
            for name in ("old_log_probs", "reference_log_probs", "old_values", "advantages", "returns"):
                assert not getattr(batch, name).any()


def test_a_prompt_is_in_a_micro_batch_once() -> None:
    (whole,), (small,) = (arrange(rollouts(4), 1, budget, MESH) for budget in (500, 12))
    assert len(whole) == 1
    assert len(small) > 4
    answers = sum(len(r.answer_ids) for r in rollouts(4))
    # The last token of the prompt stays each answer's own: what it predicts differs.
    assert len(whole[0].tokens) == answers + sum((2 + group % 3) - 1 + 3 for group in range(4))
    assert len([length for _, length in whole[0].prefixes if length]) == 8
    assert content(whole) == content(small)


def test_prompts_share_a_minibatch_on_however_many_ranks() -> None:
    """Each rank has every second prompt; together they make the minibatches that one rank makes."""
    given = rollouts(9, samples=2)
    whole = [content(minibatch) for minibatch in arrange(given, 3, 40, MESH)]
    ranks = []
    for rank in (0, 1):
        mine = [rollout for rollout in given if rollout.group % 2 == rank]
        last = max(rollout.group for rollout in given if rollout.group % 2 != rank)
        ranks.append([content(minibatch) for minibatch in arrange(mine, 3, 40, Ranks(rank, last))])
    for expected, *parts in zip(whole, *ranks, strict=True):
        answers = sorted(entry for part in parts for entry in part if entry[0] >= 0)
        assert answers == expected


def test_a_rank_with_fewer_micro_batches_computes_some_that_count_for_nothing() -> None:
    (minibatch,) = arrange(rollouts(2), 1, 500, Ranks(0, 3))
    assert len(minibatch) == 3
    for idle in minibatch[1:]:
        assert idle.total_weight == 0
        assert idle.scores.isnan().all()
        assert num_answers(idle) == num_tokens(idle) == num_values(idle) == 0


def test_answers_without_a_score_weigh_nothing() -> None:
    given = [replace(r, score=None) if i % 3 == 0 else r for i, r in enumerate(rollouts(4))]
    (minibatch,) = arrange(given, 1, 40, MESH)
    scored = [rollout for rollout in given if rollout.score is not None]
    assert sum(map(num_tokens, minibatch)) == sum(len(rollout.answer_ids) for rollout in scored)
    assert sum(map(num_answers, minibatch)) == len(scored)
    assert sorted(len(answer) for _, answer, *_ in content(minibatch))[:4] == [0] * 4
    nothing = [replace(rollout, score=None) for rollout in rollouts(4)]
    half = nothing[:6] + rollouts(4)[6:]
    assert len(arrange(half, 2, 40, MESH)) == 1  # a minibatch of which nothing counts is left out
    with pytest.raises(ValueError, match=r"no answer of this step counts: reward\.missing_eos=mask"):
        arrange(nothing, 2, 40, MESH)


def test_more_minibatches_than_prompts_are_as_many_as_prompts() -> None:
    assert len(arrange(rollouts(3), 8, 40, MESH)) == 3


# What the update needs


def filled(minibatches: Minibatches, seed: int = 0) -> Minibatches:
    """With log-probs and advantages everywhere, also where nobody may look."""
    generator = torch.Generator().manual_seed(seed)

    def draw(batch: RolloutBatch) -> torch.Tensor:
        return torch.randn(batch.weights.shape, generator=generator)

    names = ("old_log_probs", "reference_log_probs", "advantages")
    return [[replace(batch, **{name: draw(batch) for name in names}) for batch in part] for part in minibatches]


def test_the_worth_of_an_answer_is_its_score_less_its_divergence() -> None:
    (batch,) = filled(arrange(rollouts(3), 1, 500, MESH))[0]
    for estimator, k in {"k1": lambda d: d, "k2": lambda d: d**2 / 2, "k3": lambda d: (-d).exp() - 1 + d}.items():
        found = worth_of(batch, 0.3, estimator)
        for s in range(batch.num_sequences):
            mine = (batch.sequence == s) & (batch.weights != 0)
            gap = (batch.old_log_probs - batch.reference_log_probs)[mine].double()
            assert float(found[s]) == pytest.approx(float(batch.scores[s] - 0.3 * k(gap).sum()), abs=1e-5)


@pytest.mark.parametrize("budget", [12, 500])
def test_answers_are_compared_over_the_whole_step(budget: int) -> None:
    given = [replace(r, score=None) if i in (1, 5) else r for i, r in enumerate(rollouts(5))]
    found = compared(arrange(given, 2, budget, MESH), lambda batch: batch.scores, leave_one_out)
    seen = 0
    for minibatch in found:
        for batch in minibatch:
            for s in range(batch.num_sequences):
                mine = (batch.sequence == s) & (batch.weights != 0)
                others = [r.score for r in given if r.group == batch.groups[s] and r.score is not None]
                if batch.scores[s].isnan():
                    assert not mine.any()
                    continue
                own = float(batch.scores[s])
                expected = own - (sum(others) - own) / (len(others) - 1)
                assert batch.advantages[mine].tolist() == pytest.approx([expected] * int(mine.sum()), abs=1e-5)
                seen += 1
            assert not batch.advantages[batch.weights == 0].any()
    assert seen == 13


def test_whitening_is_over_all_tokens_of_the_step() -> None:
    given = filled(arrange(rollouts(6), 3, 20, MESH))
    before = torch.cat([b.advantages[b.weights != 0] for m in given for b in m]).double()
    found = whitened(given, MESH)
    after = torch.cat([b.advantages[b.weights != 0] for m in found for b in m]).double()
    expected = (before - before.mean()) / before.std(unbiased=False)
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-6)
    assert not any(b.advantages[b.weights == 0].any() for m in found for b in m)


def test_passes_go_in_order_first_and_then_in_another_each_time() -> None:
    given = [[k] for k in range(20)]
    found = [part[0] for part in passes(given, 3, (0, 1))]  # type: ignore[arg-type]
    assert found[:20] == list(range(20))
    assert sorted(found[20:40]) == sorted(found[40:]) == list(range(20))
    assert len({tuple(found[k : k + 20]) for k in (0, 20, 40)}) == 3
    assert [part[0] for part in passes(given, 3, (0, 1))] == found  # type: ignore[arg-type]
    assert [part[0] for part in passes(given, 3, (0, 2))] != found  # type: ignore[arg-type]


def test_metrics_of_several_updates() -> None:
    updates = [
        {"loss": 1.0, "value_error": 3.0, "learning_rate": 0.2, "tokens": 10.0},
        {"loss": 2.0, "value_error": 1.0, "learning_rate": 0.1, "tokens": 30.0},
    ]
    assert averaged(updates) == {"loss": 1.5, "value_error": 2.0, "learning_rate": 0.1, "tokens": 40.0}
    named = {"value_loss": 1.5, "value_error": 2.0, "value_learning_rate": 0.1, "value_tokens": 40.0}
    assert averaged(updates, "value_") == named
    assert averaged([]) == {}


def test_seconds_add_up_by_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 3.0, 10.0, 10.5, 20.0, 24.0])
    monkeypatch.setattr("burnish.sampling.experience.time.perf_counter", lambda: next(times))
    phases = Phases(torch.device("cpu"))
    for name in ("rollout", "update", "rollout"):
        with phases(name):
            pass
    assert phases.seconds == {"rollout": 6.0, "update": 0.5}
