"""Policy and value losses by hand, against TRL's own code, and the gradients that the divergence has in a loss."""

import json
import math
from pathlib import Path

import pytest
import torch

from burnish.losses.policy import averaging, kl_loss, ppo_loss, reinforce_loss, value_loss
from tests.unit.losses.packs import packed

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "trl_losses.json").read_text())
ONE = torch.ones(1, dtype=torch.float64)


def doubles(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "clipped"),
    [(1, 1.5, -1.2, 1), (1, 0.5, -0.5, 0), (-1, 1.5, 1.5, 0), (-1, 0.5, 0.8, 1), (-1, 5, 5, 0)],
)
def test_clipped_loss_by_hand(advantage, ratio, loss, clipped):
    given = (doubles(math.log(ratio)), 0 * ONE, doubles(advantage), ONE)
    value, metrics = ppo_loss(*given, clip=0.2)
    assert math.isclose(value.item(), loss, rel_tol=1e-12)
    assert metrics["clip_fraction"].item() == clipped
    assert math.isclose(metrics["ratio"].item(), ratio, rel_tol=1e-12)
    assert math.isclose(metrics["approx_kl"].item(), math.log(ratio) ** 2 / 2, rel_tol=1e-12)
    bounded, _ = ppo_loss(*given, clip=0.2, dual_clip=3.0)
    assert math.isclose(bounded.item(), min(loss, 3.0), rel_tol=1e-12)


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "clipped"),
    [(1.0, 0.5, 1.5, 0.32, 1), (0.9, 0.5, 0.6, 0.045, 0), (0.2, 0.5, 0.9, 0.245, 0)],
)
def test_clipped_value_loss_by_hand(value, old, target, loss, clipped):
    got, metrics = value_loss(doubles(value), doubles(old), doubles(target), ONE, clip=0.2)
    assert math.isclose(got.item(), loss, rel_tol=1e-12)
    assert metrics["value_clip_fraction"].item() == clipped
    free, _ = value_loss(doubles(value), doubles(old), doubles(target), ONE, clip=math.inf)
    assert math.isclose(free.item(), (value - target) ** 2 / 2, rel_tol=1e-12)


def draw(count=64):
    generator = torch.Generator().manual_seed(0)
    log_probs, advantages, noise = torch.randn(3, count, generator=generator, dtype=torch.float64)
    return log_probs, log_probs + 0.4 * noise, advantages, (noise > -0.5).double()


def test_a_clipped_token_has_no_gradient_and_others_have_that_of_the_ratio():
    log_probs, old, advantages, weights = draw()
    log_probs.requires_grad_()
    ppo_loss(log_probs, old, advantages, weights)[0].backward()
    ratio = (log_probs.detach() - old).exp()
    stopped = ((ratio > 1.2) & (advantages > 0)) | ((ratio < 0.8) & (advantages < 0))
    assert stopped.any()
    torch.testing.assert_close(log_probs.grad, torch.where(stopped, 0.0, -weights * advantages * ratio))


def test_at_the_first_pass_ratios_are_1_and_all_policy_losses_have_one_gradient():
    log_probs, _, advantages, weights = draw()
    gradients = []
    for loss, extra in ((ppo_loss, {}), (ppo_loss, {"clip": math.inf}), (reinforce_loss, {})):
        trained = log_probs.clone().requires_grad_()
        value, metrics = loss(trained, log_probs, advantages, weights, **extra)
        value.backward()
        gradients.append(trained.grad)
        assert metrics["ratio"] == weights.sum()
        assert metrics["approx_kl"] == 0
        assert metrics.get("clip_fraction", 0) == 0
    assert torch.equal(gradients[0], -weights * advantages)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


def test_no_clipping_is_importance_sampling():
    log_probs, old, advantages, weights = draw()
    loss, metrics = ppo_loss(log_probs, old, advantages, weights, clip=math.inf)
    torch.testing.assert_close(loss, -(weights * advantages * (log_probs - old).exp()).sum())
    assert metrics["clip_fraction"] == 0


PATTERNS = ["01110", "010", "00", "0110011110"]


@pytest.mark.parametrize(
    ("average", "weights", "count"),
    [
        ("token", [[1, 1, 1], [1], [1] * 6], 10),
        ("sequence", [[1 / 3] * 3, [1], [1 / 6] * 6], 3),
        ("constant", [[1, 1, 1], [1], [1] * 6], 3 * 20),
    ],
)
def test_averages(average, weights, count):
    batch = packed(PATTERNS)
    weights_T, got = averaging(batch, average, 20)
    assert got == count
    torch.testing.assert_close(weights_T[batch.weights != 0], doubles(*(w for answer in weights for w in answer)))
    assert not weights_T[batch.weights == 0].any()


@pytest.mark.parametrize("average", ["token", "sequence", "constant"])
def test_averages_do_not_depend_on_how_answers_are_packed(average):
    values = torch.randn(22, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def mean(packs):
        sums = counts = 0.0
        for pack in packs:
            weights, count = averaging(packed([PATTERNS[i] for i in pack]), average, 20)
            starts = [sum(map(len, PATTERNS[:i])) for i in pack]
            own = torch.cat([values[a : a + len(PATTERNS[i])] for a, i in zip(starts, pack, strict=True)])
            sums, counts = sums + (weights * own).sum(), counts + count
        return sums / counts

    torch.testing.assert_close(mean([[0], [1], [2], [3]]), mean([[0, 1, 2, 3]]))
    torch.testing.assert_close(mean([[3, 1], [2, 0]]), mean([[0, 1, 2, 3]]))


@pytest.mark.parametrize(("theirs", "average"), [("grpo", "sequence"), ("dapo", "token"), ("dr_grpo", "constant")])
def test_grpo_is_that_of_trl(theirs, average):
    answers = [answer for pair in GOLDEN["policy"] for answer in pair]
    batch = packed(["0" + "1" * len(answer) + "0" for answer in answers])

    def column(name):
        numbers = [x for pair in GOLDEN[name] for answer in pair for x in (math.nan, *answer, math.nan)]
        return doubles(*numbers)

    log_probs = column("policy").requires_grad_()
    advantages = doubles(*GOLDEN["advantages"])[batch.sequence]
    weights, count = averaging(batch, average, 8)
    loss, _ = ppo_loss(log_probs, column("old"), advantages, weights)
    divergence, _ = kl_loss(log_probs, column("reference"), weights, "k3", column("old"))
    total = (loss + GOLDEN["beta"] * divergence) / count
    total.backward()
    golden = GOLDEN["grpo"][theirs]
    assert math.isclose(total.item(), golden["loss"], rel_tol=1e-9)
    gradients = doubles(*(x for answer in golden["gradients"] for x in answer))
    torch.testing.assert_close(log_probs.grad[batch.weights != 0], gradients)


def distributions(count=9):
    """Logits of a policy, log-probs of the reference and of the policy that drew the tokens."""
    generator = torch.Generator().manual_seed(1)
    logits, reference, old = torch.randn(3, count, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), reference.log_softmax(-1), old.log_softmax(-1)


def gradient(logits, loss):
    return torch.autograd.grad(loss, logits)[0]


def reverse_kl(logits, reference):
    policy = logits.log_softmax(-1)
    return (policy.exp() * (policy - reference)).sum()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_with_the_ratio_the_gradient_is_that_of_the_divergence_on_and_off_policy(estimator):
    """Over all tokens, each weighing as often as it is drawn: expectations without sampling."""
    logits, reference, old = distributions()
    for drawn_by in (old, logits.detach().log_softmax(-1)):
        loss, metrics = kl_loss(logits.log_softmax(-1), reference, drawn_by.exp(), estimator, drawn_by)
        torch.testing.assert_close(loss, reverse_kl(logits, reference))
        torch.testing.assert_close(gradient(logits, loss), gradient(logits, reverse_kl(logits, reference)))
        drift = (drawn_by.exp() * (logits.log_softmax(-1) - reference)).sum()
        torch.testing.assert_close(metrics["kl"], drift)


def test_without_the_ratio_only_k2_has_that_gradient():
    logits, reference, _ = distributions()
    policy = logits.log_softmax(-1)
    drawn = policy.detach().exp()
    wanted = gradient(logits, reverse_kl(logits, reference))
    forward = gradient(logits, (reference.exp() * (reference - logits.log_softmax(-1))).sum())
    got = {
        name: gradient(logits, kl_loss(logits.log_softmax(-1), reference, drawn, name)[0])
        for name in ("k1", "k2", "k3")
    }
    torch.testing.assert_close(got["k2"], wanted)
    torch.testing.assert_close(got["k3"], forward)
    torch.testing.assert_close(got["k1"], torch.zeros_like(wanted))
    assert not torch.allclose(forward, wanted, rtol=0.1)
