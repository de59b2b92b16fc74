"""Confidence sequences for a quantile of latency: the tail that a mean does not show."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float, Int

from gmpo.abtest.estimates import mean_influence
from gmpo.abtest.sequences import Interval, boundary

__all__ = ["quantile", "quantile_interval"]


def quantile(values: Float[np.ndarray, " n"], level: float) -> float:
    """The smallest value that at least this share of the values does not exceed; NaN for none."""
    if not len(values):
        return math.nan
    return float(np.sort(values)[max(math.ceil(level * len(values)) - 1, 0)])


def quantile_interval(
    values: Float[np.ndarray, " n"],
    units: Int[np.ndarray, " n"],
    *,
    level: float,
    alpha: float,
    tuned_for: float,
) -> Interval:
    """Confidence sequence of a quantile at this look.

    The share of values at or below the true quantile is `level`. The sequence of that share, made
    with whole units as evidence, is turned into values: from the (level - h)-quantile to the
    (level + h)-quantile of what was seen. Nothing is supposed about the shape of the tail; where
    level + h reaches 1 there is no upper end.

    Args:
        values: one a request.
        units: number of the unit of each value, from 0.
        level: of the quantile, between 0 and 1.
        alpha: probability that the sequence ever misses.
        tuned_for: units after which it is to be narrowest.
    """
    unbounded = Interval(low=-math.inf, high=math.inf)
    counts = np.bincount(units).astype(float)
    counts = counts[counts > 0]
    if len(counts) < 2:
        return unbounded
    below = np.bincount(units, weights=values <= quantile(values, level))
    below = below[np.bincount(units) > 0]
    error = math.sqrt(float(mean_influence(below, counts).var(ddof=1)) / len(counts))
    if error == 0:
        return unbounded
    half = error * float(boundary(len(counts), alpha=alpha, tuned_for=tuned_for))
    ordered, size = np.sort(values), len(values)
    low, high = math.ceil((level - half) * size) - 1, math.floor((level + half) * size)
    return Interval(
        low=float(ordered[low]) if low >= 0 else -math.inf,
        high=float(ordered[high]) if high < size else math.inf,
    )
