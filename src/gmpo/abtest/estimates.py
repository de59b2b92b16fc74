"""Means of two arms and their difference, with the unit of assignment as the unit of evidence.

A unit may send many requests, and those of one unit are alike. So a request counts in the mean, but
only units count as evidence: the standard error comes from the spread of whole units (the delta
method for a ratio of sums).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from gmpo.abtest.sequences import Interval, boundary, sequential_p_value

__all__ = ["Difference", "UnitTotals", "difference", "mean_influence", "paired_difference"]


@dataclass(frozen=True, kw_only=True)
class UnitTotals:
    """What the units of one arm add up to.

    Attributes:
        sums: sum of the metric over each unit's requests, 0 where it has none.
        counts: number of requests that the metric is known of.
        covariates: of each unit, known before it was assigned; NaN where unknown. None without.
    """

    sums: Float[np.ndarray, " units"]
    counts: Float[np.ndarray, " units"]
    covariates: Float[np.ndarray, " units"] | None = None

    @property
    def num_measured(self) -> int:
        """Units with at least one request that the metric is known of."""
        return int(np.count_nonzero(self.counts))

    @property
    def mean(self) -> float:
        """Mean over requests; NaN without any."""
        total = float(self.counts.sum())
        return float(self.sums.sum()) / total if total else math.nan


@dataclass(frozen=True, kw_only=True)
class Difference:
    """An estimated difference, candidate less control, or of pairs.

    Attributes:
        estimate: on the metric's scale, after adjustment for covariates.
        standard_error: of the estimate; 0 where nothing varied yet.
        num_units: measured units that it rests on, of both arms together.
        variance_kept: adjusted variance over unadjusted variance; 1 without covariates.
    """

    estimate: float
    standard_error: float
    num_units: int
    variance_kept: float = 1.0

    def interval(self, *, alpha: float, tuned_for: float) -> Interval:
        """The confidence sequence at this look; unbounded where nothing varied yet."""
        if not self.standard_error > 0:
            return Interval(low=-math.inf, high=math.inf)
        half = self.standard_error * float(
            boundary(self.num_units, alpha=alpha, tuned_for=tuned_for)
        )
        return Interval(low=self.estimate - half, high=self.estimate + half)

    def p_value(self, *, alpha: float, tuned_for: float) -> float:
        """Of no difference, valid at every look; 1 where nothing varied yet."""
        if not self.standard_error > 0:
            return 1.0
        return sequential_p_value(
            self.estimate / self.standard_error, self.num_units, alpha=alpha, tuned_for=tuned_for
        )


def difference(control: UnitTotals, candidate: UnitTotals) -> Difference | None:
    """Candidate's mean less control's; None while an arm has fewer than two measured units.

    With covariates x it is adjusted by theta (mean x of candidate - mean x of control), theta being
    the pooled slope of the units' influence on x (CUPED). Because x was known before assignment the
    adjustment is 0 on average and only takes noise away. Units without x stand at the mean of the
    others, which leaves them as they are.
    """
    arms = (control, candidate)
    if min(arm.num_measured for arm in arms) < 2:
        return None
    influences = [mean_influence(arm.sums, arm.counts) for arm in arms]
    plain = sum(_variance_of_mean(influence) for influence in influences)
    estimate, variance = candidate.mean - control.mean, plain
    covariates = _centered(arms)
    if covariates is not None:
        shift = float(covariates[1].mean() - covariates[0].mean())
        within = [x - x.mean() for x in covariates]
        spread = sum(float(x @ x) for x in within)
        pairs = list(zip(influences, within, strict=True))
        slope = sum(float(z @ x) for z, x in pairs) / spread if spread > 0 else 0.0
        estimate -= slope * shift
        variance = sum(_variance_of_mean(z - slope * x) for z, x in pairs)
    return Difference(
        estimate=estimate,
        standard_error=math.sqrt(variance),
        num_units=sum(arm.num_measured for arm in arms),
        variance_kept=variance / plain if plain > 0 else 1.0,
    )


def paired_difference(
    differences: Float[np.ndarray, " pairs"], units: Int[np.ndarray, " pairs"]
) -> Difference | None:
    """Mean difference of pairs that answer the same request; None below two units.

    What a prompt makes hard for both models cancels in each pair. Pairs of one unit stay together
    as in `difference`.

    Args:
        differences: one a pair.
        units: number of the unit of each pair, from 0.
    """
    sums = np.bincount(units, weights=differences)
    counts = np.bincount(units).astype(float)
    if np.count_nonzero(counts) < 2:
        return None
    return Difference(
        estimate=float(differences.mean()),
        standard_error=math.sqrt(_variance_of_mean(mean_influence(sums, counts))),
        num_units=int(np.count_nonzero(counts)),
    )


def mean_influence(
    sums: Float[np.ndarray, " units"], counts: Float[np.ndarray, " units"]
) -> Float[np.ndarray, " units"]:
    """How far each unit pulls the mean over requests: (sum - mean count) / average count.

    Units without a request pull nothing. The mean's variance is that of the average influence.
    """
    total = counts.sum()
    mean = sums.sum() / total
    influence: Float[np.ndarray, " units"] = (sums - mean * counts) * (len(counts) / total)
    return influence


def _variance_of_mean(influence: np.ndarray) -> float:
    return float(influence.var(ddof=1)) / len(influence)


def _centered(arms: tuple[UnitTotals, UnitTotals]) -> list[np.ndarray] | None:
    """Covariates of both arms, unknown ones at the mean of the known; None where there are none."""
    given = [arm.covariates for arm in arms]
    if given[0] is None or given[1] is None:
        return None
    known: Bool[np.ndarray, " units"] = np.isfinite(np.concatenate([given[0], given[1]]))
    if not known.any():
        return None
    mean = np.concatenate([given[0], given[1]])[known].mean()
    return [np.where(np.isfinite(x), x - mean, 0.0) for x in (given[0], given[1])]
