"""The search for the coefficient at which an L1 crosscoder has a wanted number of active latents."""

import math

import pytest

from experiments.minder.common import next_coefficient


@pytest.mark.parametrize(("slope", "start"), [(-0.8, 0.3), (-1.5, 0.01), (-2.5, 0.4)])
def test_a_power_law_is_met_at_the_third_try(slope: float, start: float):
    def l0(mu: float) -> float:
        return 32 * (mu / 0.05) ** slope

    tried = [(start, l0(start))]
    while abs(tried[-1][1] / 32 - 1) > 0.1:
        tried.append((next_coefficient(tried, 32), 0.0))
        tried[-1] = (tried[-1][0], l0(tried[-1][0]))
        assert len(tried) <= 4
    assert tried[-1][0] == pytest.approx(0.05, rel=0.1)


def test_the_next_coefficient_lies_between_the_closest_on_both_sides():
    tried = [(0.01, 200.0), (0.1, 10.0), (0.04, 40.0), (0.4, 1.0)]
    assert 0.04 < next_coefficient(tried, 32) < 0.1
    assert next_coefficient(tried, 32) == pytest.approx(
        0.04 * (0.1 / 0.04) ** (math.log(40 / 32) / math.log(40 / 10)), rel=1e-3
    )


def test_a_dead_crosscoder_is_left_in_steps_of_eight_at_most():
    assert next_coefficient([(1.0, 0.0)], 32) == pytest.approx(1 / 8)
    assert next_coefficient([(0.001, 900.0)], 32) <= 0.008
