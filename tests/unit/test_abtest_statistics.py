"""Sequences, estimates, quantiles and shares against golden and hand-computed values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import betabinom, binom

from gmpo.abtest.estimates import UnitTotals, difference, mean_influence, paired_difference
from gmpo.abtest.planning import (
    difference_deviation,
    required_units,
    share_deviation,
    stopping_times,
)
from gmpo.abtest.quantiles import quantile, quantile_interval
from gmpo.abtest.ratio import check_ratio, log_bayes_factors
from gmpo.abtest.sequences import (
    Interval,
    boundary,
    empirical_bernstein,
    interval_difference,
    mixture_rho,
    sequential_p_value,
)


def arm(values: list[float]) -> UnitTotals:
    """One request a unit."""
    found = np.array(values, dtype=float)
    return UnitTotals(sums=found, counts=np.ones_like(found))


# gbstats 0.8.0, SequentialTwoSidedTTest(a, b, SequentialConfig(difference_type="absolute", ...))
# with SampleMeanStatistic(n=300, sum=210, sum_squares=210) and (n=320, sum=250, sum_squares=250);
# the third one's means have (n=1000, sum=1234.5, sum_squares=2000), (n=900, 1300, 2300).
@pytest.mark.parametrize(
    ("estimate", "error", "units", "alpha", "tuned_for", "interval", "p_value"),
    [
        (0.08125, 0.03518626033156424, 620, 0.05, 5000,
         (-0.0478468137096455, 0.21034681370964559), 0.3754013889746546),
        (0.08125, 0.03518626033156424, 620, 0.05, 1000,
         (-0.026335867077740036, 0.18883586707774014), 0.2653930399067072),
        (0.08125, 0.03518626033156424, 620, 0.01, 500,
         (-0.04450361283489737, 0.20700361283489746), 0.32372995237149405),
        (0.2099444444444445, 0.03159632990130243, 1900, 0.05, 1000,
         (0.1133273005957272, 0.30656158829316177), 4.094809133598823e-09),
    ],
)  # fmt: skip
def test_sequences_and_p_values_are_growthbooks(
    estimate, error, units, alpha, tuned_for, interval, p_value
):
    half = error * float(boundary(units, alpha=alpha, tuned_for=tuned_for))
    assert (estimate - half, estimate + half) == pytest.approx(interval, rel=1e-9)
    found = sequential_p_value(estimate / error, units, alpha=alpha, tuned_for=tuned_for)
    assert found == pytest.approx(p_value, rel=1e-9)


def test_a_difference_has_growthbooks_estimate_and_error():
    control = arm([1.0] * 210 + [0.0] * 90)
    candidate = arm([1.0] * 250 + [0.0] * 70)
    found = difference(control, candidate)
    assert found is not None
    assert found.estimate == pytest.approx(0.08125)
    assert found.standard_error == pytest.approx(0.03518626033156424, rel=1e-9)
    assert found.num_units == 620
    interval = found.interval(alpha=0.05, tuned_for=5000)
    assert (interval.low, interval.high) == pytest.approx(
        (-0.0478468137096455, 0.21034681370964559), rel=1e-9
    )


def test_rho_has_a_hand_computed_value():
    # -2 ln 0.05 = 5.9915; ln 6.9915 = 1.9447; sqrt(7.9362 / 1000) = 0.08909.
    assert mixture_rho(alpha=0.05, tuned_for=1000) == pytest.approx(0.08909, abs=5e-6)


@given(st.floats(0.01, 0.2), st.floats(50, 5000), st.floats(10, 50_000))
def test_the_p_value_is_alpha_where_the_sequence_ends(alpha, tuned_for, units):
    edge = float(boundary(units, alpha=alpha, tuned_for=tuned_for))
    p_value = sequential_p_value(edge, units, alpha=alpha, tuned_for=tuned_for)
    assert p_value == pytest.approx(alpha, rel=1e-6)


def test_the_boundary_is_narrowest_near_what_it_is_tuned_for():
    units = np.array([1000.0])
    narrow = boundary(units, alpha=0.05, tuned_for=1000)
    for other in (100, 10_000):
        assert boundary(units, alpha=0.05, tuned_for=other) > narrow


def test_requests_of_one_unit_are_evidence_together():
    # Two units of ten equal answers each are two observations, not twenty.
    one = UnitTotals(sums=np.array([10.0, 0.0, 10.0]), counts=np.array([10.0, 10.0, 10.0]))
    two = UnitTotals(sums=np.array([1.0, 0.0, 1.0]), counts=np.array([1.0, 1.0, 1.0]))
    other = arm([0.0, 1.0, 0.0])
    many, few = difference(one, other), difference(two, other)
    assert many is not None
    assert few is not None
    assert many.standard_error == pytest.approx(few.standard_error)


def test_the_influence_is_that_of_the_delta_method():
    sums, counts = np.array([2.0, 0.0, 3.0]), np.array([2.0, 1.0, 4.0])
    # Mean 5/7, average count 7/3.
    expected = (sums - 5 / 7 * counts) / (7 / 3)
    assert mean_influence(sums, counts) == pytest.approx(expected)
    assert mean_influence(sums, counts).sum() == pytest.approx(0)


def test_covariates_take_noise_away_and_leave_the_mean():
    rng = np.random.default_rng(0)
    before = [rng.normal(size=4000) for _ in range(2)]
    values = [
        x + rng.normal(0, 0.5, 4000) + shift for x, shift in zip(before, (0, 0.1), strict=True)
    ]
    arms = [
        UnitTotals(sums=y, counts=np.ones(4000), covariates=x)
        for x, y in zip(before, values, strict=True)
    ]
    adjusted = difference(*arms)
    plain = difference(*(UnitTotals(sums=a.sums, counts=a.counts) for a in arms))
    assert adjusted is not None
    assert plain is not None
    # Var(noise) / (Var(covariate) + Var(noise)) = 0.25 / 1.25.
    assert adjusted.variance_kept == pytest.approx(0.2, abs=0.02)
    assert adjusted.standard_error == pytest.approx(plain.standard_error * math.sqrt(0.2), rel=0.06)
    assert adjusted.estimate == pytest.approx(0.1, abs=4 * adjusted.standard_error)
    assert plain.variance_kept == 1


def test_units_without_a_covariate_stay_as_they_are():
    values = np.array([1.0, 2.0, 3.0])
    unknown = UnitTotals(sums=values, counts=np.ones(3), covariates=np.full(3, math.nan))
    plain = UnitTotals(sums=values, counts=np.ones(3))
    assert difference(unknown, unknown) == difference(plain, plain)


def test_pairs_cancel_what_both_models_find_hard():
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 1, 400)
    served, shadow = hard + rng.normal(0, 0.1, 400), hard + 0.05 + rng.normal(0, 0.1, 400)
    paired = paired_difference(shadow - served, np.arange(400))
    apart = difference(arm(list(served)), arm(list(shadow)))
    assert paired is not None
    assert apart is not None
    assert paired.standard_error < 0.15 * apart.standard_error
    assert paired.estimate == pytest.approx(apart.estimate)


def test_too_few_units_have_no_difference():
    assert difference(arm([1.0]), arm([0.0, 1.0])) is None
    assert paired_difference(np.array([1.0, 2.0]), np.array([0, 0])) is None
    alike = difference(arm([1.0, 1.0]), arm([1.0, 1.0]))
    assert alike is not None
    assert alike.interval(alpha=0.05, tuned_for=100) == Interval(low=-math.inf, high=math.inf)
    assert alike.p_value(alpha=0.05, tuned_for=100) == 1


def test_empirical_bernstein_holds_the_mean_and_shrinks():
    rng = np.random.default_rng(0)
    values = rng.beta(2, 5, (300, 1000))
    low, high = empirical_bernstein(values, alpha=0.05)
    missed = ((low > 2 / 7) | (high < 2 / 7)).any(axis=1)
    assert missed.mean() <= 0.05
    assert (high - low)[:, -1].max() < 0.08
    assert low[:, 0].min() == 0
    with pytest.raises(ValueError, match="between 0 and 1"):
        empirical_bernstein(np.array([0.5, 1.2]), alpha=0.05)


def test_an_interval_of_a_difference_has_the_outer_ends():
    found = interval_difference(Interval(low=0.1, high=0.3), Interval(low=0.2, high=0.6))
    assert (found.low, found.high) == pytest.approx((-0.1, 0.5))
    assert 0.0 in found
    assert 0.6 not in found


def test_a_quantile_is_the_smallest_value_that_enough_do_not_exceed():
    values = np.arange(1.0, 21.0)
    assert quantile(values, 0.95) == 19
    assert quantile(values, 0.951) == 20
    assert math.isnan(quantile(np.array([]), 0.5))


def test_the_sequence_of_a_quantile_holds_it_at_every_look():
    rng = np.random.default_rng(0)
    truth, missed = math.exp(1.6448536), 0
    for _ in range(60):
        values = np.exp(rng.normal(size=3000))
        for size in (200, 600, 1500, 3000):
            found = quantile_interval(
                values[:size], np.arange(size), level=0.95, alpha=0.05, tuned_for=1000
            )
            if truth not in found:
                missed += 1
                break
    assert missed <= 6
    assert found.high < 1.5 * truth


def test_the_bayes_factor_is_that_of_a_beta_binomial():
    counts = np.array([[620, 380]])
    odds = log_bayes_factors(counts, np.array([0.5, 0.5]))[0]
    expected = betabinom.logpmf(620, 1000, 5000, 5000) - binom.logpmf(620, 1000, 0.5)
    assert odds == pytest.approx(expected, rel=1e-6)


def test_wrong_shares_raise_an_alarm_and_right_ones_do_not():
    rng = np.random.default_rng(0)
    weights = {"control": 0.5, "candidate": 0.5}
    leak = check_ratio((rng.random(20_000) < 0.46).astype(int), weights)
    fair = check_ratio((rng.random(20_000) < 0.5).astype(int), weights)
    assert leak.alarm
    assert leak.alarm_unit is not None
    assert leak.alarm_unit < 20_000
    assert not fair.alarm
    assert sum(fair.counts.values()) == 20_000
    empty = check_ratio(np.array([], dtype=int), weights)
    assert (empty.alarm, empty.p_value) == (False, 1.0)


def test_the_number_of_units_finds_the_effect_with_the_power_asked_for():
    deviation = share_deviation(control=0.7, candidate=0.75, candidate_weight=0.5)
    # The variances of the two shares, 0.21 and 0.1875, over half of the units each.
    assert deviation == pytest.approx(math.sqrt(0.42 + 0.375))
    assert difference_deviation(control=1.0, candidate=1.0, candidate_weight=0.5) == 2
    units = required_units(0.05, deviation, alpha=0.05, tuned_for=4000, power=0.8)
    fewer = required_units(0.05, deviation, alpha=0.05, tuned_for=4000, power=0.5)
    assert fewer < units
    edge = float(boundary(fewer, alpha=0.05, tuned_for=4000))
    assert 0.05 * math.sqrt(fewer) / deviation == pytest.approx(edge, rel=1e-2)
    times = stopping_times(0.05, deviation, alpha=0.05, tuned_for=4000, looks=(100, units))
    assert times.power >= 0.8
    assert times.median_units < units


def test_impossible_plans_are_refused():
    for effect, deviation, power in ((0.0, 1.0, 0.8), (0.1, 0.0, 0.8), (0.1, 1.0, 1.0)):
        with pytest.raises(ValueError, match="effect other than 0"):
            required_units(effect, deviation, alpha=0.05, tuned_for=100, power=power)
    with pytest.raises(ValueError, match="look for a larger effect"):
        required_units(1e-6, 1.0, alpha=0.05, tuned_for=100, power=0.8)
