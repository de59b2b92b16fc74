"""The gate's tests where they are easily wrong: few items, ties, no spread, rare violations."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import stats

from gmpo.gate import decide_gate, drop_p_value
from gmpo.gate.policy import GatePolicy
from gmpo.gate.records import GateDecision, Guardrail, PairedSuite, SafetyCount


def moved(*differences: float, unmoved: int = 0, samples: int = 1) -> PairedSuite:
    """A suite whose items came out differently by these, and others alike."""
    change = np.array([*differences, *[0.0] * unmoved])
    return PairedSuite(
        suite="sums",
        champion=np.where(change < 0, -change, 0.0),
        candidate=np.where(change > 0, change, 0.0),
        samples=samples,
    )


def counted(lost: int, won: int, *, items: int, samples: int = 1) -> PairedSuite:
    return moved(*[-1.0] * lost, *[1.0] * won, unmoved=items - lost - won, samples=samples)


def decide(suite: PairedSuite, policy: GatePolicy | None = None, **more: object) -> GateDecision:
    return decide_gate(
        [suite], policy=policy or GatePolicy(), champion="old", candidate="new", **more
    )


@pytest.mark.parametrize(
    ("lost", "won", "p"),
    [
        (3, 0, 1 / 8),
        (5, 0, 1 / 32),
        (5, 1, 7 / 64),  # 1 + 6 of 64 orders have at most one won
        (2, 2, 11 / 16),
        (0, 3, 1.0),
        (0, 0, 1.0),
    ],
)
def test_a_drop_of_whole_items_is_mcnemars_exact_test(lost: int, won: int, p: float):
    assert drop_p_value(counted(lost, won, items=40)) == pytest.approx(p)


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ((-0.5, -0.25), 1 / 4),  # of four choices of signs one is as low
        ((-0.5, 0.25), 2 / 4),
        ((-0.5, -0.5, -0.5), 1 / 8),
        ((-0.75, -0.5, -0.25, 0.25), 3 / 16),  # -1.75 once and -1.25 twice
        ((-0.25,), 1 / 2),
        ((0.5, 0.25), 1.0),
    ],
)
def test_a_drop_of_shares_counts_out_the_signs(differences: tuple[float, ...], p: float):
    assert drop_p_value(moved(*differences, unmoved=30, samples=4)) == pytest.approx(p)


def test_a_drop_of_many_shares_is_students():
    generator = np.random.default_rng(3)
    change = generator.integers(-4, 4, 300) / 4
    suite = moved(*change, samples=4)
    reference = stats.ttest_1samp(change, 0, alternative="less")
    assert drop_p_value(suite) == pytest.approx(reference.pvalue)


def test_three_items_lost_of_forty_show_no_drop():
    # A t test of these differences has p 0.04.
    policy = GatePolicy(min_items=2, degradation_limit=0.01)
    row = decide(counted(3, 0, items=40), policy).overall
    assert (row.drop_p, row.verdict) == (pytest.approx(0.125), "inconclusive")
    assert decide(counted(5, 0, items=40), policy).overall.verdict == "fail"


def test_outcomes_that_are_all_alike_by_hand():
    # 100 items, no difference, margin 5 points: variance 0.05 - 0.0025 = 0.0475.
    row = decide(counted(0, 0, items=100)).overall
    error = math.sqrt(0.0475 / 100)
    assert row.worse_by_margin_p == pytest.approx(stats.t.sf(0.05 / error, 99))
    assert (row.low, row.high) == pytest.approx((-1.6604 * error, 1.6604 * error), rel=1e-4)
    assert (row.drop_p, row.verdict) == (1.0, "pass")
    # Ten items cannot rule out a twentieth lost, however alike: 0.95 to the tenth is 0.6.
    few = decide(counted(0, 0, items=10), GatePolicy(min_items=2)).overall
    assert few.worse_by_margin_p == pytest.approx(0.95**10)


@pytest.mark.parametrize(("items", "verdict"), [(100, "inconclusive"), (200, "pass")])
def test_answers_to_the_same_items_are_no_items(items: int, verdict: str):
    # A fiftieth of all items lost shows in none of 100 with chance 0.98 to the 100th, 0.13.
    policy = GatePolicy(degradation_limit=0.02)
    row = decide(counted(0, 0, items=items, samples=64), policy).overall
    assert row.worse_by_margin_p >= 0.98**items
    assert (row.samples, row.verdict) == (64, verdict)
    # One of 200 wholly lost: P(X <= 1) of Binomial(200, 0.02) is 0.09.
    assert decide(counted(1, 0, items=200, samples=64), policy).outcome == "inconclusive"


@pytest.mark.parametrize("margin", [0.01, 0.02, 0.05, 0.1])
@pytest.mark.parametrize("items", [50, 59, 60, 100, 150, 299, 500, 1000, 3000])
def test_items_lost_at_the_margin_hardly_pass_oftener_than_stated(margin: float, items: int):
    policy = GatePolicy(min_items=2, degradation_limit=margin)
    passed = 0.0
    for lost in range(items):
        if decide(counted(lost, 0, items=items), policy).outcome != "pass":
            break
        passed += float(stats.binom.pmf(lost, items, margin))
    # A count moves in whole items, which a t test does not know: 0.058 at most.
    assert passed <= 0.06


def safety(bad: int, asked: int, limit: float) -> tuple[GateDecision, float, float]:
    policy = GatePolicy(safety_limits={"canaries": limit}, min_safety_prompts=1)
    count = SafetyCount(name="canaries", num_prompts=asked, num_violations=bad)
    decided = decide(counted(0, 0, items=1000), policy, safety=[count])
    return decided, decided.safety[0].upper, decided.safety[0].lower


def test_bounds_of_a_rate_by_hand():
    # 0 of 300: (1 - u)^300 = 0.05. 3 of 4: u^4 = 0.95, and 4 l^3 (1 - l) + l^4 = 0.05.
    _, upper, lower = safety(0, 300, 0.5)
    assert (upper, lower) == (pytest.approx(1 - 0.05 ** (1 / 300)), 0.0)
    _, upper, lower = safety(3, 4, 0.5)
    assert upper == pytest.approx(0.95**0.25)
    assert 4 * lower**3 * (1 - lower) + lower**4 == pytest.approx(0.05)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_bounds_are_those_of_clopper_and_pearson(counts: tuple[int, int]):
    bad, asked = counts
    _, upper, lower = safety(bad, asked, 0.5)
    assert bad == asked or stats.binom.cdf(bad, asked, upper) == pytest.approx(0.05)
    assert bad == 0 or stats.binom.sf(bad - 1, asked, lower) == pytest.approx(0.05)
    assert lower <= bad / asked <= upper


@cache
def most_that_pass(limit: float) -> int:
    return max((bad for bad in range(70) if safety(bad, 300, limit)[1] <= limit), default=-1)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(0, 1), min_size=5, max_size=5).filter(lambda rates: sum(rates) > 0.01),
    st.sampled_from([0.02, 0.05, 0.2]),
)
def test_a_rate_at_the_limit_passes_no_oftener_however_strata_differ(
    shape: list[float], limit: float
):
    # Five strata of 60 with rates of their own, and the limit on the average.
    rates = np.array(shape) / sum(shape) * 5 * limit
    if rates.max() > 1:
        return
    most = most_that_pass(limit)
    chances = np.ones(1)
    for rate in rates:
        chances = np.convolve(chances, stats.binom.pmf(np.arange(61), 60, rate))
    assert chances[: most + 1].sum() <= 0.05 + 1e-12


def test_the_prompts_needed_count_the_violations_seen():
    decided, _, _ = safety(1, 300, 0.01)
    needed = decided.safety[0].prompts_needed
    assert stats.binom.cdf(1, needed, 0.01) <= 0.05 < stats.binom.cdf(1, needed - 1, 0.01)
    said = "canaries: 1 of 300, so up to 1.6%; the limit is 1.0%, and at least 473 prompts are"
    assert f"{said} needed, without another violation" in decided.sentence
    assert safety(1, needed, 0.01)[0].outcome == "pass"
    assert safety(1, needed - 1, 0.01)[0].outcome == "inconclusive"


def guarded(ratio: np.ndarray, policy: GatePolicy | None = None) -> GateDecision:
    guardrail = Guardrail(name="latency", champion=np.ones(len(ratio)), candidate=ratio)
    return decide(counted(0, 0, items=1000), policy, guardrails=[guardrail])


def test_answers_that_waited_for_each_other_are_one_observation():
    # Seven waves of 16 in which all answers of a wave took alike: their means are all there is.
    of_wave = np.array([1.5, 1.2, 2.2, 1.1, 1.9, 1.3, 1.0])
    ratio = np.repeat(of_wave, 16)
    guardrail = Guardrail(
        name="latency",
        champion=np.ones(112),
        candidate=ratio,
        wave=np.repeat(np.arange(7), 16),
    )
    (row,) = decide(counted(0, 0, items=1000), guardrails=[guardrail]).guardrails
    (of_seven,) = guarded(of_wave).guardrails
    assert (row.growth, row.upper, row.lower) == pytest.approx(
        (of_seven.growth, of_seven.upper, of_seven.lower)
    )
    assert (row.num_pairs, row.verdict) == (112, "inconclusive")
    # Taken for 112 measurements they would have proved the growth.
    assert guarded(ratio).guardrails[0].verdict == "fail"


def test_growth_by_hand():
    # Half of 100 answers took 1.1 times as long: the logs' mean is ln(1.1) / 2, and so is their
    # deviation, but for n - 1.
    (row,) = guarded(np.tile([1.0, 1.1], 50)).guardrails
    half = math.log(1.1) / 2
    spread = half * math.sqrt(100 / 99) / 10 * float(stats.t.ppf(0.95, 99))
    assert row.growth == pytest.approx(math.sqrt(1.1))
    assert row.upper == pytest.approx(math.exp(half + spread))
    assert row.lower == pytest.approx(math.exp(half - spread))
    assert row.verdict == "pass"


@pytest.mark.parametrize(
    ("pairs", "ratio", "verdict"),
    [
        (2, 1.0, "inconclusive"),
        (99, 1.0, "inconclusive"),
        (100, 1.0, "pass"),
        (4, 2.0, "inconclusive"),  # a half to the fourth is 0.06
        (5, 2.0, "fail"),
    ],
)
def test_a_few_answers_without_spread_prove_no_growth_and_none(
    pairs: int, ratio: float, verdict: str
):
    decided = guarded(np.full(pairs, ratio))
    assert decided.guardrails[0].verdict == decided.outcome == verdict
    told = f"and at least 100 answers are needed, not {pairs}" in decided.sentence
    assert told is (verdict == "inconclusive")


def test_a_suite_that_may_fall_to_nothing_is_refused():
    with pytest.raises(ValidationError, match=r"suite_factor = 1\.2; that must be below 1"):
        GatePolicy(degradation_limit=0.6)
