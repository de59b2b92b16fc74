"""Geometric means of positive numbers, and how they react to outliers beside arithmetic ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gmpo.errors import DataError

__all__ = [
    "LargeOutlier",
    "NearZero",
    "SafeGeometricMean",
    "Sensitivity",
    "SignedWeights",
    "TokenWeights",
    "WeightedTokens",
    "compare_sensitivity",
    "token_weights",
]

_GRPO_CLIP = 0.2  # ratio space: 1.2 caps A > 0, 0.8 caps A < 0
_GMPO_CLIP = 0.4  # log space: 1.49 caps A > 0, 0.67 caps A < 0


class SafeGeometricMean:
    """Geometric mean exp(sum_i w_i log x_i) of non-negative values, computed in log space.

    Two guards act, each on its own kind of value:

    1. `epsilon` replaces a zero, whose logarithm does not exist; it is also the least value any
       positive x is given. Smaller epsilon means that a zero weighs more.
    2. `clip_range` bounds the logarithm of a positive x, so that no single measured value has
       unlimited pull. A replaced zero is not clipped again: if it were, `epsilon` would do nothing
       whenever it lies below exp(clip_range[0]), as with the common pair 1e-8 and (-10, 10).

    So 0 becomes epsilon, and x > 0 becomes max(epsilon, clamp(x, e^low, e^high)). This never
    decreases with x. It has a jump at 0 if epsilon < e^low; the default range has none.
    Both methods apply both guards.
    """

    def __init__(
        self, epsilon: float = 1e-8, clip_range: tuple[float, float] = (-20.0, 20.0)
    ) -> None:
        """Keep the two guards.

        Args:
            epsilon: value given to zeros; finite and above 0.
            clip_range: lowest and highest logarithm (nats) of a positive value, low < high,
                both finite; exp(high) must not lie below `epsilon`.

        Raises:
            DataError: an argument is outside its range.
        """
        if not (math.isfinite(epsilon) and epsilon > 0):
            raise DataError(f"epsilon is {epsilon}; it must be a finite number above 0")
        low, high = clip_range
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise DataError(
                f"clip_range is {clip_range}; it must be two finite logarithms, the lower one first"
            )
        if math.log(epsilon) > high:
            raise DataError(
                f"epsilon {epsilon} lies above exp(clip_range[1]) = {math.exp(high):g}, so a zero "
                "would count as more than any positive value; lower epsilon or raise the range"
            )
        self.epsilon = float(epsilon)
        self.clip_range = (float(low), float(high))

    def compute(self, values: ArrayLike) -> float:
        """Geometric mean of `values` with equal weights.

        Args:
            values: one dimension, at least one value, all finite and not negative.

        Raises:
            DataError: a value is negative, NaN or infinite, or there is none.
        """
        return math.exp(float(np.mean(self._safe_logs(values))))

    def compute_with_weights(self, values: ArrayLike, weights: ArrayLike) -> float:
        """Weighted geometric mean of `values`; the weights are divided by their sum.

        Args:
            values: as for `compute`.
            weights: one a value, finite, not negative, not all zero.

        Raises:
            DataError: as for `compute`, or the weights break one of their conditions.
        """
        logs = self._safe_logs(values)
        checked = np.asarray(weights, dtype=np.float64)
        if checked.shape != logs.shape:
            raise DataError(
                f"{checked.size} weights of shape {checked.shape} for {logs.size} values; "
                "give one weight a value"
            )
        _refuse_rows(~np.isfinite(checked), checked, "weights", "finite")
        _refuse_rows(checked < 0, checked, "weights", "0 or more")
        # The largest weight is taken out first: a sum of large finite weights can overflow.
        largest = checked.max()
        if largest == 0:
            raise DataError("all weights are 0, so they cannot be normalised; give one above 0")
        scaled = checked / largest
        return math.exp(float(np.dot(scaled, logs) / scaled.sum()))

    def _safe_logs(self, values: ArrayLike) -> NDArray[np.float64]:
        checked = np.asarray(values, dtype=np.float64)
        if checked.ndim != 1 or checked.size == 0:
            raise DataError(
                f"values have shape {checked.shape}; a geometric mean needs a list of at least one"
            )
        _refuse_rows(~np.isfinite(checked), checked, "values", "finite")
        _refuse_rows(checked < 0, checked, "values", "0 or more")
        log_epsilon = math.log(self.epsilon)
        positive = checked > 0
        # where, not a floor before the log: a zero takes epsilon whatever the clip range is.
        logs = np.log(np.where(positive, checked, 1.0))
        clipped = np.maximum(np.clip(logs, *self.clip_range), log_epsilon)
        return np.where(positive, clipped, log_epsilon)


class WeightedTokens(TypedDict):
    """The weight of each token under the two objectives."""

    grpo: list[float]
    gmpo: list[float]


class SignedWeights(TypedDict):
    """Token weights where the completion is to become likelier (A > 0) and less likely (A < 0)."""

    positive_advantage: WeightedTokens
    negative_advantage: WeightedTokens


class TokenWeights(TypedDict):
    """One list of importance ratios, its two means and the weights it leads to."""

    ratios: list[float]
    arithmetic_mean: float
    geometric_mean: float
    weights: SignedWeights


class LargeOutlier(TypedDict):
    """Both means of a normal list and of the same list with one large value."""

    normal: list[float]
    outliers: list[float]
    normal_arithmetic: float
    outlier_arithmetic: float
    normal_geometric: float
    outlier_geometric: float


class NearZero(TypedDict):
    """Change in percent of both means when one value falls to almost nothing."""

    normal: list[float]
    outliers: list[float]
    arithmetic_change: float
    geometric_change: float


class Sensitivity(TypedDict):
    """What `compare_sensitivity` returns; changes are in percent of the normal list's mean."""

    arithmetic_sensitivity: float
    geometric_sensitivity: float
    stability_improvement: float
    large_outlier: LargeOutlier
    near_zero: NearZero
    token_weights: dict[str, TokenWeights]


def token_weights(ratios: Sequence[float], *, advantage_sign: Literal[-1, 1]) -> WeightedTokens:
    """The factor before A * grad log pi_t / |o| of every token of one completion.

    GRPO gives a token its own ratio, and 0 once the PPO clip (0.2, ratio space) cuts it: above
    1.2 for A > 0, below 0.8 for A < 0. GMPO gives all tokens the completion's geometric mean of
    ratios clipped at 0.4 in log space, on the same side, and 0 to the tokens that were cut; their
    clipped value stays in the mean. arXiv 2507.20673v3, equations 4 to 6.

    Args:
        ratios: pi / pi_old of each token of one completion; finite and above 0.
        advantage_sign: sign of the completion's advantage.

    Raises:
        DataError: there is no ratio, one is not finite and positive, or the sign is not 1 or -1.
    """
    if advantage_sign not in (1, -1):
        raise DataError(f"advantage_sign is {advantage_sign}; it must be 1 or -1")
    checked = np.asarray(ratios, dtype=np.float64)
    if checked.ndim != 1 or checked.size == 0:
        raise DataError(f"ratios have shape {checked.shape}; give the ratios of at least one token")
    _refuse_rows(~(np.isfinite(checked) & (checked > 0)), checked, "ratios", "finite and above 0")
    logs = np.log(checked)
    if advantage_sign > 0:
        grpo_kept = checked <= 1 + _GRPO_CLIP
        clipped = np.minimum(logs, _GMPO_CLIP)
    else:
        grpo_kept = checked >= 1 - _GRPO_CLIP
        clipped = np.maximum(logs, -_GMPO_CLIP)
    shared = math.exp(float(clipped.mean()))
    return {
        "grpo": [float(weight) for weight in np.where(grpo_kept, checked, 0.0)],
        "gmpo": [float(weight) for weight in np.where(clipped == logs, shared, 0.0)],
    }


def compare_sensitivity(
    normal: Sequence[float] = (0.8, 0.9, 0.7, 0.8, 0.9),
    outliers: Sequence[float] = (0.8, 0.9, 0.7, 15.0, 0.9),
) -> Sensitivity:
    """How the arithmetic and the geometric mean react to outliers, in numbers.

    * `arithmetic_sensitivity`, `geometric_sensitivity`: change in percent of each mean from
      `normal` to `outliers`; `stability_improvement` is their ratio (346.3, 79.7 and 4.34 for the
      default lists). The ratio is infinite when only the arithmetic mean changes, NaN when
      neither does.
    * `large_outlier`: the four means behind them.
    * `near_zero`: the case the other way round. One value falls from 0.8 to 1e-6 and the
      *geometric* mean is the more sensitive one (-93.4 % against -19.5 %).
    * `token_weights`: by example, the weights of `token_weights` for either sign of the
      advantage. `token_list` reads [0.1, 0.2, 0.1, 10, 0.1] as ratios; `ratio_900` and
      `ratio_0.0011` are completions of that one token; `..._among_ten` puts it among nine tokens
      of ratio 1. A ratio of 900 with A < 0 is cut by neither objective: GMPO only damps it, by
      the power 1/|o|, and at the price of giving every other token the same weight.

    Args:
        normal: values without an outlier, each 0 or more, at least one above 0.
        outliers: the same list with outliers.

    Raises:
        DataError: a list is empty, or holds a negative, NaN or infinite value, or only zeros.
    """
    if not any(value > 0 for value in normal):
        raise DataError(f"normal is {list(normal)}; a relative change needs one value above 0")
    large = _both_means(normal, outliers)
    arithmetic = _percent_change(large["normal_arithmetic"], large["outlier_arithmetic"])
    geometric = _percent_change(large["normal_geometric"], large["outlier_geometric"])
    small = _both_means((0.8, 0.9, 0.7, 0.8, 0.9), (0.8, 0.9, 0.7, 1e-6, 0.9))
    high, low = 0.9 / 0.001, 0.001 / 0.9
    return {
        "arithmetic_sensitivity": arithmetic,
        "geometric_sensitivity": geometric,
        "stability_improvement": _quotient(arithmetic, geometric),
        "large_outlier": large,
        "near_zero": {
            "normal": small["normal"],
            "outliers": small["outliers"],
            "arithmetic_change": _percent_change(
                small["normal_arithmetic"], small["outlier_arithmetic"]
            ),
            "geometric_change": _percent_change(
                small["normal_geometric"], small["outlier_geometric"]
            ),
        },
        "token_weights": {
            "token_list": _weights_of((0.1, 0.2, 0.1, 10.0, 0.1)),
            "ratio_900": _weights_of((high,)),
            "ratio_0.0011": _weights_of((low,)),
            "ratio_900_among_ten": _weights_of((high, *[1.0] * 9)),
            "ratio_0.0011_among_ten": _weights_of((low, *[1.0] * 9)),
        },
    }


def _both_means(normal: Sequence[float], outliers: Sequence[float]) -> LargeOutlier:
    geometric = SafeGeometricMean()
    normal_geometric = geometric.compute(normal)
    outlier_geometric = geometric.compute(outliers)
    return {
        "normal": [float(value) for value in normal],
        "outliers": [float(value) for value in outliers],
        "normal_arithmetic": float(np.mean(normal)),
        "outlier_arithmetic": float(np.mean(outliers)),
        "normal_geometric": normal_geometric,
        "outlier_geometric": outlier_geometric,
    }


def _weights_of(ratios: Sequence[float]) -> TokenWeights:
    return {
        "ratios": [float(ratio) for ratio in ratios],
        "arithmetic_mean": float(np.mean(ratios)),
        "geometric_mean": SafeGeometricMean().compute(ratios),
        "weights": {
            "positive_advantage": token_weights(ratios, advantage_sign=1),
            "negative_advantage": token_weights(ratios, advantage_sign=-1),
        },
    }


def _percent_change(before: float, after: float) -> float:
    return (after - before) / before * 100


def _quotient(numerator: float, denominator: float) -> float:
    if denominator == 0:
        return math.nan if numerator == 0 else math.copysign(math.inf, numerator)
    return numerator / denominator


def _refuse_rows(
    bad: NDArray[np.bool_], values: NDArray[np.float64], name: str, allowed: str
) -> None:
    if bad.any():
        position = int(np.flatnonzero(bad)[0])
        raise DataError(
            f"{name}[{position}] is {values[position]}; all {name} must be {allowed}; "
            "remove it or map it into that range first"
        )
