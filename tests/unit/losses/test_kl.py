"""Estimators by hand and in expectation; the controller by hand."""

import math

import pytest
import torch

from burnish.losses.kl import ESTIMATORS, KLController


@pytest.mark.parametrize(
    ("difference", "values"),
    [(0.3, {"k1": 0.3, "k2": 0.045, "k3": 0.0408182}), (-0.5, {"k1": -0.5, "k2": 0.125, "k3": 0.1487213})],
)
def test_values_by_hand(difference, values):
    log_probs = torch.tensor([-1.0 + difference], dtype=torch.float64)
    for name, value in values.items():
        got = ESTIMATORS[name](log_probs, torch.tensor([-1.0], dtype=torch.float64))
        assert math.isclose(got.item(), value, abs_tol=1e-7)


def test_k1_and_k3_are_unbiased_and_k2_and_k3_are_never_negative():
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 50, generator=generator, dtype=torch.float64).log_softmax(-1)
    divergence = (policy.exp() * (policy - reference)).sum()
    for name in ("k1", "k3"):
        torch.testing.assert_close((policy.exp() * ESTIMATORS[name](policy, reference)).sum(), divergence)
    for name in ("k2", "k3"):
        assert (ESTIMATORS[name](policy, reference) >= 0).all()


def test_k3_keeps_its_digits_for_policies_that_nearly_agree():
    small = torch.tensor([1e-4], dtype=torch.float32)
    assert math.isclose(ESTIMATORS["k3"](small, torch.zeros(1)).item(), 5e-9, rel_tol=0.02)


@pytest.mark.parametrize(("kl", "beta"), [(3.0, 0.148464), (6.0, 0.15), (12.0, 0.151536), (6.6, 0.150768)])
def test_controller_by_hand(kl, beta):
    controller = KLController(0.15, target=6.0)
    controller.update(kl, 512)
    assert math.isclose(controller.beta, beta, abs_tol=1e-9)


def test_without_a_target_beta_stays():
    controller = KLController(0.05)
    controller.update(100.0, 512)
    assert controller.beta == 0.05
    controller.restore(KLController(0.2).state())  # a run that goes on with another kl.beta
    assert controller.beta == 0.05


def test_a_restored_controller_continues_to_the_bit():
    straight, first = KLController(0.1, 2.0, 500), KLController(0.1, 2.0, 500)
    for kl in (1.0, 2.2, 9.0):
        straight.update(kl, 64)
        first.update(kl, 64)
    second = KLController(0.1, 2.0, 500)
    second.restore(first.state())
    for kl in (0.5, 2.1):
        straight.update(kl, 64)
        second.update(kl, 64)
    assert second.beta == straight.beta
