"""What every listed loss must do; listing one in `LOSSES` tests it here."""

import pytest
import torch

from burnish.losses import likelihood

LOSSES = {f"likelihood.{name}": loss for name, loss in likelihood.LOSSES.items()}
"""Losses of one signature: (log_probs [T], weights [T], correct [T]) -> (sum, {name: sum})."""

every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def inputs(count: int = 12, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    log_probs = -torch.rand(count, generator=generator, dtype=torch.float64).mul(5).to(dtype)
    weights = torch.tensor([0.0, 1.0, 0.5] * (count // 3), dtype=dtype)
    return log_probs, weights, torch.rand(count, generator=generator) < 0.5


@every_loss
def test_sums_add_up_over_any_cut(loss):
    log_probs, weights, correct = inputs()
    whole, metrics = loss(log_probs, weights, correct)
    parts = [loss(log_probs[part], weights[part], correct[part]) for part in (slice(0, 5), slice(5, 6), slice(6, 12))]
    torch.testing.assert_close(sum(part for part, _ in parts), whole)
    for name, value in metrics.items():
        torch.testing.assert_close(sum(named[name] for _, named in parts), value)


@every_loss
def test_gradient_is_the_numerical_one(loss):
    log_probs, weights, correct = inputs()
    assert torch.autograd.gradcheck(lambda x: loss(x, weights, correct)[0], log_probs.requires_grad_())


@every_loss
def test_poisoned_positions_without_weight_change_nothing(loss):
    log_probs, weights, correct = inputs()
    clean, metrics = loss(log_probs, weights, correct)
    for poison in (float("nan"), float("inf"), float("-inf")):
        poisoned = log_probs.where(weights != 0, poison).requires_grad_()
        value, poisoned_metrics = loss(poisoned, weights, correct)
        value.backward()
        assert torch.equal(value, clean)
        assert torch.isfinite(poisoned.grad).all()
        assert all(torch.equal(poisoned_metrics[name], metric) for name, metric in metrics.items())


@every_loss
def test_extreme_log_probs_keep_a_finite_gradient(loss):
    _, weights, correct = inputs(dtype=torch.float32)
    log_probs = torch.full((12,), -1e30, requires_grad=True)
    loss(log_probs, weights, correct)[0].backward()
    assert torch.isfinite(log_probs.grad).all()


@every_loss
def test_nothing_to_score_is_zero(loss):
    log_probs, weights, correct = inputs()
    value, metrics = loss(log_probs, weights * 0, correct)
    assert value == 0
    assert all(metric == 0 for metric in metrics.values())
