"""Differences of two rows of times that were measured in turns, with 95 % intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.float64]

_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How much longer one row of times is than another, with a 95 % interval."""

    value: float
    low: float
    high: float


def quantile_difference(less: Times, more: Times, quantile: float) -> Difference:
    """`more`'s quantile less `less`'s."""
    return _with_interval(
        lambda drawn: float(
            np.quantile(more[drawn], quantile) - np.quantile(less[drawn], quantile)
        ),
        len(less),
    )


def quantile_of_differences(less: Times, more: Times, quantile: float) -> Difference:
    """The quantile of what `more` is longer than `less`, pair by pair."""
    longer = more - less
    return _with_interval(lambda drawn: float(np.quantile(longer[drawn], quantile)), len(longer))


def shown(difference: dict[str, float]) -> str:
    """A `Difference`, as a dictionary, in words."""
    low, high = difference["low"], difference["high"]
    return f"{difference['value']:.2f} ms ({low:.2f} to {high:.2f})"


def _with_interval(of_pairs: Callable[[NDArray[np.intp]], float], num_pairs: int) -> Difference:
    """The figure of all pairs; the interval is from pairs drawn with replacement.

    Pairs stay together, because a machine that stalls for a moment holds up both.
    """
    draws = np.random.default_rng(0)
    resampled = [of_pairs(draws.integers(num_pairs, size=num_pairs)) for _ in range(_RESAMPLES)]
    low, high = np.quantile(resampled, [0.025, 0.975]).tolist()
    return Difference(value=of_pairs(np.arange(num_pairs)), low=low, high=high)
