"""Intervals against published and recomputed values."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import binomtest, ttest_1samp

from gmpo.statistics import (
    detectable_mean,
    paired_t_interval,
    sign_flip_p_value,
    wilson_interval,
)


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


def test_the_paired_t_interval_has_hand_computed_values():
    # Mean 2, s = 1, n = 3: 2 +- 4.3027 * 1 / sqrt(3) = 2 +- 2.4841.
    assert paired_t_interval([1, 2, 3]) == pytest.approx((-0.4841, 4.4841), abs=5e-5)
    assert paired_t_interval([0.5, 0.5, 0.5]) == (0.5, 0.5)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=12))
def test_the_paired_t_interval_is_scipys(differences):
    assume(np.std(differences) > 1e-6)
    expected = ttest_1samp(differences, 0).confidence_interval(0.95)
    assert paired_t_interval(differences) == pytest.approx(tuple(expected), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        # All of one sign: only that choice and its mirror are as far out, 2 of 2^n.
        ([1, 2], 0.5),
        ([1, 2, 3], 0.25),
        ([0.1, 5, 2, 1, 4], 2 / 32),
        # Sum 2 of +-1 +-1 +-2: |sum| >= 2 for 4, 2, 2, and their mirrors: 6 of 8.
        ([1, -1, 2], 0.75),
        ([0, 0], 1.0),
        ([1, -1], 1.0),
        # A pair without a difference takes no part: as [1, 2].
        ([1, 0, 2], 0.5),
    ],
)
def test_the_sign_flip_p_is_the_share_of_sign_choices_as_far_out(differences, p):
    assert sign_flip_p_value(differences) == p


@given(
    st.lists(st.sampled_from([-2.5, -1.1, -0.3, 0.0, 0.3, 0.7, 1.1, 4.0]), min_size=2, max_size=9)
)
def test_the_sign_flip_p_is_that_of_trying_every_choice(differences):
    seen = abs(math.fsum(differences)) - 1e-9
    sums = [
        abs(math.fsum(sign * d for sign, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    assert sign_flip_p_value(differences) == sum(s >= seen for s in sums) / len(sums)


def test_forty_pairs_are_counted_out():
    p = sign_flip_p_value([1.0] * 22 + [-1.0] * 18)
    # Sums of +-1: twice the binomial tail of 22 or more heads in 40.
    assert p == pytest.approx(2 * binomtest(22, 40, alternative="greater").pvalue)
    with pytest.raises(ValueError, match="41 pairs"):
        sign_flip_p_value([1.0] * 41)


@pytest.mark.parametrize("function", [paired_t_interval, sign_flip_p_value])
@pytest.mark.parametrize("differences", [[], [1.0], [1.0, math.nan], [1.0, math.inf]])
def test_too_few_or_broken_differences_are_refused(function, differences):
    with pytest.raises(ValueError, match="at least two differences, all finite"):
        function(differences)


def test_the_detectable_mean_is_found_with_the_stated_power():
    # Ten pairs find one standard deviation with 80.3 % (any table of the paired t-test).
    assert detectable_mean(1.0, 10) == pytest.approx(0.996, abs=1e-3)
    assert detectable_mean(3.0, 10) == pytest.approx(3 * detectable_mean(1.0, 10))
    assert detectable_mean(0.0, 5) == 0
    draws = np.random.default_rng(0).normal(detectable_mean(1.0, 3), 1.0, size=(20_000, 3))
    found = np.mean([paired_t_interval(row)[0] > 0 for row in draws])
    assert found == pytest.approx(0.8, abs=0.01)  # standard error 0.003


def test_a_deviation_or_size_that_cannot_be_is_refused():
    for deviation, pairs in ((1.0, 1), (-1.0, 3), (math.nan, 3)):
        with pytest.raises(ValueError, match="at least 2 pairs and a deviation of 0 or more"):
            detectable_mean(deviation, pairs)
