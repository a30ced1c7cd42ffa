"""Rounding by chance: its random numbers, its mean, and the training that it saves."""

import pytest
import torch
from torch import nn

from burnish.optim.adamw import AdamW
from burnish.optim.rounding import philox, round_by_chance


def test_random_numbers_are_philox() -> None:
    """The authors' known answer for key and counter 0, from Random123's kat_vectors."""
    words = philox((0, 0), torch.zeros(1, dtype=torch.int64), 0, 0)
    assert [f"{int(word):08x}" for word in words] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


@pytest.mark.parametrize("value", [1.001, -3.0007, 2.0**-130 * 1.003, 1e30, -0.1])
def test_each_is_one_of_two_neighbours_and_the_mean_is_the_value(value: float) -> None:
    values = torch.full((40_000,), value)
    rounded = round_by_chance(values, 3, (1, 2), 0).float()
    unit = 2.0 ** (torch.tensor(value).abs().log2().floor().clamp(min=-126).item() - 7)
    assert len(rounded.unique()) == 2
    assert ((rounded.double() - values.double()).abs() < unit).all()
    # Five deviations of the mean of 40,000 draws, each with a deviation of half the unit at most.
    assert abs(rounded.double().mean() - values[0].double()).item() < 5 * 0.5 * unit / 200


def test_what_bf16_can_hold_stays_as_it_is() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    assert torch.equal(round_by_chance(values, 3, (1, 2), 0).float(), values)


def test_it_does_not_depend_on_how_a_tensor_is_cut() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    whole = round_by_chance(values, 3, (1, 2), 0)
    parts = [round_by_chance(values[:328], 3, (1, 2), 0), round_by_chance(values[328:], 3, (1, 2), 328)]
    assert torch.equal(torch.cat(parts), whole)


def test_key_tensor_and_step_each_change_it() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    keys = [(3, (1, 2)), (4, (1, 2)), (3 + 2**32, (1, 2)), (3, (2, 2)), (3, (1, 3))]
    drawn = [round_by_chance(values, key, counter, 0) for key, counter in keys]
    assert all(not torch.equal(drawn[0], other) for other in drawn[1:])
    assert torch.equal(drawn[0], round_by_chance(values, 3, (1, 2), 0))


def test_what_rounding_to_the_nearest_loses_is_kept_on_average() -> None:
    """Steps of 1e-4 of a weight, a fortieth of what bf16 can tell apart: lost one by one, yet 2 % after 200."""
    steps, lr = 200, 1e-4
    weight, fp32 = nn.Parameter(torch.ones(64, 64).bfloat16()), nn.Parameter(torch.ones(64, 64))
    nearest = torch.ones(64, 64).bfloat16()
    ours = AdamW([{"params": [weight]}], lr, (0.9, 0.999), 1e-8, False, 11)
    theirs = torch.optim.AdamW([fp32], lr, weight_decay=0.0)
    for _ in range(steps):
        weight.grad, fp32.grad = torch.ones(64, 64).bfloat16(), torch.ones(64, 64)
        before = fp32.detach().clone()
        ours.step()
        theirs.step()
        nearest += (fp32.detach() - before).bfloat16()
    assert torch.equal(nearest, torch.ones(64, 64).bfloat16())
    assert fp32.mean().item() == pytest.approx(1 - steps * lr, abs=1e-5)
    # 200 draws with a deviation of sqrt(1e-4 * 2^-8) each, over 4,096 weights: 1.4e-4 for the mean.
    assert weight.detach().double().mean().item() == pytest.approx(fp32.detach().double().mean().item(), abs=5e-4)
