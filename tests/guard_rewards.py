"""Reward functions that go wrong at a chosen call."""

from __future__ import annotations

import math
from typing import Any

_CALLS = 0
SPIKE_CALL = 7


def huge_once(completions: list[list[dict[str, str]]], **_: Any) -> list[float]:
    """1 or 0, but a million times that in the seventh call."""
    return _rewards(completions, spike=1e6)


def endless_once(completions: list[list[dict[str, str]]], **_: Any) -> list[float]:
    """1 or 0, but in the seventh call a finite number that fp32 does not hold."""
    return _rewards(completions, spike=1e39)


def _rewards(completions: list[list[dict[str, str]]], *, spike: float) -> list[float]:
    global _CALLS
    _CALLS += 1
    firsts = [completion[0]["content"][:1] for completion in completions]
    unit = spike if _CALLS == SPIKE_CALL else 1.0
    return [unit * float(first.isdigit() or first.islower()) for first in firsts]


def forget_calls() -> None:
    """For the next run in this process."""
    global _CALLS
    _CALLS = 0
    assert math.isfinite(_CALLS)
