"""Two arms paired by seed: hand-computed effects, and what is said of them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmpo.stability import FIGURES, RunFigures
from gmpo.statistics import detectable_mean
from gmpo.study.comparison import (
    IMPROVEMENTS,
    Comparison,
    compare_arms,
    compare_crashes,
    smallest_p_value,
)


def run(crash: str | None = None, **values: float | None) -> RunFigures:
    return RunFigures(
        values={name: values.get(name) for name in FIGURES},
        ratio_min=None,
        ratio_max=None,
        rounds_done=4,
        crash=crash,  # type: ignore[arg-type]
        could_collapse=False,
    )


def compared(
    name: str, baseline: Sequence[float | None], candidate: Sequence[float | None]
) -> Comparison:
    left = {seed: run(**{name: value}) for seed, value in enumerate(baseline)}
    right = {seed: run(**{name: value}) for seed, value in enumerate(candidate)}
    found = compare_arms(left, right, names=("grpo", "gmpo"))
    return next(comparison for comparison in found if comparison.figure == name)


def test_a_difference_is_candidate_minus_baseline_with_its_t_interval():
    found = compared("reward_end", [0.1, 0.2, 0.3], [0.2, 0.4, 0.6])
    # Differences 0.1, 0.2, 0.3: 0.2 +- 4.3027 * 0.1 / sqrt(3).
    assert found.effect == pytest.approx(0.2)
    assert found.interval == pytest.approx((-0.04841, 0.44841), abs=5e-6)
    assert found.p_value == found.smallest_p == 0.25
    assert found.detectable == pytest.approx(detectable_mean(0.1, 3))
    assert found.verdict == "no difference seen"
    assert found.improvement is None


def test_a_ratio_is_the_geometric_mean_of_the_pairs_ratios():
    found = compared("loss_variance", [1.0, 1.0, 1.0], [0.5, 0.25, 0.125])
    # Logs -1, -2, -3 times log 2: mean -2, so 1/4; half-width 2.4841 log 2.
    assert found.effect == pytest.approx(0.25)
    assert found.interval == pytest.approx((2**-4.4841, 2**0.4841), rel=1e-4)
    assert found.improvement == pytest.approx(0.75)
    assert found.improvement_interval == pytest.approx((1 - 2**0.4841, 1 - 2**-4.4841), rel=1e-4)
    assert found.verdict == "no difference seen"


def test_the_articles_range_figure_compares_logs_of_ranges():
    # The article's (0.001, 847.3) against (0.12, 8.4): 13.65 and 4.25 nats, 68.9 % less.
    ranges = [math.log(847.3 / 0.001), math.log(8.4 / 0.12)]
    found = compared("log_ratio_range", [ranges[0]] * 2, [ranges[1]] * 2)
    assert IMPROVEMENTS["ratio_stability"] == "log_ratio_range"
    assert found.improvement == pytest.approx(0.689, abs=5e-4)
    assert found.detectable is None  # no spread between the pairs to go by


def test_an_interval_without_0_says_which_side():
    lower = compared("loss_variance", [1, 2, 4, 8, 16, 32], [0.5, 0.9, 2.1, 4, 7, 17])
    assert (lower.verdict, lower.is_confirmed) == ("lower", True)  # p = 2 / 64
    higher = compared("reward_end", [0, 0, 0], [1.0, 1.1, 0.9])
    assert (higher.verdict, higher.is_confirmed) == ("higher", False)  # p = 0.25 with three


def test_pairs_that_all_differ_by_the_same_are_judged_by_the_exact_test_alone():
    """An interval without a width would call two equal pairs certain."""
    two = compared("rounds_to_target", [5.0, 5.0], [4.0, 4.0])
    assert two.effect == pytest.approx(0.8)
    assert two.interval is two.detectable is two.improvement_interval is None
    assert (two.p_value, two.verdict) == (0.5, "no difference seen")
    six = compared("rounds_to_target", [5.0] * 6, [4.0] * 6)
    assert (six.verdict, six.is_confirmed) == ("lower", True)  # p = 2 / 64
    # 0.3 - 0.2 and 0.4 - 0.3 differ in their last bits.
    decimals = compared("reward_end", [0.2, 0.3], [0.3, 0.4])
    assert (decimals.interval, decimals.verdict) == (None, "no difference seen")


def test_equal_arms_show_no_difference():
    for name in FIGURES:
        found = compared(name, [1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
        assert (found.verdict, found.p_value) == ("no difference seen", 1.0)


def test_pairs_without_the_figure_are_left_out_and_counted():
    found = compared("rounds_to_target", [3.0, None, 4.0], [2.0, 5.0, 4.0])
    assert (found.pairs, found.left_out) == (2, 1)
    lonely = compared("rounds_to_target", [3.0, None, None], [2.0, 5.0, 4.0])
    assert (lonely.pairs, lonely.left_out, lonely.verdict) == (1, 2, "not measured")
    assert lonely.effect is lonely.interval is lonely.p_value is None
    zero = compared("loss_variance", [0.0, 1.0, 1.0], [1.0, 1.0, 2.0])  # 0 has no logarithm
    assert (zero.pairs, zero.left_out) == (2, 1)


def test_seeds_of_which_a_run_crashed_are_in_the_crashes_alone():
    left = {0: run(reward_end=0.1), 1: run("collapsed", reward_end=0.0), 2: run(reward_end=0.3)}
    right = {0: run(reward_end=0.2), 1: run(reward_end=0.9), 2: run("diverged", reward_end=0.3)}
    found = {c.figure: c for c in compare_arms(left, right, names=("grpo", "gmpo"))}
    assert (found["reward_end"].pairs, found["reward_end"].left_out) == (1, 2)
    assert (found["crashes"].pairs, found["crashes"].effect) == (3, 0.0)


def test_crashes_are_judged_by_the_exact_test_alone():
    crashed = {seed: run("collapsed") for seed in range(6)}
    whole = {seed: run() for seed in range(6)}
    names = ("grpo", "gmpo")
    six = compare_crashes(crashed, whole, names=names)
    assert (six.effect, six.p_value, six.verdict, six.interval) == (-1.0, 2 / 64, "lower", None)
    five = compare_crashes({s: crashed[s] for s in range(5)}, whole, names=names)
    assert (five.p_value, five.verdict) == (2 / 32, "no difference seen")


def test_only_seeds_that_both_arms_have_are_pairs():
    left = {seed: run(reward_end=0.0) for seed in (0, 1, 2)}
    right = {seed: run(reward_end=float(seed)) for seed in (1, 2, 3)}
    found = next(c for c in compare_arms(left, right, names=("a", "b")) if c.figure == "reward_end")
    assert (found.pairs, found.effect) == (2, 1.5)


def test_the_smallest_p_halves_with_each_pair():
    assert [smallest_p_value(n) for n in (1, 2, 3, 6)] == [None, 0.5, 0.25, 0.03125]


VALUES = st.lists(st.tuples(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6)), min_size=2, max_size=8)


@given(VALUES)
def test_exchanging_the_arms_turns_a_ratio_over(pairs: list[tuple[float, float]]):
    there = compared("loss_variance", [a for a, _ in pairs], [b for _, b in pairs])
    back = compared("loss_variance", [b for _, b in pairs], [a for a, _ in pairs])
    assert there.effect is not None
    assert back.effect == pytest.approx(1 / there.effect)
    assert back.p_value == there.p_value
    sides = {"lower": "higher", "higher": "lower"}
    assert back.verdict == sides.get(there.verdict, there.verdict)


@given(VALUES, st.floats(1e-3, 1e3))
def test_a_ratio_does_not_depend_on_the_unit(pairs: list[tuple[float, float]], unit: float):
    plain = compared("loss_variance", [a for a, _ in pairs], [b for _, b in pairs])
    scaled = compared("loss_variance", [a * unit for a, _ in pairs], [b * unit for _, b in pairs])
    assert scaled.effect == pytest.approx(plain.effect)


@given(VALUES)
def test_figures_are_json_whatever_they_are(pairs: list[tuple[float, float]]):
    found = compared("loss_variance", [a for a, _ in pairs], [b for _, b in pairs])
    json.dumps(found.as_dict(), allow_nan=False)
