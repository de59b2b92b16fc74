"""Several reward components of one rollout combined into one number."""

from __future__ import annotations

import math
from collections.abc import Mapping

from gmpo.errors import ConfigError, DataError

__all__ = ["floored_geometric_mean", "weighted_sum"]


def weighted_sum(
    components: Mapping[str, float | None], weights: Mapping[str, float]
) -> float | None:
    """sum_m w_m r_m over the components that are there; None if none with a weight is.

    A component that is None is missing, not 0: the weights of the others grow in proportion, so
    that their total stays what it was.

    Args:
        components: rewards r_m by name, finite or None.
        weights: w_m for the same names, finite, 0 or more.

    Raises:
        DataError: a component is NaN or infinite.
        ConfigError: weights are negative, not finite, or for other names.
    """
    present, share = _present(components, weights)
    if share == 0:
        return None
    return sum(weights[name] * value for name, value in present.items()) / share


def floored_geometric_mean(
    components: Mapping[str, float | None], weights: Mapping[str, float], floor: float = 0.05
) -> float | None:
    """prod_m (f + (1 - f) r_m)^(w_m / W) over the components that are there; None if none is.

    W is the sum of the weights that are there, so a missing component (None) is left out rather
    than counted as 0. The result lies in [f, 1]. A component of 0 is a soft veto: the floor keeps
    failures of different size apart, where a plain geometric mean gives them all 0.

    Args:
        components: rewards r_m by name, each from 0 to 1 or None.
        weights: w_m for the same names, finite, 0 or more.
        floor: f, above 0 and below 1.

    Raises:
        DataError: a component is NaN or outside [0, 1].
        ConfigError: the floor or the weights are not as above.
    """
    if not 0 < floor < 1:
        raise ConfigError(f"floor is {floor}; it must be above 0 and below 1")
    present, share = _present(components, weights)
    for name, value in present.items():
        if not 0 <= value <= 1:
            raise DataError(
                f"component {name!r} is {value}; a geometric combination needs rewards from 0 to "
                "1; map it into that range or combine by sum"
            )
    if share == 0:
        return None
    total = sum(weights[name] for name in present)
    logs = (weights[name] * math.log(floor + (1 - floor) * r) for name, r in present.items())
    return math.exp(sum(logs) / total)


def _present(
    components: Mapping[str, float | None], weights: Mapping[str, float]
) -> tuple[dict[str, float], float]:
    """The components that are not None, and the share of the total weight that they hold."""
    if set(weights) != set(components):
        raise ConfigError(
            f"weights are for {sorted(weights)} and rewards for {sorted(components)}; "
            "give one weight a reward"
        )
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(
                f"the weight of {name!r} is {weight}; it must be a finite number, 0 or more; "
                "for a penalty let the reward itself be negative"
            )
    present = {name: value for name, value in components.items() if value is not None}
    for name, value in present.items():
        if not math.isfinite(value):
            raise DataError(
                f"component {name!r} is {value}; it must be a finite number, "
                "or None where there is none"
            )
    total = sum(weights.values())
    if total == 0:
        raise ConfigError("all weights are 0, so no reward would count; give one above 0")
    return present, sum(weights[name] for name in present) / total
