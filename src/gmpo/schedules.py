"""How settings move over a run: by plan, or bounded and between rounds after what the run shows.

All are pure: numbers and what is remembered go in, what is remembered next comes out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, Literal

from gmpo.detectors import Baseline, robust_baseline

__all__ = [
    "REWARD_AT_FIRST_FLOOR",
    "ClipLaw",
    "ClipSide",
    "StepSize",
    "StepSizeLaw",
    "Strain",
    "adapted_clip",
    "adapted_step_size",
    "deciding_strain",
    "judged_metrics",
    "learning_rate_factor",
    "scheduled_floor",
]

REWARD_AT_FIRST_FLOOR = "adaptive/reward_at_first_floor"
"""Metric of a round's mean reward, had the floor stayed where the recipe begins."""

_LARGEST_ERROR = 0.2
_RECENT_ROUNDS = 5
_RISE = 0.2
"""Pace at which the step size rises, as a share of that at which it falls."""
_TINY = 1e-12


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
class ClipLaw:
    """How one half-width of the clip follows the share of tokens that it cuts.

    Attributes:
        narrowest: half-width, in the objective's own unit.
        widest: half-width, in the same unit.
        share_min: of tokens, as a fraction, below which the side narrows.
        share_max: of tokens above which it widens; in between is the dead band.
        gain: of the relative error, which is cut to 0.2 either way.
        average_rounds: that the moving mean of the share remembers.
        warm_up_rounds: measured rounds before the first change.
    """

    narrowest: float
    widest: float
    share_min: float
    share_max: float
    gain: float = 0.2
    average_rounds: int = 10
    warm_up_rounds: int = 20


@dataclass(frozen=True, kw_only=True)
class ClipSide:
    """One side of the clip as it stands; the half-width itself is bounded, so no error piles up.

    Attributes:
        half_width: in the objective's own unit.
        share: moving mean of the clipped share of tokens; None before the first measurement.
        rounds: measured so far.
    """

    half_width: float
    share: float | None = None
    rounds: int = 0


def adapted_clip(share: float | None, side: ClipSide, law: ClipLaw, *, frozen: bool) -> ClipSide:
    """The side for the next round: wider if it cuts too much, narrower if it cuts too little.

    half_width *= exp(gain * cut(error, -0.2, 0.2)), where the error is share / share_max - 1 above
    the band, share / share_min - 1 below it and 0 inside. The share is a moving mean that begins
    as the plain mean of the first rounds.

    Args:
        share: of the round, `clip/low_fraction` or `clip/high_fraction`; None if no row was live,
            which changes nothing.
        side: as it was in the round.
        law: of the side.
        frozen: the guard has an alarm: nothing changes, the moving mean included.

    Raises:
        ValueError: the share is not a fraction.
    """
    if share is not None and not 0 <= share <= 1:
        raise ValueError(f"the clipped share is {share}; it must lie from 0 to 1")
    if frozen or share is None:
        return side
    rounds = side.rounds + 1
    before = share if side.share is None else side.share
    mean = before + (share - before) / min(rounds, law.average_rounds)
    measured = replace(side, share=mean, rounds=rounds)
    if rounds <= law.warm_up_rounds:
        return measured
    moved = side.half_width * math.exp(law.gain * _cut(_band_error(mean, law)))
    return replace(measured, half_width=max(law.narrowest, min(law.widest, moved)))


def _band_error(share: float, law: ClipLaw) -> float:
    """Relative distance to the nearer edge of the band; 0 inside."""
    if share > law.share_max:
        return share / law.share_max - 1
    return min(0.0, share / law.share_min - 1)


def _cut(error: float) -> float:
    return max(-_LARGEST_ERROR, min(_LARGEST_ERROR, error))


@dataclass(frozen=True, kw_only=True)
class StepSizeLaw:
    """How the factor on the step size follows stability and convergence.

    Attributes:
        lowest: factor; the largest is 1.
        gain: of the relative error, which is cut to 0.2.
        tolerance: strain, in robust standard deviations of the first rounds, beyond which the
            factor falls; below half of it, it rises.
        warm_up_rounds: values of a signal that make its baseline.
    """

    lowest: float = 0.1
    gain: float = 0.5
    tolerance: float = 3.0
    warm_up_rounds: int = 20


@dataclass(frozen=True, kw_only=True)
class StepSize:
    """The factor on the step size, and what is remembered of its signals.

    Attributes:
        factor: on what the schedule says, above 0 and at most 1.
        recent: newest values of each signal, in its own scale.
        baselines: of each signal that had enough values; frozen, but the reward's, which moves up
            with the reward.
    """

    factor: float = 1.0
    recent: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    baselines: Mapping[str, Baseline] = field(default_factory=dict)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> StepSize:
        """The one whose `dataclasses.asdict` went through JSON."""
        return cls(
            factor=record["factor"],
            recent={name: tuple(values) for name, values in record["recent"].items()},
            baselines={name: Baseline(**values) for name, values in record["baselines"].items()},
        )


@dataclass(frozen=True, kw_only=True)
class Strain:
    """How far one signal lies on its bad side, with the evidence in the metric's own unit.

    Attributes:
        metric: that the signal reads.
        deviations: from the baseline towards the bad side, in robust standard deviations.
        value: median of the last 5 rounds.
        low: end of the range in which the step size stays as it is.
        high: other end of that range.
        is_measured: whether the last round has the metric.
    """

    metric: str
    deviations: float
    value: float
    low: float
    high: float
    is_measured: bool


@dataclass(frozen=True, kw_only=True)
class _Signal:
    """`smallest_scale` is in the unit of the signal, which is a logarithm if `is_log`."""

    metric: str
    smallest_scale: float
    is_log: bool = False
    falls: bool = False

    def read(self, metrics: Mapping[str, float | None]) -> float | None:
        values = [metrics.get(name) for name in self.metric.split(" - ")]
        known = [value for value in values if value is not None and math.isfinite(value)]
        if len(known) < len(values):
            return None
        value = known[0] - sum(known[1:])
        if not self.is_log:
            return value
        # No gradient and no spread: no row was live, or the round is on-policy.
        return math.log(value) if value > _TINY else None

    def shown(self, value: float) -> float:
        return math.exp(value) if self.is_log else value


_SIGNALS: Mapping[str, _Signal] = {
    "gradient": _Signal(metric="update/gradient_norm", smallest_scale=0.3, is_log=True),
    "ratio": _Signal(metric="ratio/log_q99 - ratio/log_q01", smallest_scale=0.3, is_log=True),
    "kl": _Signal(metric="kl_old/k1", smallest_scale=0.005),
    # Rewards of 0 and 1 are meant. Its baseline moves up with the reward, never down.
    "reward": _Signal(metric="rollout/reward", smallest_scale=0.02, falls=True),
}


def adapted_step_size(
    metrics: Mapping[str, float | None], size: StepSize, law: StepSizeLaw, *, frozen: bool
) -> StepSize:
    """The factor for the next round: lower while a signal is strained, slowly back up afterwards.

    Signals are the gradient norm, the width of the log-ratio from its 1 % to its 99 % quantile,
    KL(old || policy) and the reward. Each is the median of its last 5 rounds against the frozen
    baseline of its first rounds; s is the largest deviation to the bad side over the tolerance.
    Above 1 the factor is multiplied by exp(-gain * cut(s - 1)), below 1/2 by exp(gain / 25), the
    error cut to 0.2; in between it stays. It is bounded itself, so no error piles up. A signal that
    the round did not measure lowers nothing: rounds without live rows say nothing new of gradients.

    Args:
        metrics: of the round, as logged; a figure that is missing leaves its signal as it was.
        size: as it was in the round.
        law: of the factor.
        frozen: the guard has an alarm: the factor may fall and does not rise.
    """
    followed = _followed(metrics, size, law)
    strain = deciding_strain(metrics, followed, law)
    if strain is None:
        return followed
    excess = strain.deviations / law.tolerance
    moved = size.factor
    if excess > 1 and strain.is_measured:
        moved *= math.exp(-law.gain * _cut(excess - 1))
    elif excess < 0.5 and not frozen:
        moved *= math.exp(law.gain * _RISE * _LARGEST_ERROR)
    return replace(followed, factor=max(law.lowest, min(1.0, moved)))


def deciding_strain(
    metrics: Mapping[str, float | None], size: StepSize, law: StepSizeLaw
) -> Strain | None:
    """The signal that decides what becomes of the factor; None before there is a baseline.

    Of those that the round measured the one furthest beyond the tolerance, because it lowers the
    factor; if there is none, the one furthest on its bad side of all, which must be calm for it to
    rise.

    Args:
        metrics: of the round.
        size: with that round.
        law: of the factor.
    """
    strains = list(_strains(metrics, size, law))
    lowering = [each for each in strains if each.is_measured and each.deviations > law.tolerance]
    return max(lowering or strains, key=lambda strain: strain.deviations, default=None)


def _strains(
    metrics: Mapping[str, float | None], size: StepSize, law: StepSizeLaw
) -> Iterator[Strain]:
    for name, baseline in size.baselines.items():
        signal = _SIGNALS[name]
        sign = -1 if signal.falls else 1
        value = median(size.recent[name][-_RECENT_ROUNDS:])
        ends = sorted(
            signal.shown(baseline.center + sign * share * law.tolerance * baseline.scale)
            for share in (0.5, 1.0)
        )
        yield Strain(
            metric=signal.metric,
            deviations=sign * (value - baseline.center) / baseline.scale,
            value=signal.shown(value),
            low=ends[0],
            high=ends[1],
            is_measured=signal.read(metrics) is not None,
        )


def _followed(metrics: Mapping[str, float | None], size: StepSize, law: StepSizeLaw) -> StepSize:
    """With the round's values, and the baselines of signals that have enough of them."""
    recent, baselines = dict(size.recent), dict(size.baselines)
    for name, signal in _SIGNALS.items():
        value = signal.read(metrics)
        if value is None:
            continue
        recent[name] = (*recent.get(name, ()), value)[-law.warm_up_rounds :]
        if len(recent[name]) < law.warm_up_rounds:
            continue
        latest = robust_baseline(recent[name], smallest_scale=signal.smallest_scale)
        known = baselines.setdefault(name, latest)
        if signal.falls and latest.center > known.center:
            scale = max(known.scale, latest.scale)
            baselines[name] = Baseline(center=latest.center, scale=scale)
    return replace(size, recent=recent, baselines=baselines)


def scheduled_floor(rounds: int, *, first: float, last: float, total_rounds: int) -> float:
    """Floor of geometrically combined rewards after so many rounds, falling geometrically.

    first * (last / first)^(rounds / (total_rounds - 1)): the first round has `first`, the last one
    `last`.

    Args:
        rounds: that counted so far, from 0.
        first: floor of the first round.
        last: floor of the last round.
        total_rounds: of the run.
    """
    progress = min(1.0, rounds / max(1, total_rounds - 1))
    return last if progress == 1.0 else first * (last / first) ** progress


def judged_metrics(metrics: Mapping[str, float | None]) -> Mapping[str, float | None]:
    """A round's metrics with a reward that rounds share: a falling floor is no falling reward."""
    if REWARD_AT_FIRST_FLOOR not in metrics:
        return metrics
    return {**metrics, "rollout/reward": metrics[REWARD_AT_FIRST_FLOOR]}
