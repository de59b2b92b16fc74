"""How the step size moves over a run."""

from __future__ import annotations

import math
from typing import Literal

__all__ = ["learning_rate_factor"]


def learning_rate_factor(
    step: int,
    *,
    total_steps: int,
    warmup_steps: int = 0,
    schedule: Literal["constant", "linear", "cosine"] = "constant",
    final_fraction: float = 0.0,
) -> float:
    """Step size of optimizer step `step` as a fraction of its peak, in (0, 1] before the end.

    Args:
        step: counted from 0.
        total_steps: optimizer steps of the whole run.
        warmup_steps: steps of linear rise; step 0 already moves by 1 / warmup_steps.
        schedule: what follows the rise.
        final_fraction: where linear and cosine arrive after the last step.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    remaining = 1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return final_fraction + (1 - final_fraction) * remaining
