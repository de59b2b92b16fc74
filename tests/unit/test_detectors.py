"""Detectors: the frozen baseline, the tests over it, and where a drift began."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmpo.detectors import (
    Baseline,
    cumulative_sum,
    drift_onset,
    drifts,
    robust_baseline,
    scaled,
    tail_decades,
)

FINITE = st.floats(min_value=-1e6, max_value=1e6)


def stream(seed: int, *, rounds: int = 300, tails: bool = False) -> np.ndarray:
    """A healthy stream, normal or with Student's t at 2.5 degrees of freedom."""
    chance = np.random.default_rng(seed)
    return chance.standard_t(2.5, rounds) if tails else chance.standard_normal(rounds)


def z_of(values: np.ndarray, *, warm: int = 20) -> np.ndarray:
    return scaled(values, robust_baseline(values[:warm], smallest_scale=1e-3))


def test_the_baseline_is_median_and_scaled_median_deviation():
    # median of 1 2 3 4 100 is 3; deviations 2 1 0 1 97, their median 1; 1 * 1.4826
    baseline = robust_baseline([1, 2, 3, 4, 100], smallest_scale=0.1)
    assert baseline == Baseline(center=3.0, scale=pytest.approx(1.4826))


def test_equal_values_take_the_smallest_scale():
    assert robust_baseline([5.0] * 9, smallest_scale=0.25) == Baseline(center=5.0, scale=0.25)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_a_baseline_of_nothing_or_of_what_is_not_finite_is_refused(values: list[float]):
    with pytest.raises(ValueError, match="a baseline needs finite values"):
        robust_baseline(values, smallest_scale=0.1)


def test_a_smallest_scale_of_0_is_refused():
    with pytest.raises(ValueError, match="smallest scale above 0"):
        robust_baseline([1.0], smallest_scale=0.0)


def test_scaling_counts_deviations_and_cuts_at_4():
    baseline = Baseline(center=10.0, scale=2.0)
    assert scaled([10, 12, 7, 100, -100], baseline).tolist() == [0, 1, -1.5, 4, -4]


@given(st.lists(FINITE, min_size=1, max_size=50), FINITE, st.floats(min_value=0.01, max_value=100))
def test_scaling_does_not_depend_on_the_unit(values: list[float], shift: float, factor: float):
    plain = scaled(values, robust_baseline(values, smallest_scale=1.0))
    moved = [shift + factor * value for value in values]
    other = scaled(moved, robust_baseline(moved, smallest_scale=factor))
    # Values near 1e6 lose nine digits when a number as large is added to them.
    np.testing.assert_allclose(other, plain, atol=1e-4)


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("tails", [False, True])
def test_healthy_streams_seldom_drift(direction: str, tails: bool):
    alarms = sum(
        drifts(z_of(stream(seed, tails=tails), warm=100), direction=direction) is not None
        for seed in range(60)
    )
    assert alarms <= 3


@pytest.mark.parametrize(("direction", "sign"), [("up", 1), ("down", -1)])
def test_a_shift_is_found_in_its_direction_only(direction: str, sign: int):
    other = "down" if direction == "up" else "up"
    for seed in range(20):
        values = stream(seed, rounds=50)
        values[20:] += sign * 6
        assert drifts(z_of(values), direction=direction) is not None
        assert drifts(z_of(values), direction=other) is None


def test_a_large_shift_is_found_within_twelve_values():
    for seed in range(20):
        values = stream(seed, rounds=32)
        values[20:] -= 8
        assert drifts(z_of(values), direction="down") == "Page-Hinkley"


def test_a_shift_that_page_hinkley_swallows_is_found_by_adwin():
    # 0.4 deviations are below Page-Hinkley's delta of 0.5: its sum never grows.
    z = np.concatenate([np.tile([0.1, -0.1], 400), np.tile([0.5, 0.3], 400)])
    assert drifts(z, direction="up") == "ADWIN"
    assert drifts(z, direction="down") is None


def test_the_onset_is_where_values_began_to_lie_beyond():
    z = [0.1, -0.2, 0.3, 0.0, 3.0, 2.5, 4.0]
    assert drift_onset(z, direction="up") == 4
    assert drift_onset([-value for value in z], direction="down") == 4


def test_one_outlier_long_ago_is_not_the_onset():
    assert drift_onset([4.0, 0, 0, 0, 0, 0, 4.0, 4.0], direction="up") == 6


def test_an_onset_without_values_is_refused():
    with pytest.raises(ValueError, match="at least one value"):
        drift_onset([], direction="up")


def test_a_cumulative_sum_forgets_what_lies_the_other_way():
    # 0 + 2 - 0.5 = 1.5; 1.5 - 3 - 0.5 is below 0; 0 + 1 - 0.5 = 0.5
    total = cumulative_sum(0.0, 2.0, direction="up")
    assert total == 1.5
    total = cumulative_sum(total, -3.0, direction="up")
    assert total == 0.0
    assert cumulative_sum(total, 1.0, direction="up") == 0.5
    assert cumulative_sum(0.0, -2.0, direction="down", allowance=1.0) == 1.0


def test_decades_of_a_sum_bound_how_often_it_gets_there():
    # exp(-2 0.5 ln 10) is one in ten.
    assert tail_decades(np.log(10)) == pytest.approx(1.0)
    chance = np.random.default_rng(0)
    total, reached = 0.0, np.zeros(3)
    for z in chance.standard_normal(100_000):
        total = cumulative_sum(total, float(z), direction="up")
        reached += tail_decades(total) >= np.array([1.0, 2.0, 3.0])
    shares = reached / 100_000
    assert (shares <= [0.1, 0.01, 0.001]).all()
    assert shares[1] > 0.001
