"""The gate: a drop ruled out, a drop shown, or neither."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import stats
from tests.gate_decisions import simulated

from gmpo.errors import ConfigError
from gmpo.gate import decide_gate
from gmpo.gate.policy import GatePolicy
from gmpo.gate.records import GateDecision, Guardrail, PairedSuite, SafetyCount


def suite(champion: np.ndarray, candidate: np.ndarray, name: str = "sums", samples: int = 1):
    return PairedSuite(
        suite=name,
        champion=np.asarray(champion, dtype=float),
        candidate=np.asarray(candidate, dtype=float),
        samples=samples,
    )


def counted(both: int, only_old: int, only_new: int, neither: int, name: str = "sums"):
    old = [1] * (both + only_old) + [0] * (only_new + neither)
    new = [1] * both + [0] * only_old + [1] * only_new + [0] * neither
    return suite(np.array(old), np.array(new), name)


def decide(*suites: PairedSuite, policy: GatePolicy | None = None, **more: object) -> GateDecision:
    return decide_gate(
        suites, policy=policy or GatePolicy(), champion="old", candidate="new", **more
    )


def test_by_hand():
    # 1,000 items, 60 lost and 60 won: d has mean 0 and variance 120 / 999.
    decided = decide(counted(600, 60, 60, 280))
    error = math.sqrt(120 / 999 / 1000)
    row = decided.overall
    assert row.difference == 0
    assert row.low == pytest.approx(-stats.t.ppf(0.95, 999) * error)
    assert row.high == pytest.approx(stats.t.ppf(0.95, 999) * error)
    assert row.worse_by_margin_p == pytest.approx(stats.t.sf(0.05 / error, 999))
    assert (row.champion, row.candidate, row.num_items) == (0.66, 0.66, 1000)
    # The squared sum of the normal quantiles of 0.95 and 0.8 is 6.1826.
    assert row.items_needed == math.ceil(6.182557 * (120 / 999) / 0.0025)
    assert decided.outcome == "pass"
    assert decided.sentence.startswith("pass: +0.0 points (-1.8 to +1.8) on 1000 items;")


def test_the_interval_and_the_test_agree_and_are_students():
    generator = np.random.default_rng(0)
    old, new = generator.random(200), generator.random(200)
    row = decide(suite(old, new, samples=64)).overall
    reference = stats.ttest_1samp(new - old, -0.05, alternative="greater")
    assert row.worse_by_margin_p == pytest.approx(reference.pvalue)
    low = stats.ttest_1samp(new - old, 0, alternative="greater").confidence_interval(0.95).low
    assert row.low == pytest.approx(low)


def test_a_drop_that_is_shown_fails_and_one_that_is_not_ruled_out_is_inconclusive():
    failed = decide(counted(500, 150, 50, 300))
    assert failed.outcome == "fail"
    assert "a drop is shown" in failed.sentence
    open_question = decide(counted(50, 12, 12, 26))
    assert open_question.outcome == "inconclusive"
    assert "not ruled out by 100 items; about 600 would do" in open_question.sentence


def test_a_small_drop_that_is_certain_is_within_the_margin():
    # 1.5 points lost on 20,000 items: shown beyond doubt, and borne.
    decided = decide(counted(12000, 700, 400, 6900))
    assert decided.overall.drop_p < 1e-9
    assert decided.outcome == "pass"


def test_items_that_all_came_out_alike_prove_no_more_than_their_number_allows():
    few = GatePolicy(min_items=2)
    # 1 - 0.05 to the power of n: below 59 items a rate of 5 % may well show nothing.
    assert decide(counted(30, 0, 0, 10), policy=few).outcome == "inconclusive"
    assert decide(counted(60, 0, 0, 60), policy=few).outcome == "pass"
    assert decide(counted(60, 0, 0, 60), policy=GatePolicy(min_items=121)).outcome == (
        "inconclusive"
    )


def test_one_suite_may_not_fall_while_another_rises():
    good, bad = counted(200, 20, 180, 100, "new"), counted(200, 150, 20, 130, "old")
    decided = decide(good, bad)
    assert decided.overall.difference > 0
    assert {row.suite: row.verdict for row in decided.suites} == {"new": "pass", "old": "fail"}
    assert decided.outcome == "fail"
    assert "old: a drop is shown" in decided.sentence


def test_drops_are_corrected_over_the_suites_and_the_whole():
    names = ("a", "b", "c")
    suites = [counted(100, 31, 17, 52, name) for name in names]
    decided = decide(*suites)
    alone = [decide(one).overall.drop_p for one in suites]
    # Three alike and the whole, which is the smallest: factors 4 and 3.
    assert decided.suites[0].drop_p == pytest.approx(min(1.0, 3 * alone[0]))


def test_samples_of_an_item_are_no_items():
    generator = np.random.default_rng(1)
    chances = generator.random(100)
    old = generator.binomial(64, chances) / 64
    new = generator.binomial(64, np.clip(chances + generator.normal(0, 0.3, 100), 0, 1)) / 64
    row = decide(suite(old, new, samples=64)).overall
    assert row.high - row.low == pytest.approx(
        2 * stats.t.ppf(0.95, 99) * np.std(new - old, ddof=1) / 10
    )


@pytest.mark.parametrize(
    ("bad", "asked", "limit", "verdict"),
    [
        (0, 300, 0.01, "pass"),  # 1 - 0.05^(1/300) = 0.99 %
        (1, 300, 0.01, "inconclusive"),
        (9, 300, 0.01, "fail"),
        (0, 299, 0.05, "inconclusive"),  # fewer than asked for
        (3, 3, 0.5, "inconclusive"),
        (300, 300, 0.5, "fail"),
        (5, 300, 1.0, "pass"),
    ],
)
def test_a_safety_set_is_judged_by_the_bound_of_its_rate(
    bad: int, asked: int, limit: float, verdict: str
):
    policy = GatePolicy(safety_limits={"canaries": limit})
    count = SafetyCount(name="canaries", num_prompts=asked, num_violations=bad)
    decided = decide(counted(600, 60, 60, 280), policy=policy, safety=[count])
    (result,) = decided.safety
    exact = stats.binomtest(bad, asked)
    assert result.upper == pytest.approx(exact.proportion_ci(0.9, "exact").high)
    assert result.lower == pytest.approx(exact.proportion_ci(0.9, "exact").low)
    assert result.verdict == decided.outcome == verdict


def test_a_safety_set_that_was_not_asked_keeps_the_gate_shut():
    decided = decide(counted(600, 60, 60, 280), policy=GatePolicy(safety_limits={"canaries": 0.01}))
    assert decided.outcome == "inconclusive"
    assert "canaries: not asked; at least 300 prompts are needed" in decided.sentence


def test_the_prompts_needed_would_do():
    policy = GatePolicy(safety_limits={"canaries": 0.004})
    count = SafetyCount(name="canaries", num_prompts=300, num_violations=0)
    needed = decide(counted(600, 60, 60, 280), policy=policy, safety=[count])
    prompts = needed.safety[0].prompts_needed
    assert needed.outcome == "inconclusive" and prompts == 748
    for asked, verdict in ((prompts, "pass"), (prompts - 1, "inconclusive")):
        count = SafetyCount(name="canaries", num_prompts=asked, num_violations=0)
        decided = decide(counted(600, 60, 60, 280), policy=policy, safety=[count])
        assert decided.safety[0].verdict == verdict


def test_guardrails_hold_growth():
    old = np.exp(np.random.default_rng(2).normal(0, 1, 400))
    noise = np.exp(np.random.default_rng(3).normal(0, 0.2, 400))
    for factor, verdict in ((1.0, "pass"), (1.5, "fail"), (1.2, "inconclusive")):
        guardrail = Guardrail(name="latency", champion=old, candidate=old * noise * factor)
        decided = decide(counted(600, 60, 60, 280), guardrails=[guardrail])
        assert decided.guardrails[0].growth == pytest.approx(factor, rel=0.03)
        assert decided.outcome == verdict


def in_waves(wave: np.ndarray) -> Guardrail:
    return Guardrail(name="x", champion=np.ones(3), candidate=np.ones(3), wave=wave)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda: decide(), "no suite"),
        (lambda: decide(counted(1, 0, 0, 1), counted(1, 0, 0, 1)), "names of their own"),
        (lambda: suite(np.ones(3), np.ones(4)), "same items"),
        (lambda: suite(np.ones(0), np.ones(0)), "no items"),
        (lambda: suite(np.array([0.5, math.nan]), np.ones(2)), "outside"),
        (lambda: SafetyCount(name="x", num_prompts=0, num_violations=0), "need 0 <="),
        (
            lambda: decide(
                counted(1, 0, 0, 1), safety=[SafetyCount(name="x", num_prompts=1, num_violations=0)]
            ),
            "no limit",
        ),
        (
            lambda: decide(
                counted(1, 0, 0, 1),
                guardrails=[Guardrail(name="heat", champion=np.ones(2), candidate=np.ones(2))],
            ),
            "no limit",
        ),
        (lambda: Guardrail(name="x", champion=np.ones(1), candidate=np.ones(1)), "at least two"),
        (lambda: Guardrail(name="x", champion=np.zeros(2), candidate=np.ones(2)), "above 0"),
        (lambda: in_waves(np.arange(2)), "wave of each of its 3 pairs and two"),
        (lambda: in_waves(np.zeros(3, dtype=int)), "two waves or more; got 3 places of 1"),
    ],
)
def test_what_cannot_be_judged_is_refused(change, said):
    with pytest.raises(ConfigError, match=said):
        change()


def test_an_item_counts_once():
    one, other = counted(1, 0, 0, 1, "a"), counted(1, 0, 0, 1, "b")
    named = [
        PairedSuite(suite=s.suite, champion=s.champion, candidate=s.candidate, items=("x", s.suite))
        for s in (one, other)
    ]
    with pytest.raises(ConfigError, match="'x'"):
        decide(*named)


@pytest.mark.parametrize(
    "setting",
    [{"degradation_limit": 0}, {"alpha": 0.5}, {"safety_limits": {"a": 0}}, {"margin": 0.1}],
)
def test_a_policy_that_cannot_be_kept_is_refused(setting):
    with pytest.raises(ValidationError):
        GatePolicy(**setting)


def test_right_and_wrong_are_shares():
    booleans = PairedSuite(suite="a", champion=np.array([True]), candidate=np.array([False]))
    assert (booleans.candidate - booleans.champion).tolist() == [-1.0]


def test_a_decision_is_json_and_holds_its_policy():
    decided = decide(counted(600, 60, 60, 280))
    told = json.loads(json.dumps(decided.as_dict(), allow_nan=False))
    assert told["outcome"] == "pass"
    assert told["policy"]["degradation_limit"] == 0.05
    assert told["performance_improvement"] == 0


_RATES = st.floats(0, 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(_RATES, _RATES), min_size=2, max_size=40), st.floats(0.01, 0.3))
def test_a_better_candidate_never_turns_a_pass_into_less(pairs, gain):
    policy = GatePolicy(min_items=2, degradation_limit=0.2)
    old = np.array([one for one, _ in pairs])
    new = np.array([two for _, two in pairs])
    before = decide(suite(old, new), policy=policy).overall
    # A gain of every item alike keeps the spread, and only moves the mean.
    room = min(gain, float(1 - new.max()))
    after = decide(suite(old, new + room), policy=policy).overall
    assert after.worse_by_margin_p <= before.worse_by_margin_p + 1e-12
    assert after.difference == pytest.approx(before.difference + room)


def share_passed(drops: tuple[float, ...], *, repeats: int, samples: int = 1) -> float:
    decisions = simulated(drops, repeats=repeats, samples=samples)
    return float(np.mean([decided.passed for decided in decisions]))


@pytest.mark.parametrize(("suites", "samples"), [(1, 1), (3, 2)])
def test_how_often_it_errs_with_a_thousand_items(suites: int, samples: int):
    def passed(change: float, repeats: int) -> float:
        return share_passed((change,) * suites, repeats=repeats, samples=samples)

    assert passed(0.0, 1000) >= 0.8
    assert passed(0.05, 500) >= 0.95
    # Twice the margin: at most once in a thousand.
    assert passed(-0.1, 3000) <= 0.001
    # The margin itself: the level of the test, and what 1,000 repeats scatter.
    assert passed(-0.05, 1000) <= 0.07


def test_a_drop_of_one_suite_of_three_is_overlooked_no_oftener_than_the_level_says():
    assert share_passed((-0.1, 0.0, 0.0), repeats=1000) <= 0.07
    assert share_passed((-0.1, 0.05, 0.05), repeats=1000) <= 0.07


def test_more_answers_an_item_help():
    assert share_passed((0.0,), repeats=300, samples=4) >= 0.99
