"""Intervals and tests against published, hand-computed and recomputed values."""

import itertools
import math
import statistics

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import binomtest, ttest_1samp
from scipy.stats import t as student_t

from gmpo.statistics import (
    average_interval,
    bootstrap_interval,
    crossed_interval,
    detectable_mean,
    holm,
    mcnemar,
    paired_bootstrap,
    paired_t_interval,
    pass_at_k,
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


def test_the_crossed_interval_has_hand_computed_values():
    # Row means 1.5 and 3.5: 2 / 2 = 1. Column means 2 and 3: 0.5 / 2 = 0.25. Together 1.25 with
    # 1.25^2 / (1 + 0.0625) = 1.4706 degrees of freedom, whose t is 6.2053.
    table = np.array([[1.0, 2.0], [3.0, 4.0]])
    half = student_t.ppf(0.975, 1.25**2 / 1.0625) * math.sqrt(1.25)
    assert crossed_interval(table) == pytest.approx((2.5 - half, 2.5 + half))
    assert crossed_interval(np.full((2, 3), 0.5)) == (0.5, 0.5)


def test_the_crossed_interval_without_a_column_effect_is_that_of_the_rows():
    rows = np.array([1.0, 2.0, 3.0])
    table = np.repeat(rows[:, None], 5, axis=1)
    assert crossed_interval(table) == pytest.approx(paired_t_interval(list(rows)))
    assert crossed_interval(table.T) == pytest.approx(paired_t_interval(list(rows)))


def test_the_crossed_interval_covers_where_rows_alone_would_not():
    rng = np.random.default_rng(0)
    covered = by_rows = 0
    for _ in range(400):
        seeds, items = rng.normal(0, 0.2, (5, 1)), rng.normal(0, 1.0, (1, 30))
        table = seeds + items + rng.normal(0, 0.5, (5, 30))
        low, high = crossed_interval(table)
        covered += low <= 0 <= high
        low, high = paired_t_interval(list(table.mean(axis=1)))
        by_rows += low <= 0 <= high
    assert covered >= 0.93 * 400
    assert by_rows < 0.85 * 400


@pytest.mark.parametrize(
    "table", [np.ones((1, 5)), np.ones((5, 1)), np.ones(4), [[1, math.nan]] * 2]
)
def test_a_table_that_says_nothing_about_chance_is_refused(table):
    with pytest.raises(ValueError, match="at least two rows and two columns"):
        crossed_interval(np.asarray(table, dtype=float))


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


@pytest.mark.parametrize(
    ("correct", "samples", "k", "expected"),
    [
        (2, 5, 1, 2 / 5),
        # Of the C(5, 2) = 10 pairs, C(3, 2) = 3 hold no right one.
        (2, 5, 2, 1 - 3 / 10),
        # Only two are wrong, so every choice of 3 holds a right one.
        (3, 5, 3, 1.0),
        (0, 5, 5, 0.0),
        (1, 4, 3, 3 / 4),
    ],
)
def test_pass_at_k_has_the_hand_computed_values(correct, samples, k, expected):
    found = pass_at_k(num_correct=correct, num_samples=samples, k=k)
    assert found == pytest.approx(expected, abs=1e-15)


@given(data=st.data(), samples=st.integers(1, 8))
def test_pass_at_k_is_the_share_of_choices_that_hold_a_right_one(data, samples):
    correct, k = data.draw(st.integers(0, samples)), data.draw(st.integers(1, samples))
    outcomes = [place < correct for place in range(samples)]
    choices = list(itertools.combinations(outcomes, k))
    expected = sum(any(choice) for choice in choices) / len(choices)
    found = pass_at_k(num_correct=correct, num_samples=samples, k=k)
    assert found == pytest.approx(expected, abs=1e-15)


def test_pass_at_k_is_unbiased():
    # The mean over all draws of n = 6 from a coin of probability p is 1 - (1 - p)^k.
    p, n, k = 0.3, 6, 4
    mean = sum(
        math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(num_correct=c, num_samples=n, k=k)
        for c in range(n + 1)
    )
    assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


def test_pass_at_k_of_many_samples_neither_overflows_nor_cancels():
    # 1 - C(9999, 5000) / C(10000, 5000) = 1 - 5000 / 10000.
    assert pass_at_k(num_correct=1, num_samples=10_000, k=5000) == 0.5


@pytest.mark.parametrize(
    ("correct", "samples", "k"), [(1, 4, 5), (1, 4, 0), (5, 4, 1), (-1, 4, 1), (0, 0, 1)]
)
def test_pass_at_k_refuses_what_cannot_be_chosen(correct, samples, k):
    with pytest.raises(
        ValueError, match=f"got {correct} correct of {samples} samples and k = {k}; draw more"
    ):
        pass_at_k(num_correct=correct, num_samples=samples, k=k)


def test_the_bootstrap_interval_is_that_of_all_resamples():
    # Of 0, 0, 1 with replacement the 27 resamples have mean 0, 1/3, 2/3, 1 in 8, 12, 6, 1 cases,
    # so 2.5 % lies at 0 (8/27) and 97.5 % at 1 (26/27 = 0.963 lie below it).
    assert bootstrap_interval([0.0, 0.0, 1.0]) == (0.0, 1.0)
    # At 90 %: 5 % at 0, and 95 % at 2/3, as 26/27 lie at or below it.
    found = bootstrap_interval([0.0, 0.0, 1.0], confidence=0.9)
    assert found == pytest.approx((0.0, 2 / 3))


def test_many_values_have_the_normal_interval():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=2000).tolist()
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(2000)
    found = bootstrap_interval(values)
    # 10,000 resamples place an end to about 0.04 standard errors.
    assert found == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.15 * error)


def test_repeats_of_an_item_add_no_evidence_when_clustered():
    values = np.random.default_rng(2).binomial(1, 0.4, size=60).astype(float).tolist()
    alone = bootstrap_interval(values)
    repeated = [value for value in values for _ in range(9)]
    items = [item for item in range(60) for _ in range(9)]
    assert bootstrap_interval(repeated, clusters=items) == pytest.approx(alone)
    low, high = bootstrap_interval(repeated)
    # Taken for independent, nine times the values make it a third as wide.
    assert (high - low) / (alone[1] - alone[0]) == pytest.approx(1 / 3, rel=0.15)


def test_clusters_count_by_their_size():
    # Clusters {1, 1, 1} and {0}: their means over resamples are 1, 3/4 (twice) and 0.
    low, high = bootstrap_interval([1, 1, 1, 0], clusters=list("aaab"), confidence=0.4)
    assert (low, high) == (0.75, 0.75)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=30), st.integers(0, 5))
def test_the_same_seed_gives_the_same_interval_and_shifts_move_it(values, seed):
    low, high = bootstrap_interval(values, seed=seed, num_resamples=200)
    assert (low, high) == bootstrap_interval(values, seed=seed, num_resamples=200)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    moved = bootstrap_interval([value + 7 for value in values], seed=seed, num_resamples=200)
    assert moved == pytest.approx((low + 7, high + 7), abs=1e-9)


def test_an_interval_drawn_in_parts_covers_as_often_as_it_claims():
    # 300 data sets of 40 coins: coverage of 95 % +- 3 standard errors (1.26 points each), less
    # the points that the percentile interval is known to lack at 40.
    generator = np.random.default_rng(3)
    covered = 0
    for _ in range(300):
        low, high = bootstrap_interval(
            generator.binomial(1, 0.5, size=40).astype(float).tolist(), num_resamples=400
        )
        covered += low <= 0.5 <= high
    assert 0.89 <= covered / 300 <= 0.99


def test_draws_in_several_parts_make_as_many_resamples(monkeypatch):
    monkeypatch.setattr("gmpo.statistics._CELLS_AT_ONCE", 10)
    whole = paired_bootstrap(baseline=[0.0] * 3, candidate=[1.0] * 3, num_resamples=99)
    assert whole.p_value == pytest.approx(2 / 100)


def test_a_paired_bootstrap_resamples_pairs():
    # Both sides vary widely and alike; every pair differs by exactly 0.1.
    baseline = [float(value) for value in range(30)]
    found = paired_bootstrap(baseline=baseline, candidate=[value + 0.1 for value in baseline])
    assert found.difference == pytest.approx(0.1)
    assert found.interval == pytest.approx((0.1, 0.1))
    assert found.p_value == pytest.approx(2 / 10_001)


def test_a_paired_bootstraps_sign_follows_the_candidate():
    baseline, candidate = [0, 0, 1, 0, 1] * 8, [1, 0, 1, 1, 0] * 8
    forth = paired_bootstrap(baseline=baseline, candidate=candidate)
    back = paired_bootstrap(baseline=candidate, candidate=baseline)
    # Two of five gained, one of five lost.
    assert forth.difference == pytest.approx(0.2)
    assert back.difference == pytest.approx(-0.2)
    low, high = forth.interval
    assert back.interval == pytest.approx((-high, -low))
    assert back.p_value == pytest.approx(forth.p_value)


def test_equal_sides_show_no_difference():
    found = paired_bootstrap(baseline=[0, 1, 1], candidate=[0, 1, 1])
    assert (found.difference, found.interval, found.p_value) == (0.0, (0.0, 0.0), 1.0)


def test_a_paired_bootstrap_rejects_as_often_as_it_says_without_a_difference():
    generator = np.random.default_rng(4)
    rejected = 0
    for _ in range(300):
        one, other = generator.binomial(1, 0.3, size=(2, 60)).tolist()
        found = paired_bootstrap(baseline=one, candidate=other, num_resamples=400)
        rejected += found.p_value < 0.05
    # 5 % of 300 is 15, with standard error 3.8; four of them either way.
    assert 1 <= rejected <= 30


def test_clustered_pairs_are_drawn_by_item():
    baseline, candidate = [0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0]
    items = list("aaabbb")
    # Two items, +1 and -1: resampled differences are -1, 0, 0, 1 in quarters.
    found = paired_bootstrap(baseline=baseline, candidate=candidate, clusters=items)
    assert found.interval == (-1.0, 1.0)
    assert found.p_value == 1.0


@pytest.mark.parametrize(
    ("only_baseline", "only_candidate", "expected"),
    [
        # 2 * (C(10,0) + C(10,1)) / 2^10 = 22 / 1024.
        (1, 9, 22 / 1024),
        (9, 1, 22 / 1024),
        # 2 * 1 / 2^5.
        (0, 5, 1 / 16),
        (3, 3, 1.0),
        (0, 0, 1.0),
    ],
)
def test_mcnemars_exact_p_value_by_hand(only_baseline, only_candidate, expected):
    baseline = [True] * only_baseline + [False] * only_candidate + [True, False]
    candidate = [False] * only_baseline + [True] * only_candidate + [True, False]
    found = mcnemar(baseline=baseline, candidate=candidate)
    assert (found.only_baseline, found.only_candidate) == (only_baseline, only_candidate)
    assert found.p_value == pytest.approx(expected, abs=1e-15)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=200))
def test_mcnemar_is_the_binomial_test_of_the_discordant_items(pairs):
    found = mcnemar(baseline=[one for one, _ in pairs], candidate=[two for _, two in pairs])
    discordant = found.only_baseline + found.only_candidate
    assert discordant == sum(one != two for one, two in pairs)
    expected = binomtest(found.only_baseline, discordant).pvalue if discordant else 1.0
    assert found.p_value == pytest.approx(expected, abs=1e-12)


def test_mcnemar_of_thousands_of_items_does_not_underflow():
    found = mcnemar(
        baseline=[True] * 2000 + [False] * 2200, candidate=[False] * 2000 + [True] * 2200
    )
    assert found.p_value == pytest.approx(binomtest(2000, 4200).pvalue, rel=1e-9)


def test_holms_values_by_hand():
    # Sorted .01, .02, .03, .04 are times 4, 3, 2, 1 = .04, .06, .06, .04; the last may not be
    # below the one before it.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.6]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.001, 0.999))
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values, alpha):
    adjusted = holm(p_values)
    assert all(raw <= value <= 1 for raw, value in zip(p_values, adjusted, strict=True))
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    rejected = set()
    for rank, place in enumerate(order):
        if p_values[place] * (len(p_values) - rank) > alpha:
            break
        rejected.add(place)
    assert {place for place, value in enumerate(adjusted) if value <= alpha} == rejected


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_holm_refuses_what_is_no_probability(value):
    with pytest.raises(ValueError, match="a p-value is"):
        holm([0.5, value])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": []}, "at least one finite value, got 0"),
        ({"values": [1.0, math.nan]}, "got 2 of which 1 are not finite"),
        ({"values": [1.0], "clusters": [1, 2]}, "two rows of one length"),
        ({"values": [1.0], "confidence": 1.0}, "confidence is 1.0"),
        ({"values": [1.0], "num_resamples": 0}, "num_resamples 0"),
    ],
)
def test_a_bootstrap_of_nothing_or_of_nan_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(**arguments)


def test_pairs_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="got 2 and 1; pair them by item first"):
        mcnemar(baseline=[True, False], candidate=[True])
    with pytest.raises(ValueError, match="got 0 and 0"):
        paired_bootstrap(baseline=[], candidate=[])


def test_an_averages_interval_by_hand():
    # Below 0.03 and 0.04, so 0.05 / 2; above 0.06 and 0.08, so 0.10 / 2.
    found = average_interval([0.3, 0.5], [(0.27, 0.36), (0.46, 0.58)])
    assert found == pytest.approx((0.4 - 0.025, 0.4 + 0.05))
    with pytest.raises(ValueError, match="got 1 and 0"):
        average_interval([0.5], [])


def test_an_averages_interval_is_the_normal_one_for_many_items():
    # Standard error of the average: sqrt(.3 * .7 / 4000 + .6 * .4 / 4000) / 2 = 0.005303.
    intervals = [wilson_interval(1200, 4000), wilson_interval(2400, 4000)]
    low, high = average_interval([0.3, 0.6], intervals)
    assert (low, high) == pytest.approx((0.45 - 1.96 * 0.005303, 0.45 + 1.96 * 0.005303), abs=2e-4)
