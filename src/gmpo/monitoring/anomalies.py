"""Whether answers have become unlike those of before, judged block by block.

Nothing here reads a clock or a store: figures of a block of answers and what is remembered go in, a
report and what is remembered next come out. A detector needs two things to speak, so that neither
noise nor a shift that nobody would feel raises an alarm: a cumulative sum over deviations from a
frozen baseline that is improbable while nothing has changed, and a recent level that is off by an
amount that matters. Ratios of policies and gradients do not exist where nothing is trained; those
are judged by `gmpo.monitoring.training_anomalies`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from gmpo.detectors import (
    Baseline,
    Direction,
    cumulative_sum,
    robust_baseline,
    scaled,
    tail_decades,
)
from gmpo.monitoring.actions import ACTIONS
from gmpo.monitoring.severity import (
    AnomalyReport,
    Family,
    Finding,
    Level,
    joint_severity,
    level_of,
    report_of,
    settled_level,
)

__all__ = [
    "SERVING_DETECTORS",
    "WARM_UP_BLOCKS",
    "AnomalyState",
    "Detector",
    "DetectorState",
    "Figure",
    "judge_block",
]

WARM_UP_BLOCKS = 60
"""Blocks of the baseline: an hour of a block a minute."""
_RECENT_BLOCKS = 7
_FEWEST_VALUES = 10
"""A figure of fewer answers is not judged."""
_SMALLEST_SHARE = 0.01
"""A share's chance is taken for at least this, so that the first failure ever is no certainty."""
_EFFECT_SCALES = 3.0
"""The recent level must lie this many scales of the baseline away too."""
_FROM_DECADES = 4.0
_FULL_DECADES = 8.0
_LARGEST_DECADES = 10.0
"""A cumulative sum grows no further, so that it comes down again once the cause is over."""


@dataclass(frozen=True, kw_only=True)
class Detector:
    """How one detector reads its signal.

    Attributes:
        family: it belongs to.
        signal: name of the figure.
        direction: that is bad.
        weight: severity of its surest finding alone, 0..1.
        effect: smallest deviation of the recent level that matters, in the signal's unit.
        smallest_scale: of the baseline, in the signal's unit.
        is_share: whether the figure is a share of answers, which scatters by their number.
        at_once: bound on a single block's figure that needs no baseline.
    """

    family: Family
    signal: str
    direction: Direction
    weight: float
    effect: float
    smallest_scale: float
    is_share: bool = False
    at_once: float | None = None

    @property
    def sign(self) -> int:
        """1 if more is bad."""
        return 1 if self.direction == "up" else -1


SERVING_DETECTORS: Mapping[str, Detector] = {
    "success_drop": Detector(
        family="performance",
        signal="success",
        direction="down",
        weight=0.9,
        effect=0.05,
        smallest_scale=0.005,
        is_share=True,
        at_once=0.5,
    ),
    "quality_drop": Detector(
        family="performance",
        signal="quality",
        direction="down",
        weight=0.8,
        effect=0.1,
        smallest_scale=0.01,
    ),
    "latency_rise": Detector(
        family="performance",
        signal="log_latency",
        direction="up",
        weight=0.8,
        effect=math.log(1.8),
        smallest_scale=0.05,
    ),
    "latency_tail": Detector(
        family="statistical",
        signal="log_latency_p95",
        direction="up",
        weight=0.5,
        effect=math.log(3),
        smallest_scale=0.1,
    ),
    "cut_share_rise": Detector(
        family="statistical",
        signal="cut_share",
        direction="up",
        weight=0.5,
        effect=0.15,
        smallest_scale=0.02,
        is_share=True,
    ),
    "memory_growth": Detector(
        family="statistical",
        signal="log_memory",
        direction="up",
        weight=0.5,
        effect=math.log(1.5),
        smallest_scale=0.05,
    ),
    "token_probability_drop": Detector(
        family="geometric_pattern",
        signal="mean_logprob",
        direction="down",
        weight=0.6,
        effect=0.2,
        smallest_scale=0.02,
    ),
    # Rewards that are gamed and texts that repeat themselves make tokens more probable.
    "token_probability_rise": Detector(
        family="geometric_pattern",
        signal="mean_logprob",
        direction="up",
        weight=0.6,
        effect=0.2,
        smallest_scale=0.02,
    ),
}
"""By name. Signals in logarithms are of seconds and bytes; log-probabilities are nats a token."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One signal of a block.

    Attributes:
        value: finite, in the signal's unit.
        count: answers that it was taken over; None where it is not of answers.
    """

    value: float
    count: int | None


@dataclass(frozen=True, kw_only=True)
class DetectorState:
    """What one detector remembers: plain numbers.

    Attributes:
        warm_up: figures until the baseline is fixed.
        baseline: None during warm-up; never changes afterwards.
        recent: figures of the last blocks, at most 7.
        total: cumulative sum, in deviations.
    """

    warm_up: tuple[float, ...] = ()
    baseline: Baseline | None = None
    recent: tuple[float, ...] = ()
    total: float = 0.0


@dataclass(frozen=True, kw_only=True)
class AnomalyState:
    """What is remembered between blocks.

    Attributes:
        detectors: by name.
        looks: levels of the last two blocks on their own.
        level: that holds.
    """

    detectors: Mapping[str, DetectorState] = field(default_factory=dict)
    looks: tuple[Level, ...] = ()
    level: Level = "ok"

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> AnomalyState:
        """The state whose `dataclasses.asdict` went through JSON."""
        detectors = {
            name: DetectorState(
                warm_up=tuple(one["warm_up"]),
                baseline=None if one["baseline"] is None else Baseline(**one["baseline"]),
                recent=tuple(one["recent"]),
                total=one["total"],
            )
            for name, one in record["detectors"].items()
        }
        return cls(detectors=detectors, looks=tuple(record["looks"]), level=record["level"])

    @classmethod
    def from_baselines(cls, baselines: Mapping[str, Mapping[str, float]]) -> AnomalyState:
        """The state that begins with baselines found earlier, as `baselines` gave them."""
        detectors = {
            name: DetectorState(baseline=Baseline(center=one["center"], scale=one["scale"]))
            for name, one in baselines.items()
            if name in SERVING_DETECTORS  # another release may have had others
        }
        return cls(detectors=detectors)

    def at_rest(self) -> AnomalyState:
        """What is left of it once nobody asks any more: baselines, and warm-ups that had begun."""
        detectors = {
            name: replace(one, recent=(), total=0.0) for name, one in self.detectors.items()
        }
        return AnomalyState(detectors=detectors)

    def baselines(self) -> dict[str, dict[str, float]]:
        """Those that are fixed, by detector."""
        return {
            name: {"center": one.baseline.center, "scale": one.baseline.scale}
            for name, one in self.detectors.items()
            if one.baseline is not None
        }


def judge_block(
    figures: Mapping[str, Figure], state: AnomalyState, *, warm_up_blocks: int = WARM_UP_BLOCKS
) -> tuple[AnomalyReport, AnomalyState]:
    """The report of a block of answers, and what is remembered next.

    A signal that the block does not have, or of fewer than 10 answers, is not judged.

    Args:
        figures: by signal.
        state: after the block before.
        warm_up_blocks: figures of a baseline, at least 1.
    """
    findings: dict[str, Finding] = {}
    detectors = dict(state.detectors)
    for name, detector in SERVING_DETECTORS.items():
        figure = figures.get(detector.signal)
        if figure is None or (figure.count is not None and figure.count < _FEWEST_VALUES):
            continue
        before = detectors.get(name, DetectorState())
        after = _followed(detector, figure, before, warm_up_blocks)
        detectors[name] = after
        findings[name] = _finding(detector, figure, after)
    severity = joint_severity(findings)
    looks = (*state.looks, level_of(severity, now=state.level))[-2:]
    level = settled_level(state.level, looks)
    report = report_of(findings, level=level, actions=ACTIONS)
    return report, AnomalyState(detectors=detectors, looks=looks, level=level)


def _followed(
    detector: Detector, figure: Figure, state: DetectorState, warm_up_blocks: int
) -> DetectorState:
    recent = (*state.recent, figure.value)[-_RECENT_BLOCKS:]
    if state.baseline is None:
        warm_up = (*state.warm_up, figure.value)
        if len(warm_up) < warm_up_blocks:
            return replace(state, warm_up=warm_up, recent=recent)
        baseline = robust_baseline(warm_up, smallest_scale=detector.smallest_scale)
        return DetectorState(baseline=baseline, recent=recent)
    used = state.baseline
    if detector.is_share and figure.count is not None:
        used = replace(used, scale=max(used.scale, _deviation_of_share(used.center, figure.count)))
    (z,) = scaled([figure.value], used)
    total = cumulative_sum(state.total, float(z), direction=detector.direction)
    largest = _LARGEST_DECADES / tail_decades(1.0)
    return replace(state, recent=recent, total=min(total, largest))


def _finding(detector: Detector, figure: Figure, state: DetectorState) -> Finding:
    level = median(state.recent)
    score = 0.0
    bound = detector.at_once
    if bound is not None and detector.sign * (figure.value - bound) > 0:
        score, level = 1.0, figure.value
    elif state.baseline is not None and _matters(detector, level, state.baseline):
        beyond = (tail_decades(state.total) - _FROM_DECADES) / (_FULL_DECADES - _FROM_DECADES)
        score = min(1.0, max(0.0, beyond))
    return Finding(
        family=detector.family,
        weight=detector.weight,
        score=score,
        value=level,
        baseline=None if state.baseline is None else state.baseline.center,
    )


def _matters(detector: Detector, level: float, baseline: Baseline) -> bool:
    least = max(detector.effect, _EFFECT_SCALES * baseline.scale)
    return detector.sign * (level - baseline.center) > least


def _deviation_of_share(share: float, count: int) -> float:
    chance = min(max(share, _SMALLEST_SHARE), 1 - _SMALLEST_SHARE)
    return math.sqrt(chance * (1 - chance) / count)
