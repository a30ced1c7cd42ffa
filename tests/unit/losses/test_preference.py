"""Preference losses against plain float64 arithmetic, against TRL's own code, and against their known minima."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from burnish.losses.preference import (
    LOSSES,
    WITHOUT_REFERENCE,
    Options,
    Pairs,
    answer_sums,
    kto_divergence,
    kto_loss,
    pairs_of,
    preference_loss,
)
from tests.unit.losses.packs import compared

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "trl_losses.json").read_text())
OPTIONS = Options(beta=0.3, label_smoothing=0.05, margin=0.8)


def sigma(x):
    return 1 / (1 + math.exp(-x))


def nll(x, smoothing=0.05):
    return -(1 - smoothing) * math.log(sigma(x)) - smoothing * math.log(sigma(-x))


def divergence(q, p):
    return q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))


def log_odds(mean):
    return math.log(math.exp(mean) / (1 - math.exp(mean)))


B, EPS, M = OPTIONS.beta, OPTIONS.label_smoothing, OPTIONS.margin
DEFINITIONS = {
    "sigmoid": lambda c, r, rc, rr, n, k: nll(B * ((c - rc) - (r - rr))),
    "robust": lambda c, r, rc, rr, n, k: (
        ((1 - EPS) * nll(B * ((c - rc) - (r - rr)), 0) - EPS * nll(-B * ((c - rc) - (r - rr)), 0)) / (1 - 2 * EPS)
    ),
    "ipo": lambda c, r, rc, rr, n, k: ((c - rc) / n - (r - rr) / k - 1 / (2 * B)) ** 2,
    "hinge": lambda c, r, rc, rr, n, k: max(0.0, 1 - B * (c - rc - r + rr)),
    "slic": lambda c, r, rc, rr, n, k: max(0.0, M - c + r),
    "exo": lambda c, r, rc, rr, n, k: divergence(sigma(B * (c - rc - r + rr)), 1 - EPS),
    "apo_zero": lambda c, r, rc, rr, n, k: 1 - sigma(B * (c - rc)) + sigma(B * (r - rr)),
    "apo_down": lambda c, r, rc, rr, n, k: sigma(B * (c - rc)) + 1 - sigma(B * (c - rc - r + rr)),
    "sppo": lambda c, r, rc, rr, n, k: (c - rc - 0.5 / B) ** 2 + (r - rr + 0.5 / B) ** 2,
    "sigmoid_norm": lambda c, r, rc, rr, n, k: nll(B * ((c - rc) / n - (r - rr) / k)),
    "simpo": lambda c, r, rc, rr, n, k: nll(B * (c / n - r / k) - M),
    "orpo": lambda c, r, rc, rr, n, k: -c / n + B * nll(log_odds(c / n) - log_odds(r / k), 0),
    "cpo": lambda c, r, rc, rr, n, k: nll(B * (c - r)) - c / n,
    "sft": lambda c, r, rc, rr, n, k: -c / n,
}

every_loss = pytest.mark.parametrize("name", LOSSES)


def random_pairs(count=200):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (2, count), generator=generator).double()
    policy = -lengths * 4 * torch.rand(2, count, generator=generator, dtype=torch.float64) - 1e-3
    reference = policy + 2 * torch.randn(2, count, generator=generator, dtype=torch.float64)
    return Pairs(*policy, *reference, *lengths)


@every_loss
def test_values_are_those_of_the_formula(name):
    pairs = random_pairs()
    wanted = [DEFINITIONS[name](*pair) for pair in zip(*(column.tolist() for column in pairs), strict=True)]
    torch.testing.assert_close(LOSSES[name](pairs, OPTIONS), torch.tensor(wanted, dtype=torch.float64))


def flat(pairs):
    """Log-probs [T] of answers by pair, each between an unscored prompt position and an unscored last one."""
    numbers = [x for pair in pairs for answer in pair for x in (float("nan"), *answer, float("nan"))]
    return torch.tensor(numbers, dtype=torch.float64)


def golden_batch():
    return compared([["0" + "1" * len(answer) + "0" for answer in pair] for pair in GOLDEN["policy"]])


OURS = {"exo_pair": "exo", "sppo_hard": "sppo"}
SMOOTHED = {"robust", "exo_pair"}
"""TRL reads its label smoothing in these alone."""


@pytest.mark.parametrize("name", [*GOLDEN["dpo"], "simpo", "cpo", "orpo"])
def test_values_and_gradients_are_those_of_trl(name):
    beta, margin = GOLDEN["beta"], 1.0
    if name == "simpo":
        beta, margin, golden = GOLDEN["simpo"]["beta"], GOLDEN["simpo"]["gamma"], GOLDEN["simpo"]["pairs"]
    else:
        golden = GOLDEN[name] if name in ("cpo", "orpo") else GOLDEN["dpo"][name]
    options = Options(beta=beta, margin=margin, label_smoothing=GOLDEN["label_smoothing"] if name in SMOOTHED else 0.0)
    batch, log_probs = golden_batch(), flat(GOLDEN["policy"]).requires_grad_()
    pairs = pairs_of(log_probs, flat(GOLDEN["reference"]), batch)
    losses = LOSSES[OURS.get(name, name)](pairs, options)
    if name in ("cpo", "orpo"):  # TRL adds their likelihood elsewhere
        losses = losses - LOSSES["sft"](pairs, options)
    losses.sum().backward()
    wanted = torch.tensor([pair["loss"] for pair in golden], dtype=torch.float64)
    torch.testing.assert_close(losses.detach(), wanted, atol=1e-6, rtol=1e-6)
    gradient = log_probs.grad[batch.weights != 0]
    flat_golden = [x for pair in golden for answer in pair["gradients"] for x in answer]
    torch.testing.assert_close(gradient, torch.tensor(flat_golden, dtype=torch.float64), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kl", GOLDEN["kto"])
def test_kto_is_that_of_trl(kl):
    batch, log_probs = golden_batch(), flat(GOLDEN["policy"]).requires_grad_()
    ratio = answer_sums(log_probs, batch) - answer_sums(flat(GOLDEN["reference"]), batch)
    labels = torch.tensor([1, -1] * len(GOLDEN["policy"]))
    loss, metrics = kto_loss(ratio, labels, float(kl), Options(beta=GOLDEN["beta"], unwanted_weight=1.5))
    (loss / len(labels)).backward()
    assert math.isclose(loss.item() / len(labels), GOLDEN["kto"][kl]["loss"], rel_tol=1e-6)
    wanted = torch.tensor([x for answer in GOLDEN["kto"][kl]["gradients"] for x in answer], dtype=torch.float64)
    torch.testing.assert_close(log_probs.grad[batch.weights != 0], wanted, atol=1e-7, rtol=1e-6)
    assert math.isclose(metrics["kl"].item() / len(labels), max(0.0, float(kl)))
    assert metrics["wanted"] == 4


def test_kto_leaves_out_what_has_no_label_and_sends_no_gradient_through_the_divergence():
    ratio = torch.tensor([0.5, float("nan"), -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    kl = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    loss, metrics = kto_loss(ratio, torch.tensor([1, 0, -1, 1]), kl, Options(beta=1.0, wanted_weight=2.0))
    loss.backward()
    wanted = 2 * (1 - sigma(0.5 - 0.25)) + (1 - sigma(0.25 + 1.0)) + 2 * (1 - sigma(2.0 - 0.25))
    assert math.isclose(loss.item(), wanted)
    assert kl.grad is None
    assert ratio.grad[1] == 0
    assert {name: metric.item() for name, metric in metrics.items()} == {
        "accuracy": 3.0,
        "wanted": 2.0,
        "wanted_reward": 2.5,
        "unwanted_reward": -1.0,
        "kl": 0.75,
    }


def test_kto_divergence_reads_answers_to_other_prompts_alone():
    ratio = torch.tensor([float("nan"), 0.5, -1.0, 0.25], requires_grad=True)
    sums = kto_divergence(ratio, torch.tensor([1, 0, -1, 0]))
    assert sums.tolist() == [0.75, 2.0]
    assert not sums.requires_grad


def test_pairs_hold_sums_over_weighted_positions():
    batch = compared([("0110", "010", "01010")])
    nan = float("nan")
    log_probs = torch.tensor([nan, -1.0, -2.0, nan, nan, -4.0, nan, nan, -8.0, nan, -16.0, nan])
    pairs = pairs_of(log_probs, 2 * log_probs, batch)
    assert pairs.chosen.tolist() == [-3.0, -3.0, -4.0]
    assert pairs.rejected.tolist() == [-4.0, -24.0, -24.0]
    assert pairs.chosen_reference.tolist() == [-6.0, -6.0, -8.0]
    assert pairs.chosen_length.tolist() == [2.0, 2.0, 1.0]
    assert pairs.rejected_length.tolist() == [1.0, 2.0, 2.0]
    assert pairs_of(log_probs, None, batch).rejected_reference.tolist() == [0.0, 0.0, 0.0]


def test_a_prompt_that_stands_in_the_batch_once_changes_nothing():
    whole, shared = compared([("000110", "00010")]), compared([("000110", "010")])
    numbers = -torch.arange(1.0, 12.0, dtype=torch.float64)
    own = numbers[[0, 1, 2, 3, 4, 5, 8, 9, 10]]  # the second answer leaves its first two positions to the first
    for mine, theirs in zip(pairs_of(own, None, shared), pairs_of(numbers, None, whole), strict=True):
        assert torch.equal(mine, theirs)


def summed(pairs, mix, options=OPTIONS, weights=None):
    return preference_loss(pairs, torch.ones_like(pairs.chosen) if weights is None else weights, mix, options)


def test_the_first_step_of_dpo_has_loss_log_2():
    pairs = random_pairs(10)
    at_reference = pairs._replace(chosen_reference=pairs.chosen, rejected_reference=pairs.rejected)
    loss, metrics = summed(at_reference, {"sigmoid": 1.0}, Options(beta=0.7))
    assert math.isclose(loss.item() / 10, math.log(2))
    assert metrics["accuracy"].item() / 10 == 0.5
    assert metrics["margin"] == metrics["chosen_reward"] == 0


def test_a_mix_is_the_weighted_sum_and_names_its_losses():
    pairs = random_pairs(5)
    weights = torch.tensor([1.0, 0.5, 0.5, 0.0, 2.0], dtype=torch.float64)
    unread = torch.tensor([1.0, 1.0, 1.0, float("nan"), 1.0], dtype=torch.float64)  # a pair that does not count
    given = Pairs(*(column * unread for column in pairs[:4]), *pairs[4:])
    loss, metrics = summed(given, {"sigmoid": 1.0, "sft": 0.25}, weights=weights)
    alone = {name: (weights * LOSSES[name](pairs, OPTIONS)).sum() for name in ("sigmoid", "sft")}
    torch.testing.assert_close(loss, alone["sigmoid"] + 0.25 * alone["sft"])
    torch.testing.assert_close(metrics["sigmoid_loss"], alone["sigmoid"])
    torch.testing.assert_close(metrics["sft_loss"], alone["sft"])
    assert "sigmoid_loss" not in summed(pairs, {"sigmoid": 1.0})[1]


@pytest.mark.parametrize(("mix", "chosen", "margin"), [("sigmoid", 0.6, -0.9), ("simpo", 0.3, 0.0)])
def test_rewards_are_per_token_where_the_loss_is(mix, chosen, margin):
    pairs = Pairs(*torch.tensor([[-4.0], [-2.0], [-10.0], [-17.0], [2.0], [5.0]]))
    _, metrics = summed(pairs, {mix: 1.0, "sft": 0.1}, Options(beta=0.1))
    assert math.isclose(metrics["chosen_reward"].item(), chosen, abs_tol=1e-6)
    assert math.isclose(metrics["margin"].item(), margin, abs_tol=1e-6)
    assert metrics["accuracy"].item() == (0.5 if margin == 0 else 0.0)


@pytest.mark.parametrize("name", sorted(WITHOUT_REFERENCE))
def test_losses_without_a_reference_do_not_read_it(name):
    pairs = random_pairs(20)
    poisoned = pairs._replace(chosen_reference=pairs.chosen * float("nan"), rejected_reference=pairs.chosen * 1e9)
    assert torch.equal(LOSSES[name](poisoned, OPTIONS), LOSSES[name](pairs, OPTIONS))


@every_loss
def test_all_others_read_it(name):
    pairs = random_pairs(20)
    moved = pairs._replace(chosen_reference=pairs.chosen_reference + 1, rejected_reference=pairs.rejected_reference - 1)
    assert torch.equal(LOSSES[name](moved, OPTIONS), LOSSES[name](pairs, OPTIONS)) == (name in WITHOUT_REFERENCE)


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"apo_down", "orpo", "cpo", "sft"}))
def test_swapping_the_answers_mirrors_the_gradient_where_policy_and_reference_agree(name):
    batch = compared([("01110", "01110"), ("0110", "010")])
    swapped = replace(batch, chosen=batch.rejected, rejected=batch.chosen)
    gradients = []
    for one in (batch, swapped):
        log_probs = torch.full((len(batch.weights),), -0.1, dtype=torch.float64, requires_grad=True)
        pairs = pairs_of(log_probs, log_probs.detach(), one)
        summed(pairs, {name: 1.0}, weights=one.pair_weights)[0].backward()
        gradients.append(log_probs.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[0], -gradients[1])


def swap(pairs):
    return Pairs(pairs.rejected, pairs.chosen, pairs.rejected_reference, pairs.chosen_reference, *pairs[:3:-1])


@pytest.mark.parametrize("name", ["sigmoid", "exo", "sigmoid_norm"])
def test_smoothing_1_minus_e_is_smoothing_e_of_swapped_labels(name):
    pairs = random_pairs()
    mirrored = LOSSES[name](swap(pairs), Options(label_smoothing=0.9))
    torch.testing.assert_close(mirrored, LOSSES[name](pairs, Options(label_smoothing=0.1)))


def test_robust_is_unbiased_under_flipped_labels():
    pairs, options = random_pairs(), Options(label_smoothing=0.2)
    mean = 0.8 * LOSSES["robust"](pairs, options) + 0.2 * LOSSES["robust"](swap(pairs), options)
    torch.testing.assert_close(mean, LOSSES["sigmoid"](pairs, Options()))


def minimised(loss):
    """(h_c, h_r) where a loss of two log-ratios is smallest."""
    ratios = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [ratios], max_iter=200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )
    zero, length = torch.zeros(1, dtype=torch.float64), torch.full((1,), 4.0, dtype=torch.float64)

    def closure():
        optimizer.zero_grad()
        value = loss(Pairs(ratios[:1], ratios[1:], zero, zero, length, length)).sum()
        value.backward()
        return value

    optimizer.step(closure)
    return ratios.tolist()


@pytest.mark.parametrize("name", ["sigmoid", "exo"])
def test_smoothed_losses_stop_where_the_labels_are_as_sure_as_they_are_right(name):
    chosen, rejected = minimised(lambda pairs: LOSSES[name](pairs, Options(beta=0.5, label_smoothing=0.1)))
    assert math.isclose(sigma(0.5 * (chosen - rejected)), 0.9, rel_tol=1e-5)


def test_sppo_moves_each_log_ratio_to_its_half():
    chosen, rejected = minimised(lambda pairs: LOSSES["sppo"](pairs, Options(beta=0.5)))
    assert math.isclose(chosen, 1.0, rel_tol=1e-6)
    assert math.isclose(rejected, -1.0, rel_tol=1e-6)


def test_ipo_under_disagreeing_labels_stops_at_its_closed_form():
    """With the label right with probability p the mean log-ratios differ by (2p − 1) / 2β (Azar 2023, §5)."""
    options, p = Options(beta=0.5), 0.7
    loss = LOSSES["ipo"]
    chosen, rejected = minimised(lambda pairs: p * loss(pairs, options) + (1 - p) * loss(swap(pairs), options))
    assert math.isclose((chosen - rejected) / 4, 0.4, rel_tol=1e-6)


def test_simpo_with_disagreeing_labels_and_no_margin_is_the_logit_of_the_labels():
    options, p, loss = Options(beta=2.0, margin=0.0), 0.7, LOSSES["simpo"]
    chosen, rejected = minimised(lambda pairs: p * loss(pairs, options) + (1 - p) * loss(swap(pairs), options))
    assert math.isclose(2.0 * (chosen - rejected) / 4, math.log(p / (1 - p)), rel_tol=1e-5)


@pytest.mark.parametrize(("name", "smoothing"), [("exo", 0.0), ("exo", 1.0), ("robust", 0.5)])
def test_smoothing_without_a_finite_loss_is_refused(name, smoothing):
    with pytest.raises(ValueError, match=f"label_smoothing is {smoothing:g}: the loss {name} needs"):
        LOSSES[name](random_pairs(2), Options(label_smoothing=smoothing))


def test_odds_keep_their_digits_where_probabilities_are_near_0_and_1():
    means = torch.tensor([-1e-6, -1e-3, -0.69, -0.7, -5.0, -40.0], dtype=torch.float64)
    ones = torch.ones_like(means)
    pairs = Pairs(means, means.flip(0), ones, ones, ones, ones)
    got = LOSSES["orpo"](pairs, Options(beta=1.0)) + means
    exact = [math.log(-1 / math.expm1(x)) + x for x in means.tolist()]  # log odds = x − log(1 − e^x)
    wanted = [max(0.0, b - a) + math.log1p(math.exp(-abs(a - b))) for a, b in zip(exact, exact[::-1], strict=True)]
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=1e-12)
