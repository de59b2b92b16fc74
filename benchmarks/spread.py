"""Repeated measurements in short: median, smallest and largest, and ratios of paired ones."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median, smallest and largest of repeated measurements."""

    median: float
    min: float
    max: float

    def as_dict(self) -> dict[str, float]:
        return {"median": self.median, "min": self.min, "max": self.max}

    def text(self, digits: int = 3) -> str:
        """As "median (min to max)", each with at least that many significant digits."""
        shown = (significant(value, digits) for value in (self.median, self.min, self.max))
        return "{} ({} to {})".format(*shown)


def significant(value: float, digits: int) -> str:
    """Without an exponent, so that a large number keeps all digits before the point."""
    magnitude = math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{max(0, digits - 1 - magnitude)}f}"


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    return Spread(median=statistics.median(values), min=min(values), max=max(values))


def paired_ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Each pair's ratio: what disturbs the machine for both sides of a pair cancels out."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]
