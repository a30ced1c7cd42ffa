"""The ranking loss by hand, against TRL's own code, and where every pair of K answers counts."""

import json
import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch

from burnish.losses.reward import ranking_loss, wins
from tests.unit.losses.packs import compared

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "trl_losses.json").read_text())


def one_pair(margin=0.0):
    batch = compared([("010", "010")])
    return replace(batch, margins=torch.full((1,), margin, dtype=torch.float64))


@pytest.mark.parametrize(("difference", "loss"), [(1.0, 0.3132617), (0.0, 0.6931472), (-1.0, 1.3132617)])
def test_values_by_hand(difference, loss):
    scores = torch.tensor([2.0 + difference, 2.0], dtype=torch.float64)
    assert math.isclose(ranking_loss(scores, one_pair())[0].item(), loss, abs_tol=1e-7)
    assert math.isclose(ranking_loss(scores + 0.25, one_pair(difference))[0].item(), math.log(2), rel_tol=1e-12)
    flipped, metrics = ranking_loss(scores.flip(0), one_pair())
    assert math.isclose(flipped.item(), loss + difference, abs_tol=1e-7)
    assert metrics["margin"].item() == -difference


def test_all_pairs_of_ranked_answers_together_weigh_as_much_as_one_pair():
    batch = compared([("010", "0110", "010", "010"), ("010", "010")])
    scores = torch.tensor([1.0, -0.5, 0.25, 2.0, 0.3, 0.1], dtype=torch.float64)
    first = [math.log1p(math.exp(b - a)) for a, b in combinations(scores[:4].tolist(), 2)]
    expected = sum(first) / 6 + math.log1p(math.exp(-0.2))
    loss, metrics = ranking_loss(scores, replace(batch, margins=torch.zeros(7, dtype=torch.float64)))
    assert math.isclose(loss.item(), expected, rel_tol=1e-12)
    assert math.isclose(metrics["log_loss"].item(), expected, rel_tol=1e-12)
    assert math.isclose(metrics["accuracy"].item(), 2 / 6 + 1, rel_tol=1e-12)
    assert batch.num_pairs == 2


@pytest.mark.parametrize("centering", GOLDEN["reward"])
def test_values_and_gradients_are_those_of_trl(centering):
    batch = replace(compared([("010", "010")] * 4), margins=torch.tensor(GOLDEN["margins"], dtype=torch.float64))
    given = torch.tensor(GOLDEN["scores"], dtype=torch.float64).requires_grad_()
    scores = given.reshape(2, 4).T.reshape(-1)  # TRL: first all chosen, then all rejected
    loss, _ = ranking_loss(scores, batch, 0.0 if centering == "None" else float(centering))
    (loss / batch.num_pairs).backward()
    golden = GOLDEN["reward"][centering]
    assert math.isclose(loss.item() / 4, golden["loss"], rel_tol=1e-9)
    torch.testing.assert_close(given.grad, torch.tensor(golden["gradients"][0], dtype=torch.float64))


def test_margins_move_the_loss_and_not_its_calibration():
    scores = torch.tensor([0.4, 0.1], dtype=torch.float64)
    loss, metrics = ranking_loss(scores, one_pair(1.0))
    assert math.isclose(loss.item(), math.log1p(math.exp(0.7)))
    assert math.isclose(metrics["log_loss"].item(), math.log1p(math.exp(-0.3)))


def test_a_tie_is_half_a_win():
    assert wins(torch.tensor([0.5, 0.0, -0.5])).tolist() == [1.0, 0.5, 0.0]


def test_swapped_labels_mirror_the_gradient_of_a_tie():
    batch = compared([("010", "010"), ("010", "010", "010")])
    batch = replace(batch, margins=torch.zeros_like(batch.margins))
    gradients = []
    for one in (batch, replace(batch, chosen=batch.rejected, rejected=batch.chosen)):
        scores = torch.full((5,), 0.7, requires_grad=True)
        ranking_loss(scores, one)[0].backward()
        gradients.append(scores.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[0], -gradients[1])


def test_a_pair_that_does_not_count_may_hold_anything():
    batch = compared([("010", "010"), ("010", "010")])
    silent = replace(batch, pair_weights=torch.tensor([1.0, 0.0], dtype=torch.float64))
    scores = torch.tensor([1.0, 0.0, math.nan, math.inf], dtype=torch.float64, requires_grad=True)
    loss, metrics = ranking_loss(scores, silent, centering=0.1)
    loss.backward()
    assert math.isclose(loss.item(), math.log1p(math.exp(-1)) + 0.1)
    assert metrics["accuracy"] == 1
    assert scores.grad[2:].tolist() == [0, 0]
