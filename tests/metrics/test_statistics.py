import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.metrics.statistics import bootstrap_interval, sign_test, t_interval, value_at_l0


def test_t_interval_by_hand():
    # Values 1, 2, 3: mean 2, standard error 1 / sqrt 3, t at 97.5 % with 2 degrees of freedom 4.302653.
    found = t_interval([1.0, 2.0, 3.0])
    assert found.mean == 2 and found.n == 3
    assert found.high - 2 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert 2 - found.low == pytest.approx(found.high - 2)


def test_t_interval_covers_the_true_mean_as_often_as_its_confidence():
    samples = np.random.default_rng(0).normal(5.0, 2.0, size=(2000, 4))
    covered = [found.low <= 5 <= found.high for found in map(t_interval, samples)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.02)


def test_bootstrap_agrees_with_the_t_interval_on_many_values_and_repeats_with_its_seed():
    values = np.random.default_rng(1).normal(3.0, 1.0, size=2000)
    found, t = bootstrap_interval(values, seed=0), t_interval(values)
    assert found.mean == pytest.approx(t.mean)
    assert (found.low, found.high) == pytest.approx((t.low, t.high), abs=0.01)
    assert bootstrap_interval(values, seed=0) == found
    assert bootstrap_interval(values, seed=1) != found


def test_bootstrap_takes_another_statistic():
    found = bootstrap_interval([1.0, 2.0, 3.0, 4.0, 100.0], seed=0, statistic=np.median)
    assert found.mean == 3
    assert 1 <= found.low <= found.high <= 100


def test_sign_test_by_hand():
    assert sign_test([-1.0] * 8) == pytest.approx(2 / 2**8)
    assert sign_test([1.0, -1.0, 0.0]) == 1.0
    assert sign_test([0.0, 0.0]) == 1.0
    assert sign_test([1.0] * 7 + [-1.0]) == pytest.approx(2 * (1 + 8) / 2**8)


def test_a_curve_is_read_linearly_in_log_l0_and_never_beyond_its_ends():
    l0, nmse = [64.0, 16.0], [0.1, 0.3]
    assert value_at_l0(l0, nmse, at=32.0) == pytest.approx(0.2)
    assert value_at_l0(l0, nmse, at=16.0) == pytest.approx(0.3)
    assert value_at_l0(l0, nmse, at=64.0) == pytest.approx(0.1)
    assert value_at_l0(l0, nmse, at=15.9) is None
    assert value_at_l0(l0, nmse, at=64.1) is None


@settings(max_examples=50, deadline=None)
@given(
    l0=st.lists(st.floats(0.1, 1000), min_size=2, max_size=8, unique=True),
    slope=st.floats(-5, 5),
    at=st.floats(0.1, 1000),
)
def test_curves_that_are_linear_in_log_l0_are_read_exactly(l0: list[float], slope: float, at: float):
    found = value_at_l0(l0, [slope * math.log(x) + 1 for x in l0], at)
    if min(l0) <= at <= max(l0):
        assert found == pytest.approx(slope * math.log(at) + 1, abs=1e-6)
    else:
        assert found is None


@pytest.mark.parametrize(
    "call",
    [
        lambda: t_interval([1.0]),
        lambda: t_interval([1.0, math.nan]),
        lambda: value_at_l0([1.0, 2.0], [1.0], 1.0),
        lambda: value_at_l0([0.0, 1.0], [1.0, 2.0], 0.5),
        lambda: value_at_l0([1.0, 1.0], [1.0, 2.0], 1.0),
    ],
)
def test_values_that_allow_no_answer_are_refused(call):
    with pytest.raises(ValueError):
        call()
