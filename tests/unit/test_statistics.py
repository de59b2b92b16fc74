"""Intervals against published and recomputed values."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from gmpo.statistics import wilson_interval


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # Newcombe (1998), Statistics in Medicine 17, table I: the score method without correction.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilsons_interval_has_the_published_values(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


@given(
    trials=st.integers(1, 2000),
    share=st.floats(0, 1),
    confidence=st.sampled_from([0.5, 0.8, 0.95, 0.99]),
)
def test_wilsons_interval_equals_scipys(trials, share, confidence):
    successes = round(share * trials)
    expected = binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    interval = wilson_interval(successes, trials, confidence=confidence)
    assert interval == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= interval[0] <= successes / trials <= interval[1] <= 1


def test_no_successes_by_hand():
    # With z = 1.959964 and no success of n the upper end is z^2 / (n + z^2).
    z_squared = 1.959963984540054**2
    low, high = wilson_interval(0, 10)
    assert low == pytest.approx(0.0, abs=1e-15)
    assert high == pytest.approx(z_squared / (10 + z_squared), abs=1e-12)


def test_successes_and_failures_mirror_each_other():
    low, high = wilson_interval(3, 17)
    mirrored_low, mirrored_high = wilson_interval(14, 17)
    assert (1 - high, 1 - low) == pytest.approx((mirrored_low, mirrored_high), abs=1e-12)


def test_four_times_the_trials_halve_the_width():
    width = math.dist(*[[end] for end in wilson_interval(5000, 10_000)])
    wider = math.dist(*[[end] for end in wilson_interval(1250, 2500)])
    assert wider / width == pytest.approx(2.0, rel=1e-3)


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (-1, 5), (6, 5)])
def test_impossible_counts_are_refused_with_their_values(successes, trials):
    with pytest.raises(ValueError, match=f"got {successes} of {trials}"):
        wilson_interval(successes, trials)
