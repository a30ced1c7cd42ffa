"""Losses on policies that are tables, whose optimum and whose exact gradient are known: no transformer, no recipe.

A prompt of one token, then answers of T tokens from a vocabulary of V: V^T answers, so every expectation is a sum.
"""

from itertools import product

import pytest
import torch

from burnish.losses.advantage import (
    gae,
    group_relative,
    leave_one_out,
    moments,
    on_tokens,
    returns_to_go,
    token_rewards,
    whiten,
)
from burnish.losses.policy import averaging, kl_loss, ppo_loss, reinforce_loss
from burnish.losses.preference import Options, answer_sums, pairs_of, preference_loss
from burnish.types import Batch, PreferenceBatch


class Table:
    """A policy that is a table: logits for each beginning of an answer."""

    def __init__(self, vocabulary: int, length: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.vocabulary, self.length = vocabulary, length
        self.answers_YT = torch.tensor(list(product(range(vocabulary), repeat=length)))
        count = sum(vocabulary**t for t in range(length))
        self.logits = torch.randn(count, vocabulary, generator=generator, dtype=torch.float64).requires_grad_()

    def token_log_probs(self, answers_NT: torch.Tensor) -> torch.Tensor:
        """[N, T]"""
        first, beginning, columns = 0, torch.zeros_like(answers_NT[:, 0]), []
        for t in range(self.length):
            rows = self.logits[first + beginning].log_softmax(-1)
            columns.append(rows.gather(1, answers_NT[:, t : t + 1])[:, 0])
            first, beginning = first + self.vocabulary**t, beginning * self.vocabulary + answers_NT[:, t]
        return torch.stack(columns, 1)

    def packed_log_probs(self, answers_NT: torch.Tensor) -> torch.Tensor:
        """[N · (T + 1)] as a model gives them, with poison at each last position."""
        return torch.nn.functional.pad(self.token_log_probs(answers_NT), (0, 1), value=float("nan")).reshape(-1)

    def distribution(self) -> torch.Tensor:
        return self.token_log_probs(self.answers_YT).sum(1).exp()


def columns(answers_NT: torch.Tensor) -> dict:
    """Position t of each sequence has read t tokens of the answer; the last one writes nothing."""
    num, length = answers_NT.shape
    places = torch.arange(length + 1).repeat(num)
    return {
        "tokens": places * 0,
        "targets": places * 0,
        "weights": (places < length).double(),
        "positions": places,
        "sequence": torch.arange(num).repeat_interleave(length + 1),
        "starts": torch.arange(num + 1, dtype=torch.int32) * (length + 1),
        "scored": (places < length).nonzero()[:, 0],
        "num_sequences": num,
        "longest": length + 1,
        "total_weight": float(num * length),
    }


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_dpo_on_bradley_terry_preferences_reaches_its_closed_form(beta):
    """π* ∝ π_ref exp(r / β) (Rafailov 2023, eq. 4), where every pair is preferred with probability σ(r_i − r_j)."""
    policy, reference = Table(8, 2, seed=0), Table(8, 2, seed=0)
    rewards_Y = torch.randn(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    chosen, rejected = (~torch.eye(64, dtype=torch.bool)).nonzero().T
    batch = PreferenceBatch(
        **columns(policy.answers_YT),
        chosen=chosen,
        rejected=rejected,
        margins=torch.zeros(len(chosen), dtype=torch.float64),
        pair_weights=torch.sigmoid(rewards_Y[chosen] - rewards_Y[rejected]),
        labels=torch.zeros(64, dtype=torch.int64),
        num_pairs=64 * 63 / 2,
        num_labels=0,
    )
    reference_T = reference.packed_log_probs(policy.answers_YT).detach()
    optimizer = torch.optim.LBFGS([policy.logits], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        pairs = pairs_of(policy.packed_log_probs(policy.answers_YT), reference_T, batch)
        loss, _ = preference_loss(pairs, batch.pair_weights, {"sigmoid": 1.0}, Options(beta=beta))
        (loss / batch.num_pairs).backward()
        return loss.detach() / batch.num_pairs

    optimizer.step(closure)
    optimum = (reference.distribution().log() + rewards_Y / beta).softmax(0)
    assert (optimum - reference.distribution()).abs().sum() / 2 > 0.2
    assert (policy.distribution() - optimum).abs().sum() / 2 < 0.01


BETA, SAMPLES, GROUP = 0.2, 65536, 4


def exact_gradient(policy: Table, reference: Table, rewards_Y: torch.Tensor) -> torch.Tensor:
    """Of J = Σ_y π(y) (r(y) − β log π(y) / π_ref(y)), by autograd."""
    log_probs_Y = policy.token_log_probs(policy.answers_YT).sum(1)
    reference_Y = reference.token_log_probs(policy.answers_YT).sum(1).detach()
    value = (log_probs_Y.exp() * (rewards_Y - BETA * (log_probs_Y - reference_Y))).sum()
    return torch.autograd.grad(value, policy.logits)[0]


def no_critic(rewards_T, batch):
    return gae(rewards_T, torch.zeros_like(rewards_T), batch, 1.0, 1.0)[0]


def a_critic(rewards_T, batch):
    """Any function of the state is a baseline, here one of the position; λ = 1 leaves no bias."""
    return gae(rewards_T, 0.7 * batch.positions - 0.5, batch, 1.0, 1.0)[0]


def reinforce_plus_plus(rewards_T, batch):
    returns_T = returns_to_go(rewards_T, batch)
    return whiten(returns_T, batch.weights, moments(returns_T, batch.weights))


def in_groups(advantage):
    def advantages(rewards_T, batch):
        scores_S = answer_sums(rewards_T, batch)  # the score less β k1 of the whole answer
        return on_tokens(advantage(scores_S, torch.arange(SAMPLES) // GROUP), batch)

    return advantages


METHODS = {
    "ppo without a critic": (ppo_loss, no_critic, 1.0),
    "ppo with a critic": (ppo_loss, a_critic, 1.0),
    "rloo": (ppo_loss, in_groups(leave_one_out), 1.0),
    "grpo": (ppo_loss, in_groups(lambda s, g: group_relative(s, g, scale=False)), 1 - 1 / GROUP),
    "reinforce++": (reinforce_loss, reinforce_plus_plus, None),
}
"""Loss, advantages, and the length of the gradient over that of the exact one: GRPO's mean counts the answer itself;
whitening divides by what the deviation happens to be."""


def sampled(seed=2):
    policy, reference = Table(4, 3, seed=0), Table(4, 3, seed=1)
    rewards_Y = torch.randn(64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    drawn_N = torch.multinomial(policy.distribution().detach(), SAMPLES, replacement=True, generator=generator)
    answers_NT = policy.answers_YT[drawn_N]
    batch = Batch(**columns(answers_NT))
    old_T = policy.packed_log_probs(answers_NT).detach()
    reference_T = reference.packed_log_probs(answers_NT).detach()
    return policy, reference, rewards_Y, answers_NT, rewards_Y[drawn_N], batch, old_T, reference_T


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


@pytest.mark.parametrize(("loss", "advantages", "scale"), METHODS.values(), ids=METHODS.keys())
@pytest.mark.parametrize("average", ["token", "sequence", "constant"])
def test_the_sampled_gradient_of_the_first_pass_is_that_of_the_objective(loss, advantages, scale, average):
    policy, reference, rewards_Y, answers_NT, scores_N, batch, old_T, reference_T = sampled()
    rewards_T = token_rewards(old_T, reference_T, scores_N, batch, BETA)
    weights_T, count = averaging(batch, average, 3)
    value, metrics = loss(policy.packed_log_probs(answers_NT), old_T, advantages(rewards_T, batch), weights_T)
    got = torch.autograd.grad(value / count, policy.logits)[0]
    assert metrics["ratio"] / weights_T.sum() == 1
    wanted = exact_gradient(policy, reference, rewards_Y)
    assert cosine(-got, wanted) > 0.99
    if scale is not None:  # the averages are over tokens or thirds of answers, the objective over answers
        torch.testing.assert_close((-3 * got).norm(), scale * wanted.norm(), rtol=0.05, atol=0)


def test_the_divergence_in_the_loss_has_the_gradient_that_it_has_per_token_in_the_rewards():
    """For the first token, where states do not depend on the policy, it is the gradient of KL(π‖π_ref)."""
    policy, reference, _, answers_NT, _, batch, old_T, reference_T = sampled()
    first_T = batch.weights * (batch.positions == 0)
    wanted = torch.autograd.grad(
        (policy.logits[0].softmax(-1) * (policy.logits[0].log_softmax(-1) - reference.logits[0].log_softmax(-1))).sum(),
        policy.logits,
    )[0]
    for estimator, old in (("k1", old_T), ("k3", old_T), ("k2", None)):
        loss, _ = kl_loss(policy.packed_log_probs(answers_NT), reference_T, first_T, estimator, old)
        got = torch.autograd.grad(loss / SAMPLES, policy.logits)[0]
        assert cosine(got, wanted) > 0.99, estimator
        torch.testing.assert_close(got.norm(), wanted.norm(), rtol=0.05, atol=0)
