"""Intervals and tests on counts and scores; numpy only."""

from __future__ import annotations

import math
from statistics import NormalDist

__all__ = ["wilson_interval"]


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
