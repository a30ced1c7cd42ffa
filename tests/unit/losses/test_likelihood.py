"""Cross-entropy against its definition in float64, and silence of masked positions."""

import math

import torch

from burnish.losses.likelihood import cross_entropy


def test_value_by_hand():
    log_probs = torch.tensor([0.5, 0.25, 0.125]).log()
    loss, metrics = cross_entropy(log_probs, torch.tensor([1.0, 0.0, 2.0]), torch.tensor([True, True, False]))
    assert math.isclose(loss.item(), math.log(2) + 2 * math.log(8), rel_tol=1e-6)
    assert metrics["mean_token_accuracy"].item() == 1.0


def test_poisoned_masked_positions_change_neither_loss_nor_gradient():
    log_probs = torch.tensor([-1.0, float("nan"), float("-inf"), -2.0], requires_grad=True)
    loss, _ = cross_entropy(log_probs, torch.tensor([1.0, 0.0, 0.0, 0.5]), torch.zeros(4, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 2.0
    assert log_probs.grad.tolist() == [-1.0, 0.0, 0.0, -0.5]
