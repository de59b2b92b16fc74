"""How findings are joined and when a level is told; every number is worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmpo.guard_events import RESPONSES
from gmpo.monitoring.actions import ACTIONS
from gmpo.monitoring.anomalies import SERVING_DETECTORS
from gmpo.monitoring.severity import (
    FAMILIES,
    LEVELS,
    Finding,
    Level,
    joint_severity,
    level_of,
    report_of,
    settled_level,
)
from gmpo.monitoring.training_anomalies import TRAINING_DETECTORS, training_report

SHARES = st.floats(min_value=0, max_value=1)


def finding(weight: float, score: float, family: str = "performance") -> Finding:
    return Finding(family=family, weight=weight, score=score, value=1.0, baseline=0.5)  # type: ignore[arg-type]


def alarm(value: float | None = 0.4) -> dict[str, float | None]:
    return {"value": value, "baseline": 0.9}


def test_two_weak_signs_are_a_strong_one():
    # 1 - (1 - 0.5) (1 - 0.5) = 0.75; 1 - (1 - 0.8 0.5) (1 - 0.5 0.4) = 1 - 0.6 0.8 = 0.52
    assert joint_severity({"a": finding(0.5, 1), "b": finding(0.5, 1)}) == 0.75
    assert joint_severity({"a": finding(0.8, 0.5), "b": finding(0.5, 0.4)}) == pytest.approx(0.52)
    assert joint_severity({}) == 0


@given(st.lists(st.tuples(SHARES, SHARES), min_size=1, max_size=6))
def test_another_finding_never_makes_it_less_severe(pairs: list[tuple[float, float]]):
    findings = {str(n): finding(w, s) for n, (w, s) in enumerate(pairs)}
    fewer = dict(list(findings.items())[:-1])
    assert 0 <= joint_severity(fewer) <= joint_severity(findings) + 1e-12 <= 1 + 1e-9


@pytest.mark.parametrize(
    ("severity", "now", "expected"),
    [
        (0.39, "ok", "ok"),
        (0.4, "ok", "warning"),
        (0.69, "ok", "warning"),
        (0.7, "ok", "critical"),
        # What holds is left only below 0.3 and 0.6.
        (0.3, "warning", "warning"),
        (0.29, "warning", "ok"),
        (0.6, "critical", "critical"),
        (0.59, "critical", "warning"),
        (0.31, "critical", "warning"),
        (0.29, "critical", "ok"),
        (0.6, "warning", "warning"),
    ],
)
def test_levels_have_thresholds_and_hysteresis(severity: float, now: Level, expected: Level):
    assert level_of(severity, now=now) == expected


@pytest.mark.parametrize(
    ("now", "looks", "expected"),
    [
        ("ok", [], "ok"),
        ("ok", ["critical"], "ok"),
        ("ok", ["warning", "ok"], "ok"),
        ("ok", ["warning", "critical"], "warning"),
        ("ok", ["critical", "critical"], "critical"),
        ("warning", ["critical", "ok"], "warning"),
        ("critical", ["ok", "warning"], "warning"),
        ("critical", ["warning", "ok", "ok"], "ok"),
    ],
)
def test_a_level_changes_once_two_looks_agree(now: Level, looks: list[Level], expected: Level):
    assert settled_level(now, looks) == expected


@given(st.lists(SHARES, min_size=2, max_size=40))
def test_one_bad_look_among_good_ones_tells_nothing(severities: list[float]):
    looks: list[Level] = []
    now: Level = "ok"
    for one in (
        severity if place % 2 else 0.29 * severity for place, severity in enumerate(severities)
    ):
        looks.append(level_of(one, now=now))
        now = settled_level(now, looks)
        assert now == "ok"


def test_a_report_groups_scores_and_recommends_the_most_telling_first():
    findings = {
        "latency_tail": finding(0.5, 0.5, "statistical"),
        "quality_drop": finding(0.8, 1.0),
        "success_drop": finding(0.9, 0.0),
    }
    report = report_of(findings, level="critical", actions=ACTIONS)
    assert list(report.families) == list(FAMILIES)
    assert report.families["performance"] == {"quality_drop": 1.0}
    assert report.families["statistical"] == {"latency_tail": 0.5}
    assert report.families["importance_ratio"] == {}
    assert report.recommended_actions == [ACTIONS["quality_drop"], ACTIONS["latency_tail"]]
    assert report.signals["success_drop"] == {"value": 1.0, "baseline": 0.5, "score": 0.0}
    assert report.payload()["level"] == "critical"
    assert report.payload()["severity"] == pytest.approx(1 - 0.2 * 0.75)


def test_every_detector_has_a_family_and_recommended_actions():
    assert set(ACTIONS) == {*SERVING_DETECTORS, *TRAINING_DETECTORS}
    assert set(RESPONSES) <= set(TRAINING_DETECTORS)
    assert all(text.strip() for text in ACTIONS.values())
    families = {one.family for one in SERVING_DETECTORS.values()}
    assert families == {"statistical", "geometric_pattern", "performance"}
    assert {family for family, _ in TRAINING_DETECTORS.values()} == set(FAMILIES)


def test_an_alarm_that_would_roll_back_is_critical_and_two_others_are_together():
    assert training_report({"reward_drop": alarm()}, []).level == "critical"
    one = training_report({"dead_groups": alarm()}, [])
    assert (one.severity, one.level) == (0.5, "warning")
    both = training_report({"dead_groups": alarm(), "length_runaway": alarm(None)}, [])
    assert (both.severity, both.level) == (0.75, "critical")
    assert both.families["statistical"] == {"length_runaway": 1.0}
    for name, response in RESPONSES.items():
        level = training_report({name: alarm()}, []).level
        assert (level == "critical") == (response.action == "roll_back")


@pytest.mark.parametrize(
    ("metric", "value", "score"),
    [
        # Effective sample: nothing at 0.8, certain at 0.5; (0.8 - 0.65) / 0.3 = 0.5
        ("ratio/effective_sample_fraction", 0.98, 0.0),
        ("ratio/effective_sample_fraction", 0.65, 0.5),
        ("ratio/effective_sample_fraction", 0.2, 1.0),
        # Divergence: nothing at 0.1, certain at 0.5
        ("kl_old/k1", 0.02, 0.0),
        ("kl_old/k1", 0.2, 0.25),
        ("kl_old/k1", 4.0, 1.0),
    ],
)
def test_ratios_have_bounds_that_need_no_baseline(metric: str, value: float, score: float):
    # The median of the last five that have the metric: an early round and a single one do nothing.
    rounds = [{metric: 9.9}, *[{metric: value}] * 3, {metric: None}, {}, {metric: 0.0}, {metric: 8}]
    report = training_report({}, rounds)
    (found,) = report.signals.values()
    assert found["value"] == value
    assert found["score"] == pytest.approx(score)
    assert report.severity == pytest.approx(0.6 * score)
    assert sum(len(scores) for scores in report.families.values()) == (score > 0)
    assert LEVELS.index(report.level) == (0.6 * score >= 0.4)
