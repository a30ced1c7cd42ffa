"""Advantages by hand and against their definitions as sums; silence of what is masked."""

import math
from itertools import pairwise

import pytest
import torch

from burnish.losses.advantage import (
    gae,
    group_relative,
    leave_one_out,
    moments,
    on_tokens,
    returns_to_go,
    steps_of,
    token_rewards,
    whiten,
)
from tests.unit.losses.packs import packed

NAN = math.nan


def doubles(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


LOG_PROBS, REFERENCE = doubles(-1, -2, -0.5, -0.1, NAN), doubles(-1.2, -1.5, -0.7, -0.1, NAN)
VALUES = doubles(0.1, 0.2, 0.4, 0.6, 0.9)


def close(got, *wanted):
    torch.testing.assert_close(got, doubles(*wanted), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("lam", "advantages", "returns"),
    [
        (0.95, (0.818175, 0.7665, 0.57, 0.4, 0), (0.918175, 0.9665, 0.97, 1, 0)),
        (1.0, (0.905, 0.815, 0.59, 0.4, 0), (1.005, 1.015, 0.99, 1, 0)),
    ],
)
def test_token_rewards_and_gae_by_hand(lam, advantages, returns):
    batch = packed(["11110"])
    rewards = token_rewards(LOG_PROBS, REFERENCE, doubles(1.0), batch, 0.05)
    close(rewards, -0.01, 0.025, -0.01, 1, 0)
    got = gae(rewards, VALUES, batch, 1.0, lam)
    close(got[0], *advantages)
    close(got[1], *returns)


def test_the_score_one_slot_after_the_end_by_hand():
    batch = packed(["11110", "11110"])
    steps = steps_of(batch, torch.tensor([True, False]))
    assert steps.tolist() == [True] * 5 + [True] * 4 + [False]
    log_probs, reference = LOG_PROBS.repeat(2), REFERENCE.repeat(2)
    rewards = token_rewards(log_probs, reference, doubles(1.0, 1.0), batch, 0.05, steps_T=steps)
    close(rewards, -0.01, 0.025, -0.01, 0, 1, -0.01, 0.025, -0.01, 1, 0)
    advantages, returns = gae(rewards, VALUES.repeat(2), batch, 1.0, 0.95, steps)
    close(advantages[:5], 0.813888, 0.761988, 0.56525, 0.395, 0.1)
    close(advantages[5:], 0.818175, 0.7665, 0.57, 0.4, 0)  # cut at the limit: no slot after the end
    close(returns[:5], 0.913888, 0.961988, 0.96525, 0.995, 1.0)


def test_an_answer_left_out_has_no_slot_after_its_end_either():
    batch = packed(["010", "000"])
    steps = steps_of(batch, torch.tensor([True, True]))
    assert steps.tolist() == [False, True, True, False, False, False]
    zeros = torch.zeros(6, dtype=torch.float64)
    close(token_rewards(zeros, zeros, doubles(2.0, NAN), batch, 0.1, steps_T=steps), 0, 0, 2, 0, 0, 0)


PATTERNS = ["0111110", "000", "010", "01100111010", "0011110", "10"]


def random_batch(seed):
    """Log-probs, reference, values [T] with poison where no step is, and scores [S]."""
    generator = torch.Generator().manual_seed(seed)
    batch = packed(PATTERNS)
    columns = torch.randn(3, len(batch.weights), generator=generator, dtype=torch.float64)
    poison = (NAN, 1e9, math.inf)[seed % 3]
    scores = torch.randn(len(PATTERNS), generator=generator, dtype=torch.float64)
    scores[1] = NAN  # wrote nothing
    return batch, columns.masked_fill(batch.weights == 0, poison), scores


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
def test_gae_is_its_definition_over_the_steps_of_each_sequence(seed, gamma, lam):
    """A_t = Σ_l (γλ)^l δ_t+l, a sum of its own for every step."""
    batch, (log_probs, reference, values), scores = random_batch(seed)
    rewards = token_rewards(log_probs, reference, scores, batch, 0.3)
    advantages, returns = gae(rewards, values, batch, gamma, lam)
    wanted_advantages, wanted_returns = torch.zeros(2, len(values), dtype=torch.float64)
    for number, (start, end) in enumerate(pairwise(batch.starts.tolist())):
        steps = [t for t in range(start, end) if batch.weights[t] != 0]
        r = [-0.3 * (log_probs[t] - reference[t]) for t in steps]
        if steps:
            r[-1] = r[-1] + scores[number]
        v = [values[t] for t in steps] + [0.0]
        deltas = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(steps))]
        for i, t in enumerate(steps):
            wanted_advantages[t] = sum((gamma * lam) ** (j - i) * deltas[j] for j in range(i, len(steps)))
            wanted_returns[t] = wanted_advantages[t] + v[i]
    torch.testing.assert_close(advantages, wanted_advantages)
    torch.testing.assert_close(returns, wanted_returns)


def test_a_sequence_has_the_same_advantages_alone_and_packed_to_the_bit():
    batch, (log_probs, reference, values), scores = random_batch(0)

    def advantages(batch, part, score):
        rewards = token_rewards(log_probs[part], reference[part], score, batch, 0.3)
        return torch.stack(gae(rewards, values[part], batch))

    together = advantages(batch, slice(None), scores)
    for number, (start, end) in enumerate(pairwise(batch.starts.tolist())):
        alone = advantages(packed([PATTERNS[number]]), slice(start, end), scores[number : number + 1])
        assert torch.equal(alone, together[:, start:end])


def test_gae_of_a_batch_that_wrote_nothing_is_zero():
    batch = packed(["000", "00"])
    nan = torch.full((5,), NAN)
    rewards = token_rewards(nan, nan, torch.full((2,), NAN), batch, 0.1)
    assert not rewards.any()
    assert not torch.stack(gae(rewards, nan, batch)).any()


def test_returns_to_go_by_hand():
    batch = packed(["01110", "0101010"])
    rewards = doubles(NAN, 1, 2, 4, NAN, NAN, 1, NAN, 10, NAN, 100, NAN)
    close(returns_to_go(rewards, batch), 0, 7, 6, 4, 0, 0, 111, 0, 110, 0, 100, 0)
    close(returns_to_go(rewards, batch, 0.5), 0, 3, 4, 4, 0, 0, 31, 0, 60, 0, 100, 0)


VECTOR, MASK = doubles(1, 2, 3, 4, 10, -6), doubles(1, 1, 1, 1, 0, 0)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, (-1.341641, -0.447214, 0.447214, 1.341641, 0, 0)),
        ({"unbiased": True}, (-1.161895, -0.387298, 0.387298, 1.161895, 0, 0)),
        ({"shift_mean": False}, (1.158359, 2.052786, 2.947214, 3.841641, 0, 0)),
    ],
)
def test_whitening_by_hand(options, wanted):
    close(whiten(VECTOR, MASK, moments(VECTOR, MASK), **options), *wanted)


@pytest.mark.parametrize("unbiased", [False, True])
def test_whitening_by_added_moments_is_whitening_of_the_whole(unbiased):
    generator = torch.Generator().manual_seed(0)
    values = 100 + 3 * torch.randn(500, generator=generator, dtype=torch.float64)
    weights = (torch.rand(500, generator=generator) < 0.7).double()
    poisoned = values.masked_fill(weights == 0, NAN)
    total = sum(moments(poisoned[a:b], weights[a:b]) for a, b in pairwise((0, 120, 121, 500)))
    parts = [whiten(poisoned[a:b], weights[a:b], total, unbiased=unbiased) for a, b in pairwise((0, 300, 500))]
    chosen = values[weights != 0]
    variance = sum((x - chosen.mean()) ** 2 for x in chosen) / (len(chosen) - unbiased)  # two passes, no Σx²
    wanted = torch.where(weights != 0, (values - chosen.mean()) / variance.sqrt(), 0.0)
    torch.testing.assert_close(torch.cat(parts), wanted)


def test_whitening_of_float32_keeps_its_digits_far_from_0():
    values = torch.tensor([10000.0, 10000.5, 10001.0, 10001.5])
    whitened = whiten(values, torch.ones(4), moments(values, torch.ones(4)))
    torch.testing.assert_close(whitened, torch.tensor([-1.341641, -0.447214, 0.447214, 1.341641]))


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("weights", [(0, 0, 0), (0, 1, 0), (1, 1, 1)])
def test_whitening_of_equal_values_or_none_is_zero(weights, unbiased):
    values, mask = doubles(3.3, 3.3, 3.3), doubles(*weights)
    assert not whiten(values, mask, moments(values, mask), unbiased=unbiased).round(decimals=3).any()


SCORES = doubles(1.0, 4.0, NAN, 2.0, 3.0, 5.0, NAN, 7.0, 7.0)
GROUPS = torch.tensor([8, 2, 8, 2, 2, 5, 5, 0, 0])
"""Group 8 has one valid score of two, group 5 likewise, group 0 a tie."""


def test_leave_one_out_by_hand():
    close(leave_one_out(SCORES, GROUPS), 0, 4 - 2.5, 0, 2 - 3.5, 3 - 3, 0, 0, 0, 0)
    valid = torch.tensor([True, True, False, False, True, True, False, True, True])
    close(leave_one_out(SCORES, GROUPS, valid), 0, 1, 0, 0, -1, 0, 0, 0, 0)


def test_group_relative_by_hand():
    close(group_relative(SCORES, GROUPS, scale=False), 0, 1, 0, -1, 0, 0, 0, 0, 0)
    std = 1.0  # of 4, 2, 3, unbiased
    close(group_relative(SCORES, GROUPS), 0, 1 / (std + 1e-4), 0, -1 / (std + 1e-4), 0, 0, 0, 0, 0)


@pytest.mark.parametrize("advantage", [leave_one_out, group_relative])
def test_order_and_other_groups_change_nothing(advantage):
    generator = torch.Generator().manual_seed(0)
    scores, groups = torch.randn(40, generator=generator, dtype=torch.float64), torch.arange(40) % 7
    order = torch.randperm(40, generator=generator)
    whole = advantage(scores, groups)
    torch.testing.assert_close(advantage(scores[order], groups[order]), whole[order])
    one = groups == 3
    torch.testing.assert_close(advantage(scores[one], groups[one]), whole[one])
    torch.testing.assert_close(advantage(scores + 5, groups), whole)
    assert whole[one].sum().abs() < 1e-9


def test_advantages_of_answers_stand_on_their_tokens():
    batch = packed(["0110", "010", "01010"])
    assert on_tokens(doubles(2.0, NAN, -1.0), batch)[[0, 1, 2, 3, 7, 8, 9, 10, 11]].tolist() == [
        *(0, 2, 2, 0),
        *(0, -1, 0, -1, 0),
    ]
