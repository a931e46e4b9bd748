"""Intervals of paired differences against scipy, and how many pairs would tell."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from know_cli.choosing.intervals import difference, pairs_to_tell


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=20))
def test_the_interval_is_that_of_a_t_test(values: list[float]) -> None:
    found = difference(values)
    assert found.mean == pytest.approx(np.mean(values), abs=1e-9)
    if np.std(values) > 1e-6:
        low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((low, high), abs=1e-6)


@pytest.mark.parametrize("values", [[], [1.0]])
def test_fewer_than_two_pairs_tell_nothing(values: list[float]) -> None:
    found = difference(values)
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert found.includes_zero
    assert pairs_to_tell(found) is None


@given(st.lists(st.floats(-10, 10), min_size=3, max_size=12))
def test_so_many_pairs_tell_and_one_fewer_does_not(values: list[float]) -> None:
    found = difference(values)
    pairs = pairs_to_tell(found)
    if pairs is None:
        return

    def tells(count: int) -> bool:
        half = stats.t.ppf(0.975, count - 1) * found.spread / math.sqrt(count)
        return bool(abs(found.mean) > half)

    assert tells(pairs)
    assert pairs == 2 or not tells(pairs - 1)
