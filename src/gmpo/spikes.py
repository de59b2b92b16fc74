"""Whether an optimizer step's gradient is unlike those of the steps before it.

The rule of OLMo-core's SkipStep optimizers, which leave a step out that lies six standard
deviations above a rolling window, with two changes: median and median absolute deviation in place
of mean and standard deviation, so that one spike in the window does not hide the next, and of
log norms, because norms are positive and scatter by factors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from gmpo.detectors import robust_baseline

__all__ = ["MOST_NON_FINITE", "NormHistory", "StepVerdict", "judge_step", "verdict_on_loss"]

MOST_NON_FINITE = 10
"""Steps in a row without a finite gradient that are left out; one more is no accident."""

_WINDOW_STEPS = 64
_FEWEST_STEPS = 16
"""With fewer norms than these every finite step is taken."""
_DEVIATIONS = 6.0
_SMALLEST_SCALE = 0.3
"""In log norms: whatever the scatter, a step below 6 times the median is taken."""


@dataclass(frozen=True, kw_only=True)
class NormHistory:
    """What is remembered between steps: plain numbers.

    Attributes:
        norms: gradient norms of the last steps, at most 64, finite and above 0; those of steps
            left out among them, so that norms which stay high are the rule after 32 steps.
        non_finite_in_a_row: steps since the last one with a finite loss and norm.
    """

    norms: tuple[float, ...] = ()
    non_finite_in_a_row: int = 0

    @property
    def is_begun(self) -> bool:
        """Whether there is anything to remember."""
        return bool(self.norms or self.non_finite_in_a_row)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> NormHistory:
        """The history whose `dataclasses.asdict` went through JSON; an empty record is none."""
        if not record:
            return cls()
        return cls(norms=tuple(record["norms"]), non_finite_in_a_row=record["non_finite_in_a_row"])


@dataclass(frozen=True, kw_only=True)
class StepVerdict:
    """Whether a step is to be taken, with the evidence.

    Attributes:
        is_taken: False for a step to be left out.
        norm: of its gradient, before clipping.
        baseline: median norm of the steps before it; None while there are fewer than 16.
        threshold: the largest norm that would have been taken; None likewise.
        history: with this step.
        metric: that it was judged by.
    """

    is_taken: bool
    norm: float
    baseline: float | None
    threshold: float | None
    history: NormHistory
    metric: str = "update/gradient_norm"


def judge_step(norm: float, history: NormHistory) -> StepVerdict:
    """Whether a step with this gradient norm is to be taken, after these.

    A step is left out if its norm is not finite, or if its logarithm lies more than 6 robust
    standard deviations, of at least 0.3, above the median of the last 64 steps.

    Args:
        norm: of the whole gradient, before clipping; 0 on a step without live rows, which is
            taken and says nothing about gradients.
        history: of the steps before.
    """
    baseline = threshold = None
    if len(history.norms) >= _FEWEST_STEPS:
        logs = [math.log(each) for each in history.norms]
        usual = robust_baseline(logs, smallest_scale=_SMALLEST_SCALE)
        baseline = math.exp(usual.center)
        threshold = math.exp(usual.center + _DEVIATIONS * usual.scale)
    is_finite = math.isfinite(norm)
    kept = (*history.norms, norm)[-_WINDOW_STEPS:] if is_finite and norm > 0 else history.norms
    return StepVerdict(
        is_taken=is_finite and (threshold is None or norm <= threshold),
        norm=norm,
        baseline=baseline,
        threshold=threshold,
        history=NormHistory(
            norms=kept,
            non_finite_in_a_row=0 if is_finite else history.non_finite_in_a_row + 1,
        ),
    )


def verdict_on_loss(history: NormHistory) -> StepVerdict:
    """A step is left out whose loss is not finite: it has no gradient that could be judged.

    Args:
        history: of the steps before; the step is counted with those without a finite norm.
    """
    verdict = judge_step(math.nan, history)
    return replace(verdict, baseline=None, threshold=None, metric="update/loss")
