"""Intervals and tests on counts, scores and paired differences; numpy and scipy only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from scipy.special import nctdtr, stdtrit

__all__ = ["detectable_mean", "paired_t_interval", "sign_flip_p_value", "wilson_interval"]


def wilson_interval(
    num_successes: int, num_trials: int, *, confidence: float = 0.95
) -> tuple[float, float]:
    """Wilson's score interval of a success probability, as fractions.

    It keeps its coverage near 0 and 1 and for few trials, where the normal interval does not.

    Raises:
        ValueError: the counts are not 0 <= successes <= trials with at least one trial.
    """
    if not 0 <= num_successes <= num_trials or num_trials == 0:
        raise ValueError(
            f"need 0 <= successes <= trials and at least one trial, got {num_successes} of "
            f"{num_trials}"
        )
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = num_successes / num_trials
    center = share + z * z / (2 * num_trials)
    half = z * math.sqrt(share * (1 - share) / num_trials + z * z / (4 * num_trials**2))
    scale = 1 + z * z / num_trials
    # Rounding must not put the share itself outside: an error bar cannot have a negative length.
    return (
        max(0.0, min(share, (center - half) / scale)),
        min(1.0, max(share, (center + half) / scale)),
    )


def paired_t_interval(
    differences: Sequence[float], *, confidence: float = 0.95
) -> tuple[float, float]:
    """Student's t interval of the mean of paired differences.

    mean +- t(n - 1) * s / sqrt(n). It supposes that the differences are about normal, which a few
    of them cannot show; `sign_flip_p_value` supposes only that they are as often too large as too
    small.

    Raises:
        ValueError: fewer than two differences, or one that is not finite.
    """
    values = _finite_pairs(differences)
    spread = float(values.std(ddof=1)) / math.sqrt(len(values))
    half = float(stdtrit(len(values) - 1, 0.5 + confidence / 2)) * spread
    return float(values.mean()) - half, float(values.mean()) + half


def sign_flip_p_value(differences: Sequence[float]) -> float:
    """Exact two-sided p of a mean of paired differences, if nothing but chance gave their signs.

    The share of all 2^n choices of signs whose sum is at least as far from 0 as the one seen. It is
    never below 2 / 2^n: 0.5 for two pairs, 0.25 for three, 0.0625 for five.

    Raises:
        ValueError: fewer than two differences, more than 40, or one that is not finite.
    """
    values = _finite_pairs(differences)
    if len(values) > _MOST_PAIRS:
        raise ValueError(
            f"{len(values)} pairs have 2^{len(values)} choices of signs; at most {_MOST_PAIRS} "
            "pairs are counted out"
        )
    # A sum over all pairs is one of the first half plus one of the second: 2 * 2^(n/2) of them.
    half = len(values) // 2
    first, second = _signed_sums(values[:half]), np.sort(_signed_sums(values[half:]))
    # The same numbers added in another order differ in their last bits and still tie.
    bound = abs(float(values.sum())) - 1e-9 * float(np.abs(values).sum())
    if bound <= 0:
        return 1.0
    above = len(second) - np.searchsorted(second, bound - first, side="left")
    below = np.searchsorted(second, -bound - first, side="right")
    return float((above + below).sum()) / 2.0 ** len(values)


def detectable_mean(
    deviation: float, num_pairs: int, *, power: float = 0.8, confidence: float = 0.95
) -> float:
    """The mean difference that a paired t-test of this size finds with this probability.

    delta * s / sqrt(n), where delta is the noncentrality at which t(n - 1, delta) passes the
    test's bound with probability `power`. With few pairs s itself is only roughly known, and so is
    this.

    Args:
        deviation: standard deviation s of the paired differences.
        num_pairs: n.
        power: probability of finding it.
        confidence: of the test's interval.

    Raises:
        ValueError: fewer than two pairs, or a deviation below 0.
    """
    if num_pairs < 2 or not deviation >= 0:
        raise ValueError(
            f"need at least 2 pairs and a deviation of 0 or more, got {num_pairs} pairs and "
            f"{deviation}"
        )
    freedom = num_pairs - 1
    bound = float(stdtrit(freedom, 0.5 + confidence / 2))
    low, high = 0.0, 10 * bound
    for _ in range(60):
        middle = (low + high) / 2
        found = 1 - float(nctdtr(freedom, middle, bound))
        low, high = (middle, high) if found < power else (low, middle)
    return high * deviation / math.sqrt(num_pairs)


_MOST_PAIRS = 40


def _finite_pairs(differences: Sequence[float]) -> np.ndarray:
    values = np.asarray(differences, dtype=float)
    if len(values) < 2 or not np.isfinite(values).all():
        raise ValueError(
            f"need at least two differences, all finite, got {list(differences)}; a single pair "
            "says nothing about chance"
        )
    return values


def _signed_sums(values: np.ndarray) -> np.ndarray:
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums + value, sums - value])
    return sums
