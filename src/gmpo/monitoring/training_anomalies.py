"""The four families where something is trained: alarms of the guard, and bounds on ratios.

The guard judges rounds against frozen baselines and says yes or no, calibrated on healthy runs; an
alarm whose cause goes on counts as certain here. Ratios have two bounds besides that need no
baseline, since both figures are 1 and 0 where nothing has moved.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from statistics import median
from typing import Any

from gmpo.monitoring.actions import ACTIONS
from gmpo.monitoring.severity import (
    AnomalyReport,
    Family,
    Finding,
    Level,
    joint_severity,
    level_of,
    report_of,
)

__all__ = [
    "RATIO_BOUNDS",
    "TRAINING_DETECTORS",
    "RatioBound",
    "is_left_out",
    "training_report",
]

_RECENT_ROUNDS = 5
_CRITICAL, _WARNING, _NOTE = 0.8, 0.5, 0.3

TRAINING_DETECTORS: Mapping[str, tuple[Family, float]] = {
    "gradient_growth": ("statistical", _CRITICAL),
    "gradient_spike": ("statistical", _WARNING),
    "non_finite": ("statistical", _CRITICAL),
    "entropy_surge": ("statistical", _CRITICAL),
    "entropy_collapse": ("statistical", _WARNING),
    "length_runaway": ("statistical", _WARNING),
    # Its metric is how far arithmetic and geometric means of the ratios lie apart.
    "ratio_explosion": ("geometric_pattern", _CRITICAL),
    "sampler_mismatch": ("importance_ratio", _CRITICAL),
    "ratio_spread": ("importance_ratio", 0.6),
    "policy_jump": ("importance_ratio", 0.6),
    "reward_drop": ("performance", _CRITICAL),
    "held_out_drop": ("performance", _CRITICAL),
    "dead_groups": ("performance", _WARNING),
    "weights_disturbed": ("statistical", _CRITICAL),
    "reward_missing": ("performance", _WARNING),
}
"""Family and weight by detector: the guard's alarms, and the bounds on ratios."""


@dataclass(frozen=True, kw_only=True)
class RatioBound:
    """A score that grows from 0 to 1 between two values of a metric."""

    metric: str
    nothing_at: float
    certain_at: float

    def score(self, value: float) -> float:
        """In 0..1."""
        share = (value - self.nothing_at) / (self.certain_at - self.nothing_at)
        return min(1.0, max(0.0, share))


RATIO_BOUNDS: Mapping[str, RatioBound] = {
    "ratio_spread": RatioBound(
        metric="ratio/effective_sample_fraction", nothing_at=0.8, certain_at=0.5
    ),
    "policy_jump": RatioBound(metric="kl_old/k1", nothing_at=0.1, certain_at=0.5),
}
"""By detector."""


def is_left_out(alarm: Mapping[str, Any]) -> bool:
    """Whether the alarm is about an optimizer step that was left out, which needs nothing.

    Args:
        alarm: an event of the guard; one that is not from a run's file has no `taken`, and is none.
    """
    return alarm.get("taken") == "skip_step"


def training_report(
    alarms: Mapping[str, Mapping[str, Any]],
    rounds: Sequence[Mapping[str, float | None]],
    *,
    now: Level = "ok",
) -> AnomalyReport:
    """What is out of the ordinary in a run now.

    Args:
        alarms: of the guard whose cause goes on: `value` and `baseline` by alarm, and `taken` of
            a step left out, which weighs less than a spike whose steps were taken.
        rounds: metrics of the last rounds; of the bounds, the last five that have the metric count.
        now: level that holds, from the round before; it is left below where it is entered.
    """
    findings = {}
    for name, alarm in alarms.items():
        found = _finding(name, score=1.0, value=alarm["value"], baseline=alarm["baseline"])
        findings[name] = replace(found, weight=_NOTE) if is_left_out(alarm) else found
    for name, bound in RATIO_BOUNDS.items():
        seen = _recent(rounds, bound.metric)
        if seen:
            value = median(seen)
            findings[name] = _finding(name, score=bound.score(value), value=value, baseline=None)
    level = level_of(joint_severity(findings), now=now)
    return report_of(findings, level=level, actions=ACTIONS)


def _recent(rounds: Sequence[Mapping[str, float | None]], metric: str) -> Collection[float]:
    # From the end: a run's rounds are judged one after the other, each with all those before it.
    values = (metrics.get(metric) for metrics in reversed(rounds))
    return list(islice((value for value in values if value is not None), _RECENT_ROUNDS))


def _finding(name: str, *, score: float, value: float | None, baseline: float | None) -> Finding:
    family, weight = TRAINING_DETECTORS[name]
    return Finding(family=family, weight=weight, score=score, value=value, baseline=baseline)
