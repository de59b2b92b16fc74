"""How step size and clip move over a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

__all__ = ["ClipState", "adapted_clip", "learning_rate_factor"]

_CLIP_TARGET = 0.01
_CLIP_DEAD_BAND = math.log(2)
_CLIP_GAIN = 0.2
_LARGEST_CLIP_ERROR = 0.2
_CLIP_BOUNDS = (0.1, 0.8)
_CLIP_EMA_WEIGHT = 0.1


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


@dataclass(frozen=True, kw_only=True)
class ClipState:
    """One side of the log-space clip under control.

    Attributes:
        half_width: of the clip, in log space; the value itself is bounded, so that no error piles
            up behind a bound.
        clipped: moving mean of the clipped share of tokens; None before the first measurement.
    """

    half_width: float
    clipped: float | None = None


def adapted_clip(clipped_share: float | None, state: ClipState, *, frozen: bool) -> ClipState:
    """The next round's half-width of one side of GMPO's clip, moved towards a clipped share of 1 %.

    The error is log(moving mean / target). Within the dead band, a factor of 2 either way, nothing
    changes; beyond it the half-width is multiplied by exp(gain * error), the error cut to +-0.2, so
    that it moves by at most 4 % a round, within [0.1, 0.8]. More is clipped than meant: the clip
    widens; less: it narrows. Call it between rounds only, each side apart.

    Args:
        clipped_share: of the round, `clip/low_fraction` or `clip/high_fraction`; None if no row
            was live, which changes nothing.
        state: of the side.
        frozen: the guard has an alarm: nothing changes, the moving mean included.

    Raises:
        ValueError: the share is not a fraction.
    """
    if clipped_share is not None and not 0 <= clipped_share <= 1:
        raise ValueError(f"the clipped share is {clipped_share}; it must lie from 0 to 1")
    if frozen or clipped_share is None:
        return state
    before = clipped_share if state.clipped is None else state.clipped
    clipped = before + _CLIP_EMA_WEIGHT * (clipped_share - before)
    error = math.log(max(clipped, _CLIP_TARGET / 100) / _CLIP_TARGET)
    if abs(error) <= _CLIP_DEAD_BAND:
        return ClipState(half_width=state.half_width, clipped=clipped)
    step = max(-_LARGEST_CLIP_ERROR, min(_LARGEST_CLIP_ERROR, error))
    low, high = _CLIP_BOUNDS
    moved = state.half_width * math.exp(_CLIP_GAIN * step)
    return ClipState(half_width=max(low, min(high, moved)), clipped=clipped)
