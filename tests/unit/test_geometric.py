"""Geometric means: hand-computed values, guards that act, and the outlier comparison."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmpo.errors import DataError
from gmpo.geometric import SafeGeometricMean, compare_sensitivity, token_weights

positive = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=8)


def test_mean_of_two_and_eight_is_four():
    # sqrt(2 * 8) = sqrt(16) = 4
    assert SafeGeometricMean().compute([2.0, 8.0]) == pytest.approx(4.0)


def test_a_weight_of_three_to_one_is_a_value_listed_three_times():
    # (2^3 * 32)^(1/4) = 256^(1/4) = 4
    mean = SafeGeometricMean()
    assert mean.compute_with_weights([2.0, 32.0], [3, 1]) == pytest.approx(4.0)
    assert mean.compute_with_weights([2.0, 32.0], [0.75, 0.25]) == pytest.approx(4.0)


def test_epsilon_changes_the_result_even_below_the_log_clip():
    # [0, 1]: sqrt(eps * 1) = 1e-4 for 1e-8, and 1e-5 for 1e-10, although log(1e-8) < -10
    assert SafeGeometricMean(epsilon=1e-8, clip_range=(-10, 10)).compute([0, 1]) == pytest.approx(
        1e-4
    )
    assert SafeGeometricMean(epsilon=1e-10, clip_range=(-10, 10)).compute([0, 1]) == pytest.approx(
        1e-5
    )


def test_log_clip_changes_the_result_on_both_sides():
    # 1e-12 has log -27.6, cut to -10; the mean of (-10, 0) is -5
    narrow = SafeGeometricMean(epsilon=1e-8, clip_range=(-10, 10))
    assert narrow.compute([1e-12, 1.0]) == pytest.approx(math.exp(-5))
    # with the default range the floor is epsilon: sqrt(1e-8) = 1e-4
    assert SafeGeometricMean().compute([1e-12, 1.0]) == pytest.approx(1e-4)
    # e^30 is cut to e^10 or e^20
    assert narrow.compute([math.exp(30), 1.0]) == pytest.approx(math.exp(5))
    assert SafeGeometricMean().compute([math.exp(30), 1.0]) == pytest.approx(math.exp(10))


def test_weighted_mean_clips_too():
    narrow = SafeGeometricMean(epsilon=1e-8, clip_range=(-10, 10))
    assert narrow.compute_with_weights([math.exp(30), 1.0], [1, 1]) == pytest.approx(math.exp(5))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([1.0, -0.5], r"values\[1\] is -0.5; all values must be 0 or more"),
        ([math.nan], r"values\[0\] is nan; all values must be finite"),
        ([1.0, math.inf], r"values\[1\] is inf"),
        ([], r"shape \(0,\); a geometric mean needs a list of at least one"),
        ([[1.0]], r"shape \(1, 1\)"),
    ],
)
def test_values_that_have_no_geometric_mean_are_refused(values, text):
    with pytest.raises(DataError, match=text):
        SafeGeometricMean().compute(values)


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        ([1.0, -1.0], r"weights\[1\] is -1.0; all weights must be 0 or more"),
        ([1.0, math.nan], r"weights\[1\] is nan"),
        ([1.0], r"1 weights of shape \(1,\) for 2 values; give one weight a value"),
        ([0.0, 0.0], "all weights are 0, so they cannot be normalised"),
    ],
)
def test_unusable_weights_are_refused(weights, text):
    with pytest.raises(ValueError, match=text):
        SafeGeometricMean().compute_with_weights([1.0, 2.0], weights)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"epsilon": 0.0}, "epsilon is 0.0; it must be a finite number above 0"),
        ({"epsilon": math.nan}, "epsilon is nan"),
        ({"clip_range": (1.0, -1.0)}, "the lower one first"),
        ({"epsilon": 1.0, "clip_range": (-3.0, -1.0)}, "lies above exp"),
    ],
)
def test_guards_that_make_no_sense_are_refused(arguments, text):
    with pytest.raises(DataError, match=text):
        SafeGeometricMean(**arguments)


@settings(max_examples=50, deadline=None)
@given(positive)
def test_mean_lies_between_the_extremes_and_below_the_arithmetic_mean(values):
    mean = SafeGeometricMean().compute(values)
    assert min(values) * (1 - 1e-9) <= mean <= max(values) * (1 + 1e-9)
    assert mean <= np.mean(values) * (1 + 1e-9)


@settings(max_examples=50, deadline=None)
@given(positive, st.floats(0.01, 100.0))
def test_equal_weights_of_any_size_equal_no_weights(values, weight):
    mean = SafeGeometricMean()
    weighted = mean.compute_with_weights(values, [weight] * len(values))
    assert weighted == pytest.approx(mean.compute(values))


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 1e12), st.floats(0, 1e12))
def test_a_larger_value_never_lowers_the_mean(first, second):
    small, large = sorted((first, second))
    for clip_range in ((-10.0, 10.0), (-20.0, 20.0)):
        mean = SafeGeometricMean(clip_range=clip_range)
        assert mean.compute([small, 1.0]) <= mean.compute([large, 1.0]) * (1 + 1e-12)


def test_one_large_value_moves_the_arithmetic_mean_more():
    result = compare_sensitivity()
    # arithmetic 4.1/5 = 0.82 -> 18.3/5 = 3.66: 2.84/0.82 = 346.3 %
    assert result["arithmetic_sensitivity"] == pytest.approx(346.3, abs=0.05)
    # geometric 0.36288^(1/5) = 0.8165 -> 6.804^(1/5) = 1.467; (15/0.8)^(1/5) = 1.797
    assert result["large_outlier"]["normal_geometric"] == pytest.approx(0.8165, abs=5e-5)
    assert result["large_outlier"]["outlier_geometric"] == pytest.approx(1.467, abs=5e-4)
    assert result["geometric_sensitivity"] == pytest.approx(79.7, abs=0.05)
    assert result["stability_improvement"] == pytest.approx(4.34, abs=0.01)


def test_one_tiny_value_moves_the_geometric_mean_more():
    # arithmetic: (4.1 - 0.8)/5 = 0.66, -0.16/0.82 = -19.5 %; geometric: (1e-6/0.8)^0.2 = 0.066
    near_zero = compare_sensitivity()["near_zero"]
    assert near_zero["arithmetic_change"] == pytest.approx(-19.5, abs=0.05)
    assert near_zero["geometric_change"] == pytest.approx(-93.4, abs=0.05)


def test_token_list_gets_own_ratios_in_grpo_and_one_weight_in_gmpo():
    example = compare_sensitivity()["token_weights"]["token_list"]
    # 10.5/5 = 2.1; (0.1^3 * 0.2 * 10)^(1/5) = 0.002^0.2 = 0.2885
    assert example["arithmetic_mean"] == pytest.approx(2.1)
    assert example["geometric_mean"] == pytest.approx(0.2885, abs=5e-5)
    # A > 0: 10 is cut by both. Shared: exp((3 ln 0.1 + ln 0.2 + 0.4)/5) = exp(-1.6234) = 0.1972
    raising = example["weights"]["positive_advantage"]
    assert raising["grpo"] == [0.1, 0.2, 0.1, 0.0, 0.1]
    assert raising["gmpo"] == pytest.approx([0.1972] * 3 + [0.0, 0.1972], abs=5e-5)
    # A < 0: the four small ones are cut. Shared: exp((4 * -0.4 + ln 10)/5) = exp(0.1405) = 1.1509
    lowering = example["weights"]["negative_advantage"]
    assert lowering["grpo"] == [0.0, 0.0, 0.0, 10.0, 0.0]
    assert lowering["gmpo"] == pytest.approx([0.0, 0.0, 0.0, 1.1509, 0.0], abs=5e-5)


def test_a_ratio_of_900_is_cut_when_raising_and_only_damped_when_lowering():
    examples = compare_sensitivity()["token_weights"]
    alone = examples["ratio_900"]["weights"]
    assert alone["positive_advantage"] == {"grpo": [0.0], "gmpo": [0.0]}
    assert alone["negative_advantage"]["grpo"] == pytest.approx([900.0])
    assert alone["negative_advantage"]["gmpo"] == pytest.approx([900.0])
    # among ten: 900^(1/10) = exp(0.68024) = 1.97435 for every token
    among = examples["ratio_900_among_ten"]["weights"]["negative_advantage"]
    assert among["grpo"] == pytest.approx([900.0, *[1.0] * 9])
    assert among["gmpo"] == pytest.approx([1.97435] * 10, abs=5e-5)


def test_a_ratio_of_0_0011_is_cut_when_lowering_and_kept_when_raising():
    examples = compare_sensitivity()["token_weights"]
    alone = examples["ratio_0.0011"]["weights"]
    assert alone["negative_advantage"] == {"grpo": [0.0], "gmpo": [0.0]}
    assert alone["positive_advantage"]["grpo"] == pytest.approx([0.001 / 0.9])
    assert alone["positive_advantage"]["gmpo"] == pytest.approx([0.001 / 0.9])
    # among ten, A > 0: (1/900)^(1/10) = 0.5065 for every token
    among = examples["ratio_0.0011_among_ten"]["weights"]
    assert among["positive_advantage"]["gmpo"] == pytest.approx([0.5065] * 10, abs=5e-5)
    # A < 0: the outlier counts as e^-0.4: exp(-0.04) = 0.9608 for the others, 0 for itself
    assert among["negative_advantage"]["gmpo"] == pytest.approx([0.0] + [0.9608] * 9, abs=5e-5)


def test_own_lists_are_compared():
    # arithmetic 1 -> 2 (+100 %), geometric 1 -> sqrt(3) (+73.2 %)
    result = compare_sensitivity([1.0, 1.0], [1.0, 3.0])
    assert result["arithmetic_sensitivity"] == pytest.approx(100.0)
    assert result["geometric_sensitivity"] == pytest.approx(73.2051, abs=1e-4)
    assert math.isnan(compare_sensitivity([1.0], [1.0])["stability_improvement"])


def test_lists_without_a_mean_to_compare_with_are_refused():
    with pytest.raises(DataError, match="a relative change needs one value above 0"):
        compare_sensitivity([0.0], [1.0])
    with pytest.raises(DataError, match=r"ratios\[1\] is 0.0; all ratios must be finite and above"):
        token_weights([1.0, 0.0], advantage_sign=1)
    with pytest.raises(DataError, match="advantage_sign is 0"):
        token_weights([1.0], advantage_sign=0)
    with pytest.raises(DataError, match="at least one token"):
        token_weights([], advantage_sign=1)
