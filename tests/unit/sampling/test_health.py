"""Vital signs against numbers worked out by hand, and warnings: once each, with their cause."""

import dataclasses

import pytest
import torch

from burnish.data.packing import collate
from burnish.engine.mesh import Mesh
from burnish.sampling.health import BANDS, SETTLED, Health, line, vital_signs
from burnish.types import Batch, Message, Prompt, Rollout, RolloutBatch, Sequence

MESH = Mesh(torch.device("cpu"))
PROMPT = Prompt((Message("user", "why?"),))
COLUMNS = ("old_log_probs", "reference_log_probs", "old_values", "advantages", "returns", "value_weights")


def rollout(length: int, score: float | None, ended: bool = True) -> Rollout:
    return Rollout(PROMPT, (1, 2), tuple(range(length)), "", ended, 0, score)


def rollout_batch(rollouts: list[Rollout], **columns: list[float]) -> RolloutBatch:
    """Columns are given at the answers' tokens; elsewhere stands something that nobody may read."""
    weights = [(0.0,) * 2 + (0.0 if r.score is None else 1.0,) * len(r.answer_ids) for r in rollouts]
    batch = collate([Sequence((1, 2, *r.answer_ids), w, 0) for r, w in zip(rollouts, weights, strict=True)])
    filled = dict.fromkeys(COLUMNS, torch.full_like(batch.weights, float("nan")))
    for name, values in columns.items():
        filled[name] = filled[name].index_put((batch.scored,), torch.tensor(values))
    nothing = torch.zeros(len(rollouts))
    known = {field.name: getattr(batch, field.name) for field in dataclasses.fields(Batch)}
    return RolloutBatch(**known, scores=nothing, groups=nothing.long(), ended=nothing.bool(), **filled)


def test_vital_signs_of_a_step_by_hand() -> None:
    rollouts = [rollout(2, 1.0), rollout(1, 4.0, ended=False), rollout(3, None), rollout(3, 4.0)]
    first, second = rollouts[:2], rollouts[2:]
    batches = [
        rollout_batch(
            first,
            old_log_probs=[-1.0, -2.0, -3.0],
            reference_log_probs=[-1.5, -1.0, -3.0],
            old_values=[1.0, 2.0, 0.0],
            returns=[2.0, 2.0, 1.0],
        ),
        rollout_batch(
            second,
            old_log_probs=[-1.0, -1.0, -4.0],
            reference_log_probs=[-2.0, -3.0, -4.0],
            old_values=[0.0, 0.0, 0.0],
            returns=[3.0, 1.0, 3.0],
        ),
    ]
    signs = vital_signs(rollouts, batches, MESH)
    # Lengths 2, 1, 3 and scores 1, 4, 4: means 2 and 3, variances 2/3 and 2, covariance (0 - 1 + 1) / 3.
    assert signs == pytest.approx(
        {
            "reward": 3.0,
            "reward_std": 2**0.5,
            "answer_tokens": 2.0,
            "reward_length_correlation": 0.0,
            "eos_rate": 0.75,
            "kl": (0.5 - 1.0 + 0.0 + 1.0 + 2.0 + 0.0) / 3,
            "entropy": (1 + 2 + 3 + 1 + 1 + 4) / 6,
            # Errors 1, 0, 1, 3, 1, 3 about 1.5; returns 2, 2, 1, 3, 1, 3 about 2.
            "explained_variance": 1 - (21 / 6 - 1.5**2) / (28 / 6 - 4),
        }
    )


def test_rewards_that_grow_with_length_are_correlated_with_it() -> None:
    rollouts = [rollout(length, 0.5 * length - 1) for length in (1, 2, 4)]
    batches = [rollout_batch(rollouts, old_log_probs=[0.0] * 7, reference_log_probs=[0.0] * 7)]
    assert vital_signs(rollouts, batches, MESH)["reward_length_correlation"] == pytest.approx(1)
    falling = [rollout(length, -float(length)) for length in (1, 2, 4)]
    assert vital_signs(falling, batches, MESH)["reward_length_correlation"] == pytest.approx(-1)


def test_without_values_or_spread_nothing_is_said_of_them() -> None:
    rollouts = [rollout(2, 1.0), rollout(2, 1.0)]
    zeros = dict.fromkeys(("old_log_probs", "reference_log_probs", "old_values", "returns"), [0.0] * 4)
    signs = vital_signs(rollouts, [rollout_batch(rollouts, **zeros)], MESH)
    assert "explained_variance" not in signs
    assert (signs["reward_std"], signs["reward_length_correlation"]) == (0, 0)
    same = zeros | {"old_values": [1.0] * 4, "returns": [2.0] * 4}
    assert "explained_variance" not in vital_signs(rollouts, [rollout_batch(rollouts, **same)], MESH)


UNWELL = {
    "kl": (-0.6, 31.0),
    "clip_fraction": (None, 0.4),
    "eos_rate": (0.4, None),
    "entropy": (0.001, None),
    "explained_variance": (-0.6, None),
    "reward_length_correlation": (None, 0.9),
    "reward_std": (0.0, None),
    "failed": (None, 1.0),
}
CAUSES = {
    ("kl", 0): "the reference or the temperature differs",
    ("kl", 1): "raise kl.beta, set kl.target, or lower optim.lr",
    ("clip_fraction", 1): "lower optim.lr, or write fewer epochs",
    ("eos_rate", 0): "run into rollout.max_tokens",
    ("entropy", 0): "always answers the same: raise kl.beta",
    ("explained_variance", 0): "raise value.lr, or value.warmup",
    ("reward_length_correlation", 1): "the reward pays for length",
    ("reward_std", 0): "nothing to learn from",
    ("failed", 1): "see what the reward source said",
}
WELL = {
    "kl": 2.0,
    "clip_fraction": 0.1,
    "eos_rate": 0.95,
    "entropy": 1.5,
    "explained_variance": 0.4,
    "reward_length_correlation": -0.3,
    "reward_std": 0.7,
    "failed": 0.0,
    "loss": 99.0,
}


@pytest.mark.parametrize(("name", "side"), CAUSES)
def test_what_leaves_its_band_is_told_once_with_its_cause(name: str, side: int) -> None:
    value = UNWELL[name][side]
    assert value is not None
    health = Health()
    (told,) = health.warnings(WELL | {name: value}, step=SETTLED)
    assert told.startswith(f"step {SETTLED + 1}: {name} is {value:.3g}: ")
    assert CAUSES[name, side] in told
    assert health.warnings(WELL | {name: value}, step=SETTLED + 1) == []
    # Another number that leaves its own band later is told all the same.
    other = "kl" if name != "kl" else "entropy"
    (later,) = health.warnings(WELL | {name: value, other: UNWELL[other][0]}, step=SETTLED + 2)
    assert f"{other} is" in later


def test_every_band_is_tried_here() -> None:
    assert BANDS.keys() == UNWELL.keys()
    for name, band in BANDS.items():
        assert {side for side, cause in enumerate((band.below, band.above)) if cause} == {
            side for known, side in CAUSES if known == name
        }


def test_the_first_steps_tell_only_of_answers_without_a_score() -> None:
    unwell = {name: next(value for value in values if value is not None) for name, values in UNWELL.items()}
    health = Health()
    for step in range(SETTLED):
        told = health.warnings(unwell, step)
        assert [text.split()[2] for text in told] == (["failed"] if step == 0 else [])
    assert len(health.warnings(unwell, SETTLED)) == len(BANDS) - 1
    assert Health().warnings(WELL, SETTLED) == []
    assert Health().warnings({}, SETTLED) == []


def test_the_line_says_what_there_is() -> None:
    metrics = {"reward": 0.25, "kl": 1.234, "clip_fraction": 0.051, "eos_rate": 0.5, "answer_tokens": 12.4}
    assert line(metrics) == "reward +0.250, KL 1.23, clipped 5.1%, ended 50%, 12 tokens"
    assert line({"reward": -1.0, "explained_variance": 0.3, "entropy": 2.0}) == (
        "reward -1.000, explained 30%, entropy 2.00"
    )
