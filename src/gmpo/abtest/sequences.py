"""Confidence sequences: intervals that hold at every look at once, so that one may always look.

A 95 % confidence interval is right for a look that was fixed beforehand. A confidence sequence
contains the truth at all looks together with probability 1 - alpha, so a test may be read at any
time and ended on what it shows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

__all__ = [
    "Interval",
    "boundary",
    "empirical_bernstein",
    "interval_difference",
    "mixture_rho",
    "sequential_p_value",
]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Where a quantity lies; infinite where the data do not bound it."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def interval_difference(control: Interval, candidate: Interval) -> Interval:
    """Candidate's quantity less control's; right whenever both intervals are.

    So with sequences at alpha / 2 each it ever misses with probability at most alpha.
    """
    return Interval(low=candidate.low - control.high, high=candidate.high - control.low)


def mixture_rho(*, alpha: float, tuned_for: float) -> float:
    """Scale of the normal mixture whose sequence is about narrowest after `tuned_for` units.

    rho = sqrt((-2 ln alpha + ln(1 - 2 ln alpha)) / n*). Source: arXiv 2103.06476v7, equation 161.

    Args:
        alpha: probability that the sequence ever misses the truth, between 0 and 1.
        tuned_for: n*, units of both arms together; near the number that a decision will need.
    """
    doubled = -2 * math.log(alpha)
    return math.sqrt((doubled + math.log1p(doubled)) / tuned_for)


def boundary(
    num_units: Float[np.ndarray, "*looks"] | float, *, alpha: float, tuned_for: float
) -> Float[np.ndarray, "*looks"]:
    """Half-width of the asymptotic confidence sequence after n units, in standard errors.

    sqrt(2 (n rho^2 + 1) ln(sqrt(n rho^2 + 1) / alpha) / (n rho^2)), two-sided. Source: arXiv
    2103.06476v7, equation 9. Asymptotic: it supposes that the standard error is known well, so a
    caller waits for some tens of units an arm before the first look.
    """
    spread = np.asarray(num_units, dtype=float) * mixture_rho(alpha=alpha, tuned_for=tuned_for) ** 2
    inside = np.sqrt(spread + 1) / alpha
    widths: Float[np.ndarray, "*looks"] = np.sqrt(2 * (spread + 1) * np.log(inside) / spread)
    return widths


def sequential_p_value(
    distance: float, num_units: float, *, alpha: float, tuned_for: float
) -> float:
    """p-value that stays valid at every look: at most alpha exactly where the sequence excludes 0.

    1 / e, where e = exp(n rho^2 z^2 / (2 (n rho^2 + 1))) / sqrt(n rho^2 + 1) is the mixture's
    e-value of an estimate z standard errors from 0; at most 1. Source: arXiv 2103.06476v7,
    equation 155.

    Args:
        distance: z, the estimate divided by its standard error.
        num_units: n, of both arms together.
        alpha: at which the sequence is drawn; rho depends on it.
        tuned_for: n* of the sequence.
    """
    spread = num_units * mixture_rho(alpha=alpha, tuned_for=tuned_for) ** 2
    log_e = spread * distance**2 / (2 * (spread + 1)) - math.log(spread + 1) / 2
    return math.exp(-max(log_e, 0.0))


def empirical_bernstein(
    values: Float[np.ndarray, "*rows T"], *, alpha: float
) -> tuple[Float[np.ndarray, "*rows T"], Float[np.ndarray, "*rows T"]]:
    """Lower and upper ends, after each value, for the mean of values between 0 and 1.

    Not asymptotic: it holds for any distribution on [0, 1], from the first value on. Weights
    lambda_t are fixed by the values before t; the ends are
    (sum lambda x -+ (ln(2/alpha) + sum v psi(lambda))) / sum lambda with
    v_t = 4 (x_t - mean_{t-1})^2 and psi(l) = (-ln(1 - l) - l) / 4, cut to [0, 1].
    Source: arXiv 2010.09686, theorem 2 (predictable plug-in empirical Bernstein).

    Args:
        values: in the order in which they came.
        alpha: probability that the true mean is ever outside.

    Raises:
        ValueError: a value is not between 0 and 1.
    """
    if values.size and not (values.min() >= 0 and values.max() <= 1):
        raise ValueError(
            f"values lie between {values.min()} and {values.max()}; the empirical-Bernstein "
            "sequence is for values between 0 and 1"
        )
    count = np.arange(1, values.shape[-1] + 1)
    mean = (0.5 + np.cumsum(values, axis=-1)) / (count + 1)
    variance = (0.25 + np.cumsum((values - mean) ** 2, axis=-1)) / (count + 1)
    mean_before = _shifted(mean, 0.5)
    variance_before = _shifted(variance, 0.25)
    log_term = math.log(2 / alpha)
    weight = np.sqrt(2 * log_term / (variance_before * count * np.log1p(count)))
    weight = np.minimum(weight, 0.5)
    cost = (-np.log1p(-weight) - weight) * (values - mean_before) ** 2
    total = np.cumsum(weight, axis=-1)
    center = np.cumsum(weight * values, axis=-1) / total
    half = (log_term + np.cumsum(cost, axis=-1)) / total
    return np.clip(center - half, 0.0, 1.0), np.clip(center + half, 0.0, 1.0)


def _shifted(values: np.ndarray, first: float) -> np.ndarray:
    """What was known before each value."""
    return np.concatenate([np.full_like(values[..., :1], first), values[..., :-1]], axis=-1)
