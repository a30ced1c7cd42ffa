"""Schedules: values worked out by hand, and what they must all have in common."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from burnish.optim.schedule import SHAPES, multiplier


def test_warm_up_rises_in_equal_parts_and_first_step_learns():
    assert [multiplier(s, 100, "constant", warmup=4) for s in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_warm_up_below_one_is_a_share_of_the_steps():
    assert multiplier(0, 100, "linear", warmup=0.1) == pytest.approx(0.1)
    assert multiplier(10, 100, "linear", warmup=0.1) == 1.0


def test_values_by_hand():
    assert multiplier(5, 10, "linear", warmup=0) == 0.5
    assert multiplier(5, 10, "cosine", warmup=0) == pytest.approx(0.5)
    assert multiplier(2, 8, "cosine", warmup=0) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert [multiplier(s, 10, "wsd", warmup=0, decay=0.4) for s in (0, 5, 6, 8, 9)] == pytest.approx(
        [1, 1, 1, 0.5, 0.25]
    )


@given(st.sampled_from(sorted(SHAPES)), st.integers(1, 300), st.floats(0, 0.9))
def test_every_shape_stays_in_range_and_never_rises_after_warm_up(shape, steps, warmup):
    values = [multiplier(step, steps, shape, warmup) for step in range(steps)]
    assert all(0 < value <= 1 for value in values)
    after = values[round(warmup * steps) :]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(after))
