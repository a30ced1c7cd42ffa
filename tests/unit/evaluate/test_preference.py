"""What is said of a reward model, against plain loops over pairs."""

import math
import random

import numpy
import pytest

from burnish.data.comparisons import Comparisons
from burnish.evaluate.preference import calibration_error, doubts, ranking_metrics
from burnish.types import Comparison, Sequence


def sequence(answer: int, prompt: int = 3) -> Sequence:
    """A sequence whose answer has so many tokens."""
    return Sequence(tuple(range(3, 3 + prompt + answer)), (0.0,) * prompt + (1.0,) * answer, row=0)


PAIR = Comparison((sequence(4), sequence(2)), ((0, 1, 0.5),))
RANKED = Comparison((sequence(2), sequence(5), sequence(5)), ((2, 0, 0.0), (2, 1, 1.0), (0, 1, 0.0)))
TIE = Comparison((sequence(3), sequence(3)), ((1, 0, 0.0),))
SCORES = [1.0, -0.5, 0.2, -1.0, 2.0, 0.7, 0.7]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_metrics_are_weighted_means_over_pairs() -> None:
    found = ranking_metrics(SCORES, Comparisons.of([PAIR, RANKED, TIE]))
    pairs = [(1.5, 0.5, 1.0), (1.8, 0.0, 1 / 3), (3.0, 1.0, 1 / 3), (1.2, 0.0, 1 / 3), (0.0, 0.0, 1.0)]
    loss = sum(-w * math.log(sigmoid(d - m)) for d, m, w in pairs) / 3
    assert found["loss"] == pytest.approx(loss, rel=1e-6)
    assert found["log_loss"] == pytest.approx(sum(-w * math.log(sigmoid(d)) for d, _, w in pairs) / 3, rel=1e-6)
    assert found["accuracy"] == pytest.approx((1 + 1 + 0.5) / 3)  # a tie is half right
    assert found["margin"] == pytest.approx((1.5 + (1.8 + 3.0 + 1.2) / 3 + 0) / 3)
    assert found["longer_chosen"] == pytest.approx((1 + (1 + 0.5 + 0) / 3 + 0.5) / 3)


def test_swapped_scores_have_the_opposite_of_everything() -> None:
    data = Comparisons.of([PAIR, RANKED])
    found, swapped = (ranking_metrics([sign * score for score in SCORES[:5]], data) for sign in (1, -1))
    assert swapped["accuracy"] == pytest.approx(1 - found["accuracy"])
    assert swapped["margin"] == pytest.approx(-found["margin"])
    assert swapped["length_correlation"] == pytest.approx(-found["length_correlation"])


def test_length_correlation_is_within_comparisons() -> None:
    """Longer prompts' answers may be longer and better all at once; that is no preference for length."""
    draw = random.Random(0)
    units, scores, lengths = [], [], []
    for level in range(40):
        own = [2 + level + draw.randrange(4) for _ in range(2)]
        units.append(Comparison((sequence(own[0]), sequence(own[1])), ((0, 1, 0.0),)))
        noise = [draw.gauss(0, 1) for _ in range(2)]
        scores += [level - 0.5 * n + e for n, e in zip(own, noise, strict=True)]
        lengths += own
    found = ranking_metrics(scores, Comparisons.of(units))["length_correlation"]
    deltas = [(scores[k] - scores[k + 1], lengths[k] - lengths[k + 1]) for k in range(0, 80, 2)]
    around_zero = sum(s * n for s, n in deltas) / math.sqrt(
        sum(s * s for s, _ in deltas) * sum(n * n for _, n in deltas)
    )
    assert found == pytest.approx(around_zero)
    assert found < -0.3 < 0.5 < float(numpy.corrcoef(scores, lengths)[0, 1])
    assert "length_correlation" not in ranking_metrics([0.7, 0.1], Comparisons.of([TIE]))


def test_calibration_is_the_distance_of_confidence_from_accuracy() -> None:
    draw = numpy.random.default_rng(0)
    sure = draw.normal(0, 2, 40_000)
    honest = numpy.where(draw.random(40_000) < 1 / (1 + numpy.exp(-numpy.abs(sure))), numpy.abs(sure), -numpy.abs(sure))
    ones = numpy.ones(40_000)
    assert calibration_error(honest, ones) < 0.01
    assert calibration_error(3 * honest, ones) > 0.08  # three times too sure
    found = calibration_error(numpy.array([0.5, -2.0, 2.0, 9.0]), numpy.array([1.0, 2.0, 1.0, 4.0]))
    halves = abs(1 - sigmoid(0.5)), abs((0 * 2 + 1) - 3 * sigmoid(2.0)), abs(4 - 4 * sigmoid(9.0))
    assert found == pytest.approx(sum(halves) / 8)


def test_doubts_are_raised_where_there_is_reason() -> None:
    fine = {"eval_accuracy": 0.7, "eval_longer_chosen": 0.55, "eval_length_correlation": 0.2}
    assert doubts(fine, 400) == []
    assert doubts({"eval_accuracy": 0.7, "eval_longer_chosen": 0.5}, 400) == []
    (chance,) = doubts(fine | {"eval_accuracy": 0.54}, 400)
    assert chance.startswith("accuracy on held-out comparisons is 54.0% of 400, which chance gives as well")
    assert doubts(fine | {"eval_accuracy": 0.54}, 4000) == []
    (short,) = doubts(fine | {"eval_length_correlation": -0.8}, 400)
    assert short.startswith(
        "shorter answers score higher (correlation -0.80), and in 55% of the held-out pairs the longer"
    )
    assert len(doubts(fine | {"eval_accuracy": 0.3, "eval_length_correlation": 0.9}, 400)) == 2
