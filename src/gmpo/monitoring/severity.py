"""How bad findings of several detectors are together, and when that is said."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = [
    "FAMILIES",
    "LEVELS",
    "AnomalyReport",
    "Family",
    "Finding",
    "Level",
    "joint_severity",
    "level_of",
    "report_of",
    "settled_level",
]

Family = Literal["statistical", "geometric_pattern", "importance_ratio", "performance"]
FAMILIES: tuple[Family, ...] = (
    "statistical",
    "geometric_pattern",
    "importance_ratio",
    "performance",
)
"""What detectors look at: single figures, geometric means, ratios of policies, results."""

Level = Literal["ok", "warning", "critical"]
LEVELS: tuple[Level, ...] = ("ok", "warning", "critical")

_ENTERED_AT: Mapping[Level, float] = {"warning": 0.4, "critical": 0.7}
_LEFT_BELOW: Mapping[Level, float] = {"warning": 0.3, "critical": 0.6}
_AGREEING = 2
"""Looks in a row that must agree before a level changes."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one detector says now.

    Attributes:
        family: it belongs to.
        weight: severity in 0..1 of its surest finding alone.
        score: 0 for nothing to 1 for certainty.
        value: of the signal, recent values together; None if there is no number.
        baseline: where the signal lay while it was healthy; None for a bound, or before it is
            known.
    """

    family: Family
    weight: float
    score: float
    value: float | None
    baseline: float | None


@dataclass(frozen=True, kw_only=True)
class AnomalyReport:
    """What is out of the ordinary now.

    Attributes:
        severity: 0 to 1, of all findings together.
        level: that is told.
        families: scores above 0 by detector, for each of the four families.
        signals: value, baseline and score by detector, of all detectors that could judge.
        recommended_actions: of detectors that found something, the most telling first.
    """

    severity: float
    level: Level
    families: Mapping[Family, Mapping[str, float]]
    signals: Mapping[str, Mapping[str, float | None]]
    recommended_actions: Sequence[str] = field(default=())

    def payload(self) -> dict[str, Any]:
        """The payload of an "anomaly" event."""
        return {
            "severity": self.severity,
            "level": self.level,
            "families": {family: dict(found) for family, found in self.families.items()},
            "signals": {name: dict(signal) for name, signal in self.signals.items()},
            "recommended_actions": list(self.recommended_actions),
        }


def joint_severity(findings: Mapping[str, Finding]) -> float:
    """1 - prod(1 - weight * score): each finding takes its share of what the others left.

    The noisy-or of independent signs, so that several weak ones together are a strong one. Signs of
    one cause are not independent; weights below 1 keep two of those from looking certain.
    """
    return 1 - math.prod(1 - one.weight * one.score for one in findings.values())


def level_of(severity: float, *, now: Level = "ok") -> Level:
    """The level of a severity in 0..1: warning from 0.4, critical from 0.7.

    A level that holds now is left only below 0.3 or 0.6.
    """
    reached: Level = "ok"
    for level in LEVELS[1:]:
        is_held = LEVELS.index(now) >= LEVELS.index(level)
        if severity >= (_LEFT_BELOW if is_held else _ENTERED_AT)[level]:
            reached = level
    return reached


def settled_level(now: Level, looks: Sequence[Level]) -> Level:
    """The level after these looks; it changes once two in a row lie on the same side of it.

    Args:
        now: that holds.
        looks: as `level_of` gave them, the newest last.
    """
    places = [LEVELS.index(level) for level in looks[-_AGREEING:]]
    held = LEVELS.index(now)
    if len(places) == _AGREEING and min(places) > held:
        return LEVELS[min(places)]
    if len(places) == _AGREEING and max(places) < held:
        return LEVELS[max(places)]
    return now


def report_of(
    findings: Mapping[str, Finding], *, level: Level, actions: Mapping[str, str]
) -> AnomalyReport:
    """The report of these findings.

    Args:
        findings: by detector.
        level: that holds with them.
        actions: what is recommended, by detector; each that found something is in it.
    """
    telling = sorted(
        (name for name, one in findings.items() if one.score > 0),
        key=lambda name: -findings[name].weight * findings[name].score,
    )
    return AnomalyReport(
        severity=joint_severity(findings),
        level=level,
        families={family: _scores(findings, telling, family) for family in FAMILIES},
        signals={
            name: {"value": one.value, "baseline": one.baseline, "score": one.score}
            for name, one in findings.items()
        },
        recommended_actions=list(dict.fromkeys(actions[name] for name in telling)),
    )


def _scores(
    findings: Mapping[str, Finding], names: Sequence[str], family: Family
) -> dict[str, float]:
    return {name: findings[name].score for name in names if findings[name].family == family}
