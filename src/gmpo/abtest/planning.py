"""How many units an experiment needs, and when it is likely to stop."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from gmpo.abtest.sequences import boundary

__all__ = [
    "StoppingTimes",
    "difference_deviation",
    "required_units",
    "share_deviation",
    "stopping_times",
]

_MOST_UNITS = 10**9


@dataclass(frozen=True, kw_only=True)
class StoppingTimes:
    """When an experiment that is looked at all the time would be decided.

    Attributes:
        power: probability that the sequence excludes no difference by `max_units`.
        median_units: units at which half of all experiments have stopped; infinite where fewer do.
        mean_units: average units used, counting `max_units` where it is not decided.
        max_units: the most that are looked at.
    """

    power: float
    median_units: float
    mean_units: float
    max_units: int


def share_deviation(*, control: float, candidate: float, candidate_weight: float) -> float:
    """`difference_deviation` of two success rates between 0 and 1."""
    return difference_deviation(
        control=math.sqrt(control * (1 - control)),
        candidate=math.sqrt(candidate * (1 - candidate)),
        candidate_weight=candidate_weight,
    )


def difference_deviation(*, control: float, candidate: float, candidate_weight: float) -> float:
    """d such that the difference of two means has standard error d / sqrt(units of both arms).

    sqrt(s_control^2 / (1 - w) + s_candidate^2 / w).

    Args:
        control: standard deviation of a unit in that arm; of the log for latencies.
        candidate: standard deviation of a unit in that arm.
        candidate_weight: w, the candidate's share of the units, between 0 and 1.
    """
    return math.sqrt(control**2 / (1 - candidate_weight) + candidate**2 / candidate_weight)


def required_units(
    effect: float, deviation: float, *, alpha: float, tuned_for: float, power: float
) -> int:
    """Units of both arms after which a look finds the effect with this probability.

    The smallest n with Phi(|effect| sqrt(n) / deviation - boundary(n)) >= power. Looks before it
    may find it too, so the power of a running experiment is higher still.

    Raises:
        ValueError: the effect is 0, the deviation not above 0, the power not between 0 and 1, or
            the number above 10^9.
    """
    if effect == 0 or not deviation > 0 or not 0 < power < 1:
        raise ValueError(
            f"effect is {effect}, deviation {deviation}, power {power}; need an effect other than "
            "0, a deviation above 0 and a power between 0 and 1"
        )

    def finds(units: int) -> bool:
        distance = abs(effect) * math.sqrt(units) / deviation
        return float(ndtr(distance - boundary(units, alpha=alpha, tuned_for=tuned_for))) >= power

    high = 1
    while not finds(high):
        high *= 2
        if high > _MOST_UNITS:
            raise ValueError(
                f"an effect of {effect} at deviation {deviation} needs more than {_MOST_UNITS} "
                "units; look for a larger effect"
            )
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if finds(middle) else (middle, high)
    return high


def stopping_times(
    effect: float,
    deviation: float,
    *,
    alpha: float,
    tuned_for: float,
    looks: tuple[int, int],
    seed: int = 0,
) -> StoppingTimes:
    """When the sequence first excludes 0 in 4,000 simulated experiments of this effect.

    The estimate is drawn as a Gaussian walk, which is what it is like for all but small numbers of
    units, and looked at 500 times at most, about evenly spread.

    Args:
        effect: true difference.
        deviation: of the difference; see `difference_deviation`.
        alpha: probability that the sequence ever misses.
        tuned_for: units after which it is narrowest.
        looks: units of both arms at the first look and at the last.
        seed: of the draws.
    """
    first, last = looks
    units = np.unique(np.linspace(first, last, 500).astype(int))
    steps = np.diff(units, prepend=0)
    draws = np.random.default_rng(seed).standard_normal((4000, len(units)))
    walk = np.cumsum(draws * np.sqrt(steps), axis=1) * deviation + effect * units
    distance = np.abs(walk) / (deviation * np.sqrt(units))
    crossed = distance > boundary(units, alpha=alpha, tuned_for=tuned_for)
    stopped = crossed.any(axis=1)
    at = np.where(stopped, units[crossed.argmax(axis=1)], last)
    share = float(stopped.mean())
    return StoppingTimes(
        power=share,
        median_units=float(np.median(at)) if share > 0.5 else math.inf,
        mean_units=float(at.mean()),
        max_units=last,
    )
