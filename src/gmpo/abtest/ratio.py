"""Sample-ratio mismatch: whether the arms grow in the shares that they were meant to have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.special import gammaln

__all__ = ["ALARM_ODDS", "RatioCheck", "check_ratio", "log_bayes_factors"]

ALARM_ODDS = 1000.0
"""Bayes factor of the alarm: with right shares it is ever reached with probability 1/1000."""

_CONCENTRATION = 1e4
"""Of the alternative around the expected shares: it looks for small leaks, a few percent."""


@dataclass(frozen=True, kw_only=True)
class RatioCheck:
    """What the sequential test of the shares found.

    Attributes:
        counts: units of each arm.
        expected: share that each arm should have.
        bayes_factor: largest so far, of other shares against the expected ones.
        p_value: 1 / bayes_factor, at most 1; valid at every look.
        alarm: whether the Bayes factor ever passed 1000.
        alarm_unit: number of the unit at which it first did; None without alarm.
    """

    counts: dict[str, int]
    expected: dict[str, float]
    bayes_factor: float
    p_value: float
    alarm: bool
    alarm_unit: int | None


def check_ratio(arms: Int[np.ndarray, " units"], weights: Mapping[str, float]) -> RatioCheck:
    """The test of a split, unit by unit.

    Args:
        arms: of each unit, in the order of assignment, its place among the names of `weights`.
        weights: share that each arm should have, above 0.
    """
    shares = np.array(list(weights.values()))
    chosen = arms[..., None] == np.arange(len(shares))
    counts = np.cumsum(chosen, axis=0)
    factors = log_bayes_factors(counts, shares)
    highest = float(factors.max(initial=0.0))
    above = np.flatnonzero(factors > math.log(ALARM_ODDS))
    totals = counts[-1] if len(counts) else np.zeros(len(shares), dtype=int)
    return RatioCheck(
        counts={name: int(total) for name, total in zip(weights, totals, strict=True)},
        expected=dict(weights),
        bayes_factor=math.exp(min(highest, 700.0)),  # a float ends at e^709
        p_value=math.exp(-highest),
        alarm=bool(len(above)),
        alarm_unit=int(above[0]) + 1 if len(above) else None,
    )


def log_bayes_factors(
    counts: Int[np.ndarray, "*looks arms"], shares: Float[np.ndarray, " arms"]
) -> Float[np.ndarray, "*looks"]:
    """Log Bayes factor of a Dirichlet alternative against the expected shares.

    log of Dirichlet-multinomial(counts; 10^4 shares) over multinomial(counts; shares). As a
    sequence in the number of units it is a martingale under the expected shares, so it ever
    exceeds b with probability at most 1 / b. Source: arXiv 2011.03567.
    """
    prior = _CONCENTRATION * shares
    total = counts.sum(axis=-1)
    marginal = gammaln(_CONCENTRATION) - gammaln(_CONCENTRATION + total)
    marginal = marginal + (gammaln(prior + counts) - gammaln(prior)).sum(axis=-1)
    factors: Float[np.ndarray, "*looks"] = marginal - (counts * np.log(shares)).sum(axis=-1)
    return factors
