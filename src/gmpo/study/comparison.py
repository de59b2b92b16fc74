"""Two arms of a study compared over the same seeds, and what may be said of the difference."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from gmpo.stability import FIGURES, RunFigures
from gmpo.statistics import detectable_mean, paired_t_interval, sign_flip_p_value

__all__ = [
    "IMPROVEMENTS",
    "Comparison",
    "compare_arms",
    "compare_crashes",
    "smallest_p_value",
]

IMPROVEMENTS: Mapping[str, str] = {
    "loss_stability": "loss_variance",
    "gradient_stability": "gradient_norm_deviation",
    "ratio_stability": "log_ratio_range",
    "convergence_speed": "rounds_to_target",
}
"""The article's four improvement figures, each 1 - candidate / baseline of one figure."""

_Verdict = Literal["no difference seen", "lower", "higher", "not measured"]

_CONFIDENCE = 0.95
_POWER = 0.8


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One figure of two arms, paired by seed.

    `effect` and `interval` are candidate - baseline for a figure compared by difference. For one
    compared by ratio they are the geometric mean of candidate / baseline over the pairs and its
    interval, from the differences of logarithms.

    Attributes:
        figure: a name of `FIGURES`, or "crashes".
        baseline: arm compared with.
        candidate: arm compared.
        compared: "difference" or "ratio".
        pairs: seeds that have the figure in both arms.
        left_out: seeds that do not, or of which a run crashed.
        effect: None for fewer than two pairs.
        interval: 95 % t interval of the effect; None for crashes, which are no measurements, and
            where all pairs differ by the same, from which it would have no width.
        p_value: of the exact sign-flip test; it is never below `smallest_p`.
        smallest_p: the smallest p that so many pairs can give.
        detectable: difference that a study of this size and spread finds with 80 % probability, or
            for a ratio the factor above 1 that the baseline is then multiplied or divided by.
            None where all pairs differ by the same, so that there is no spread to go by.
        verdict: "lower" or "higher" of the candidate, only where the interval says so, or without
            one the p-value.
    """

    figure: str
    baseline: str
    candidate: str
    compared: Literal["difference", "ratio"]
    pairs: int
    left_out: int
    effect: float | None
    interval: tuple[float, float] | None
    p_value: float | None
    smallest_p: float | None
    detectable: float | None
    verdict: _Verdict

    @property
    def is_confirmed(self) -> bool:
        """Whether the exact test says so too; with fewer than 6 pairs it never can."""
        is_seen = self.verdict in ("lower", "higher")
        return is_seen and self.p_value is not None and self.p_value <= 1 - _CONFIDENCE

    @property
    def improvement(self) -> float | None:
        """The article's 1 - candidate / baseline; None for a figure compared by difference."""
        return None if self.effect is None or self.compared != "ratio" else 1 - self.effect

    @property
    def improvement_interval(self) -> tuple[float, float] | None:
        """Its 95 % interval."""
        if self.interval is None or self.compared != "ratio":
            return None
        return 1 - self.interval[1], 1 - self.interval[0]

    def as_dict(self) -> dict[str, Any]:
        """Figures for JSON, None for what is beyond a float."""
        figures = asdict(self)
        if self.interval is not None:
            figures["interval"] = [_finite(end) for end in self.interval]
        return figures | {"detectable": _finite(self.detectable)}


def compare_arms(
    baseline: Mapping[int, RunFigures],
    candidate: Mapping[int, RunFigures],
    *,
    names: tuple[str, str],
) -> list[Comparison]:
    """Every figure of `FIGURES`, and crashes.

    A seed of which either run crashed is in the crashes alone: a run that ended early, or whose
    policy is gone, looks steady.

    Args:
        baseline: figures of one arm's runs by seed.
        candidate: of the other's.
        names: of the two arms.
    """
    seeds = sorted(baseline.keys() & candidate.keys())
    whole = [s for s in seeds if baseline[s].crash is None and candidate[s].crash is None]
    comparisons = []
    for figure in FIGURES:
        values = [(baseline[s].values[figure], candidate[s].values[figure]) for s in whole]
        known = [(a, b) for a, b in values if a is not None and b is not None]
        left_out = len(seeds) - len(known)
        comparisons.append(_compare(figure, known, left_out=left_out, names=names))
    comparisons.append(compare_crashes(baseline, candidate, names=names))
    return comparisons


def compare_crashes(
    baseline: Mapping[int, RunFigures],
    candidate: Mapping[int, RunFigures],
    *,
    names: tuple[str, str],
) -> Comparison:
    """Share of runs that crashed, by the exact test alone: with 0 and 1 it is McNemar's."""
    seeds = sorted(baseline.keys() & candidate.keys())
    differences = [
        float(candidate[s].crash is not None) - float(baseline[s].crash is not None) for s in seeds
    ]
    can_tell = len(differences) > 1
    p_value = sign_flip_p_value(differences) if can_tell else None
    effect = statistics.fmean(differences) if can_tell else None
    verdict: _Verdict = "not measured"
    if p_value is not None and effect is not None:
        verdict = _side(effect) if p_value <= 1 - _CONFIDENCE else "no difference seen"
    return Comparison(
        figure="crashes",
        baseline=names[0],
        candidate=names[1],
        compared="difference",
        pairs=len(seeds),
        left_out=0,
        effect=effect,
        interval=None,
        p_value=p_value,
        smallest_p=smallest_p_value(len(seeds)),
        detectable=None,
        verdict=verdict,
    )


def smallest_p_value(num_pairs: int) -> float | None:
    """The smallest two-sided p of the sign-flip test; None for fewer than two pairs."""
    return 2.0 ** (1 - num_pairs) if num_pairs > 1 else None


def _compare(
    figure: str,
    values: Sequence[tuple[float, float]],
    *,
    left_out: int,
    names: tuple[str, str],
) -> Comparison:
    """Of pairs (baseline, candidate)."""
    compared = FIGURES[figure].compared
    if compared == "ratio":  # a logarithm needs both above 0
        positive = [(a, b) for a, b in values if a > 0 and b > 0]
        left_out += len(values) - len(positive)
        differences = [math.log(b / a) for a, b in positive]
    else:
        differences = [b - a for a, b in values]
    effect, interval, p_value, detectable = None, None, None, None
    verdict: _Verdict = "not measured"
    if len(differences) > 1:
        middle = statistics.fmean(differences)
        spread = statistics.stdev(differences)
        p_value = sign_flip_p_value(differences)
        in_unit = _exp if compared == "ratio" else float
        effect = in_unit(middle)
        # Equal differences of decimal figures differ in their last bits.
        if spread > 1e-12 * abs(middle):
            low, high = paired_t_interval(differences, confidence=_CONFIDENCE)
            smallest = detectable_mean(
                spread, len(differences), power=_POWER, confidence=_CONFIDENCE
            )
            interval, detectable = (in_unit(low), in_unit(high)), in_unit(smallest)
            is_seen = not low <= 0 <= high
        else:
            is_seen = p_value <= 1 - _CONFIDENCE
        verdict = _side(middle) if is_seen else "no difference seen"
    return Comparison(
        figure=figure,
        baseline=names[0],
        candidate=names[1],
        compared=compared,
        pairs=len(differences),
        left_out=left_out,
        effect=effect,
        interval=interval,
        p_value=p_value,
        smallest_p=smallest_p_value(len(differences)),
        detectable=detectable,
        verdict=verdict,
    )


def _side(effect: float) -> Literal["lower", "higher"]:
    return "lower" if effect < 0 else "higher"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _exp(value: float) -> float:
    """Infinite where the factor is beyond a float: with two pairs an interval can be that wide."""
    return math.exp(value) if value < 709 else math.inf
