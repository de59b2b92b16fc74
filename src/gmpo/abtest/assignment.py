"""Which variant a unit is assigned: by a hash, so that nothing has to be remembered."""

from __future__ import annotations

import math
from collections.abc import Mapping
from hashlib import blake2b

from gmpo.errors import ConfigError

__all__ = ["assign", "check_weights", "position"]

_BITS = 53
"""Of the hash, which a float holds exactly: more would round the largest ones up to 1."""


def assign(experiment: str, salt: str, unit: str, weights: Mapping[str, float]) -> str:
    """The variant of a unit: the same in every process, at every time, for the same arguments.

    Variants share [0, 1) in the order of their names, each in proportion to its weight, and the
    unit's `position` falls into one share. A change of weights therefore moves only the units
    between an old border and its new place.

    Args:
        experiment: name of the experiment.
        salt: of this experiment; another salt gives an independent split of the same units.
        unit: whom to assign: a user, a session or a request.
        weights: share of each variant, at least 0, together 1. Their order does not matter.

    Raises:
        ConfigError: the weights are not shares.
    """
    check_weights(weights)
    place = position(experiment, salt, unit)
    border = 0.0
    chosen = ""
    for variant in sorted(weights):
        if weights[variant] == 0:
            continue
        chosen = variant  # the last one keeps what rounding leaves between its border and 1
        border += weights[variant]
        if place < border:
            break
    return chosen


def position(experiment: str, salt: str, unit: str) -> float:
    """Where a unit stands in [0, 1): uniform over units, independent between salts.

    blake2b over salt, experiment and unit, each with its length in front, so that no two triples
    are one text.
    """
    parts = (part.encode("utf-8", "surrogatepass") for part in (salt, experiment, unit))
    text = b"".join(b"%d:%s" % (len(part), part) for part in parts)
    number = int.from_bytes(blake2b(text, digest_size=8).digest(), "big")
    return (number >> (64 - _BITS)) / 2.0**_BITS


def check_weights(weights: Mapping[str, float]) -> None:
    """Refuse weights that are no shares.

    Raises:
        ConfigError: none is given, one is below 0 or not finite, or their sum is not 1.
    """
    shares = list(weights.values())
    total = math.fsum(shares) if all(map(math.isfinite, shares)) else math.nan
    if not shares or min(shares) < 0 or not math.isclose(total, 1.0, abs_tol=1e-9):
        raise ConfigError(
            f"weights are {dict(weights)}; each must be at least 0 and their sum 1, "
            "for example {'candidate': 0.1, 'control': 0.9}"
        )
