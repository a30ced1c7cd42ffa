"""A step up to its update: what it holds, what it says of the run, and how the divergence's cost follows it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.config import build
from burnish.engine.mesh import Mesh
from burnish.recipes.rloo import Config
from burnish.sampling.cast import open_cast
from burnish.sampling.experience import Minibatches
from burnish.sampling.health import SETTLED
from burnish.sampling.practice import NUM_SAMPLES, Practice
from burnish.sampling.task import open_task
from burnish.types import RolloutBatch
from tests.letters import letters_world, settings

MESH = Mesh(torch.device("cpu"))
UPDATE = {"loss": 0.5, "approx_kl": 0.0, "grad_norm": 1.0, "learning_rate": 0.01, "tokens": 40.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return letters_world(tmp_path_factory.mktemp("letters"))


def brittle(samples: list[dict[str, Any]]) -> list[float | None]:
    return [None if sample["answer"].startswith("b") else float(len(sample["answer"])) for sample in samples]


def practice(world: Path, minibatches: int = 1, **more: Any) -> Practice:
    given = {"reward": {"function": f"{__file__}:brittle"}, **more}
    task = open_task(build(Config, settings(world, world / "never", given)))
    return Practice(task, open_cast(task, MESH), MESH, minibatches)


def observe(batch: RolloutBatch) -> RolloutBatch:
    """A policy that has moved 0.1 nats a token from its reference."""
    written = batch.weights != 0
    return replace(batch, old_log_probs=-2.0 * written, reference_log_probs=-2.1 * written)


def stepped(one: Practice, step: int = 0) -> Minibatches:
    return one.experience(step, observe)


def test_a_step_holds_the_streams_prompts_answered_scored_and_observed(world: Path) -> None:
    one = practice(world, minibatches=2)
    minibatches = stepped(one, 1)
    prompts = [prompt for _, prompt in one.stream.step(1)]
    assert [rollout.prompt for rollout in one.rollouts] == [prompt for prompt in prompts for _ in range(3)]
    assert [rollout.score for rollout in one.rollouts] == brittle([{"answer": r.answer} for r in one.rollouts])
    assert len(minibatches) == 2
    tokens = sum(len(rollout.answer_ids) for rollout in one.rollouts if rollout.score is not None)
    assert sum(float(b.old_log_probs.sum()) for part in minibatches for b in part) == pytest.approx(-2.0 * tokens)
    assert set(one.phases.seconds) == {"rollout", "scoring", "observing"}
    assert one.fingerprint == one.stream.fingerprint


def test_metrics_are_signs_means_and_seconds(world: Path) -> None:
    one = practice(world)
    minibatches = stepped(one)
    failed = sum(rollout.score is None for rollout in one.rollouts)
    scored = [rollout for rollout in one.rollouts if rollout.score is not None]
    assert 0 < failed < 12
    later = {**UPDATE, "loss": 1.5, "approx_kl": 0.2}
    found = one.metrics(0, minibatches, [UPDATE, later], value=[{**UPDATE, "value_error": 3.0}])
    assert (found["loss"], found["approx_kl"], found["tokens"]) == (1.0, 0.1, 80.0)
    assert (found["value_loss"], found["value_error"], found["value_learning_rate"]) == (0.5, 3.0, 0.01)
    assert "value_tokens" not in found
    assert found["failed"] == failed
    tokens = sum(len(rollout.answer_ids) for rollout in scored)
    assert found["kl"] == pytest.approx(0.1 * tokens / len(scored), rel=1e-5)
    assert found["reward"] == pytest.approx(sum(rollout.score or 0 for rollout in scored) / len(scored))
    assert {"rollout_seconds", "scoring_seconds", "observing_seconds"} <= found.keys()


def test_where_only_the_value_model_learns_its_numbers_stand_for_the_run(world: Path) -> None:
    one = practice(world)
    found = one.metrics(0, stepped(one), [], value=[UPDATE])
    assert (found["loss"], found["tokens"]) == (0.5, 40.0)
    assert "learning_rate" not in found


def test_a_first_ratio_that_is_not_1_is_our_mistake(world: Path) -> None:
    one = practice(world)
    with pytest.raises(AssertionError, match="the first ratio is not 1"):
        one.metrics(0, stepped(one), [{**UPDATE, "approx_kl": 1e-9}])


def test_the_cost_of_divergence_follows_it(world: Path) -> None:
    one = practice(world, kl={"beta": 0.2, "target": 0.4, "horizon": 100})
    beta = 0.2
    for step in range(3):
        found = one.metrics(step, stepped(one, step), [UPDATE])
        assert found["beta"] == pytest.approx(beta)  # what this step was made with
        beta *= 1 + min(max(found["kl"] / 0.4 - 1, -0.2), 0.2) * 12 / 100
    assert beta > 0.2
    assert one.states["kl"].state() == {"beta": pytest.approx(beta)}
    assert one.states["reward"].state()["asked"] == 36
    again = practice(world, kl={"beta": 0.2, "target": 0.4, "horizon": 100})
    for name, stateful in again.states.items():
        stateful.restore(one.states[name].state())
    assert again.controller.beta == one.controller.beta
    fixed = practice(world)
    fixed.metrics(0, stepped(fixed), [UPDATE])
    assert fixed.controller.beta == 0.05


def test_the_health_line_and_its_warnings(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = practice(world)
    for step in (0, SETTLED, SETTLED + 1):
        one.metrics(step, stepped(one, step), [{**UPDATE, "clip_fraction": 0.9}])
    said = capsys.readouterr().out.splitlines()
    assert [text.split(":")[0] for text in said if text.startswith("step")] == ["step 1", "step 6", "step 7"]
    warnings = [text for text in said if text.startswith("warning: ")]
    assert sum("failed" in text for text in warnings) == 1
    (clipped,) = (text for text in warnings if "clip_fraction" in text)
    assert clipped.startswith("warning: step 6: clip_fraction is 0.9: updates are too large: lower optim.lr")


def test_a_rule_that_leaves_answers_out_is_no_failure(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = practice(
        world, reward={"function": f"{Path(__file__).parents[2] / 'letters.py'}:vowels", "missing_eos": "mask"}
    )
    found = one.metrics(0, stepped(one), [UPDATE])
    assert (
        sum(rollout.score is None for rollout in one.rollouts) == sum(not rollout.ended for rollout in one.rollouts) > 0
    )
    assert found["failed"] == 0
    assert "warning" not in capsys.readouterr().out


def test_some_answers_are_kept_for_people(world: Path) -> None:
    one = practice(world)
    stepped(one)
    shown = one.samples()
    assert len(shown) == NUM_SAMPLES
    first = one.rollouts[0]
    assert shown[0] == {
        "prompt": first.prompt.messages[0].content,
        "answer": first.answer,
        "score": first.score,
        "ended": first.ended,
        "tokens": len(first.answer_ids),
    }
