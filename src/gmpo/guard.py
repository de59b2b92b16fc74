"""Whether a run is healthy, judged round by round from its metrics alone.

`decide` is pure: metrics and what the guard remembers go in, events and what it remembers next come
out. An alarm needs two things, so that healthy learning raises none: a drift test over the frozen
baseline of the run's first rounds (`gmpo.detectors`), and a recent level that is off by an amount
that matters. Ratios and the sampler's mismatch have bounds of their own besides, which hold from
the first round on, and a round's gradient has one by its baseline, since gradients have no unit.
What is never without a value in a healthy round has to be finite, and nothing but the steps may
change the trained weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import numpy as np

from gmpo.detectors import (
    Baseline,
    cumulative_sum,
    drift_onset,
    drifts,
    robust_baseline,
    scaled,
)
from gmpo.guard_config import BASELINE_ROUNDS
from gmpo.guard_events import RESPONSES, GuardEvent
from gmpo.guard_signals import SIGNALS, TINY, TRIAL_SIGNALS, Signal
from gmpo.spikes import StepVerdict

__all__ = [
    "GuardState",
    "Measured",
    "Track",
    "decide",
    "judge_evaluation",
    "non_finite_event",
    "skipped_step_event",
]

_HELD_OUT_ERRORS = 4.5
_RECENT_ROUNDS = 5
_FEWEST_ROUNDS = 5
"""With fewer rounds before it a round is not compared to them during warm-up."""
_DEAD_ROUNDS = 10
_MOST_VALUES = 200
_DEAD_SHARE = 0.9
_LOST_SHARE = 0.5
_ALWAYS_FINITE = (
    "update/loss",
    "update/gradient_norm",
    "ratio/am_gm_gap",
    "rollout/mismatch_mean",
)
"""Left out of a round where they say nothing. Other figures may be NaN: the mean reward of a round
in which no rollout has one, entropy without a token that the policy drew, a cosine of no gradient.
"""
_OF_A_STEP = ("update/loss", "update/gradient_norm")


@dataclass(frozen=True, kw_only=True)
class Track:
    """What is remembered of one signal, in the unit of its transform.

    Attributes:
        rounds: of the values.
        values: since the baseline was last fixed, its own first.
        baseline: None during warm-up.
        first_center: median of the first rounds, which improvement is measured from.
    """

    rounds: tuple[int, ...] = ()
    values: tuple[float, ...] = ()
    baseline: Baseline | None = None
    first_center: float | None = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Held-out accuracy, in 0..1, of the weights after a round, on so many items."""

    round: int
    accuracy: float
    items: int


@dataclass(frozen=True, kw_only=True)
class GuardState:
    """What the guard remembers between rounds: plain numbers.

    Attributes:
        tracks: by alarm.
        dead_rounds: rounds in a row in which nearly all groups were dead.
        raised: alarms whose cause goes on; each is told once.
        best: held-out evaluation, the best since the last alarm about one; None before the first.
    """

    tracks: Mapping[str, Track] = field(default_factory=dict)
    dead_rounds: int = 0
    raised: tuple[str, ...] = ()
    best: Measured | None = None

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> GuardState:
        """The state whose `dataclasses.asdict` went through JSON."""
        tracks = {}
        for name, track in record["tracks"].items():
            baseline = track["baseline"]
            tracks[name] = Track(
                rounds=tuple(track["rounds"]),
                values=tuple(track["values"]),
                baseline=None if baseline is None else Baseline(**baseline),
                first_center=track["first_center"],
            )
        best = record["best"]
        return cls(
            tracks=tracks,
            dead_rounds=record["dead_rounds"],
            raised=tuple(record["raised"]),
            best=None if best is None else Measured(**best),
        )


def decide(
    metrics: Mapping[str, float | None],
    state: GuardState,
    *,
    round_number: int,
    is_on_trial: bool = False,
) -> tuple[tuple[GuardEvent, ...], GuardState]:
    """The alarms that a round raises, each once while its cause goes on, and the next state.

    Args:
        metrics: of the round, as logged; None, as in a file, is a figure that was not finite. A
            round that ends in a non-finite figure has none, and `non_finite_event` in their place.
        state: after the round before.
        round_number: counted from 1.
        is_on_trial: the run has been rolled back and may be again: smaller drifts of ratios and
            reward count.
    """
    signals = TRIAL_SIGNALS if is_on_trial else SIGNALS
    tracks = {
        name: _followed(signal, state.tracks.get(name, Track()), metrics, round_number)
        for name, signal in signals.items()
    }
    dead_rounds = state.dead_rounds + 1 if _is_dead(metrics) else 0
    seen = replace(state, tracks=tracks, dead_rounds=dead_rounds)
    events = tuple(_events(metrics, seen, round_number, signals))
    new = tuple(event for event in events if event.alarm not in state.raised)
    return new, replace(seen, raised=tuple(event.alarm for event in events))


def judge_evaluation(
    measured: Measured, state: GuardState
) -> tuple[tuple[GuardEvent, ...], GuardState]:
    """The alarm that a held-out evaluation raises, if it does, and the next state.

    The reward says what training pays for, held-out accuracy whether that is what was meant. It has
    dropped if it lies more than 4.5 standard errors of a difference of two shares below the best
    one, with n the smaller number of items and m the mean of both:

        best - now > 4.5 sqrt(2 m (1 - m) / n)

    Both ask the same items, so their difference scatters less than that. After an alarm the lower
    accuracy is what the next one is measured from.
    """
    best = state.best
    if best is None or measured.accuracy >= best.accuracy:
        return (), replace(state, best=measured)
    middle = (best.accuracy + measured.accuracy) / 2
    error = math.sqrt(2 * middle * (1 - middle) / min(best.items, measured.items))
    if best.accuracy - measured.accuracy <= _HELD_OUT_ERRORS * error:
        return (), state
    event = _event(
        "held_out_drop",
        measured.round,
        metric="evaluation/accuracy",
        value=measured.accuracy,
        baseline=best.accuracy,
        threshold=best.accuracy - _HELD_OUT_ERRORS * error,
        # The weights after the best evaluation's round are healthy, and so is the round after it.
        onset=best.round + 2,
    )
    return (event,), replace(state, best=measured)


def non_finite_event(round_number: int, *, metric: str = "update/loss") -> GuardEvent:
    """The alarm of a round that has, or was ended by, a value which is not finite."""
    return _event("non_finite", round_number, metric=metric)


def skipped_step_event(verdict: StepVerdict, *, round_number: int, step: int) -> GuardEvent:
    """The event of an optimizer step that was left out."""
    event = _event(
        "gradient_spike",
        round_number,
        metric=verdict.metric,
        value=verdict.norm,
        baseline=verdict.baseline,
        threshold=verdict.threshold,
    )
    return replace(event, step=step, action="skip_step")


def _followed(
    signal: Signal, track: Track, metrics: Mapping[str, float | None], round_number: int
) -> Track:
    """The track with the round's value, its baseline fixed or moved up if it is time."""
    value = signal.read(metrics)
    # A step without live rows has gradient 0, which says nothing about gradients.
    if value is None or (signal.is_log and value <= math.log(TINY)):
        return track
    track = replace(
        track,
        rounds=(*track.rounds, round_number)[-_MOST_VALUES:],
        values=(*track.values, value)[-_MOST_VALUES:],
    )
    if track.baseline is None:
        if len(track.values) < BASELINE_ROUNDS:
            return track
        baseline = robust_baseline(track.values, smallest_scale=signal.smallest_scale)
        return replace(track, baseline=baseline, first_center=median(track.values[:_RECENT_ROUNDS]))
    return _moved_up(signal, track, track.baseline) if signal.follows_improvement else track


def _moved_up(signal: Signal, track: Track, baseline: Baseline) -> Track:
    """Anchored at the last rounds if these are better: a baseline that never absorbs a fall."""
    latest = track.values[-BASELINE_ROUNDS:]
    better = robust_baseline(latest, smallest_scale=signal.smallest_scale)
    gain = better.center - baseline.center
    if len(latest) < BASELINE_ROUNDS or (gain if signal.direction == "down" else -gain) <= 0:
        return track
    return replace(
        track,
        rounds=track.rounds[-BASELINE_ROUNDS:],
        values=latest,
        baseline=Baseline(center=better.center, scale=max(baseline.scale, better.scale)),
    )


def _events(
    metrics: Mapping[str, float | None],
    state: GuardState,
    round_number: int,
    signals: Mapping[str, Signal],
) -> Iterator[GuardEvent]:
    broken = next(_not_finite(metrics), None)
    if broken is not None:
        yield non_finite_event(round_number, metric=broken)
    disturbed = metrics.get("update/disturbed_weights")
    if disturbed:
        yield _event(
            "weights_disturbed",
            round_number,
            metric="update/disturbed_weights",
            value=disturbed,
            threshold=0.0,
        )
    lost = _lost_share(metrics)
    if lost >= _LOST_SHARE:
        yield _event(
            "reward_missing",
            round_number,
            metric="rollout/errors_total",
            value=metrics.get("rollout/errors_total"),
            threshold=_LOST_SHARE,
        )
    improved = _has_improved(state.tracks["reward_drop"])
    if state.dead_rounds >= _DEAD_ROUNDS and not improved:
        yield _event(
            "dead_groups",
            round_number,
            metric="rollout/dead_groups",
            value=metrics.get("rollout/dead_groups"),
            threshold=_DEAD_SHARE,
            onset=round_number - state.dead_rounds + 1,
        )
    for name, signal in signals.items():
        if signal.unless_improved and improved:
            continue
        # A step that was left out has an event of its own, and is in the round's mean.
        if signal.in_one_round and _has_left_out(metrics):
            continue
        yield from _of_signal(name, signal, state.tracks[name], metrics, round_number)


def _of_signal(
    name: str,
    signal: Signal,
    track: Track,
    metrics: Mapping[str, float | None],
    round_number: int,
) -> Iterator[GuardEvent]:
    now = metrics.get(signal.metric)
    if signal.at_once is not None and now is not None and now > signal.at_once:
        yield _event(name, round_number, metric=signal.metric, value=now, threshold=signal.at_once)
        return
    if not track.rounds or track.rounds[-1] != round_number:
        return
    baseline = _baseline_of(signal, track)
    if baseline is None:
        return
    sign = 1 if signal.direction == "up" else -1
    least = max(signal.effect, signal.effect_scales * baseline.scale)
    recent = track.values[-1] if signal.in_one_round else median(track.values[-_RECENT_ROUNDS:])
    if sign * (recent - baseline.center) <= least:
        return
    if signal.beyond is not None and signal.shown(recent) <= signal.beyond:
        return
    found = ("bound", round_number) if signal.in_one_round else _drift(signal, track, baseline)
    if found is None:
        return
    test, onset = found
    yield _event(
        name,
        round_number,
        metric=signal.metric,
        value=signal.shown(recent),
        baseline=signal.shown(baseline.center),
        threshold=signal.shown(baseline.center + sign * least),
        test=test,
        onset=onset,
    )


def _baseline_of(signal: Signal, track: Track) -> Baseline | None:
    """What the last value is held against; None while it cannot be."""
    before = track.values[:-1]
    if track.baseline is not None or not signal.in_one_round or len(before) < _FEWEST_ROUNDS:
        return track.baseline
    return robust_baseline(before, smallest_scale=signal.smallest_scale)


def _drift(signal: Signal, track: Track, baseline: Baseline) -> tuple[str, int] | None:
    """The test that finds one, and the round with which it most likely began."""
    z = scaled(track.values, baseline)
    test = drifts(z, direction=signal.direction) or _summed(z, signal)
    if test is None:
        return None
    return test, track.rounds[drift_onset(z, direction=signal.direction)]


def _summed(z: np.ndarray, signal: Signal) -> str | None:
    """The third test's name, if the signal has it and it finds a drift."""
    total = 0.0
    for value in z:
        total = cumulative_sum(total, float(value), direction=signal.direction)
    return "cumulative sum" if signal.summed is not None and total >= signal.summed else None


def _event(  # noqa: PLR0913 - an event's evidence, all by keyword
    alarm: str,
    round_number: int,
    *,
    metric: str,
    value: float | None = None,
    baseline: float | None = None,
    threshold: float | None = None,
    test: str = "bound",
    onset: int | None = None,
) -> GuardEvent:
    response = RESPONSES[alarm]
    return GuardEvent(
        alarm=alarm,
        action=response.action,
        round=round_number,
        onset=round_number if onset is None else onset,
        metric=metric,
        value=value,
        baseline=baseline,
        threshold=threshold,
        test=test,
        recommended_action=response.recommended_action,
    )


def _has_improved(track: Track) -> bool:
    """Whether the reward has risen clearly above its first rounds and is there now."""
    if track.baseline is None or track.first_center is None:
        return False
    recent: Sequence[float] = track.values[-_RECENT_ROUNDS:]
    return median(recent) > track.first_center + track.baseline.scale


def _not_finite(metrics: Mapping[str, float | None]) -> Iterator[str]:
    """Figures that cannot be without a value, and are."""
    for name in _ALWAYS_FINITE:
        # A step that was left out has an event of its own, and moved nothing.
        if name not in metrics or (name in _OF_A_STEP and _has_left_out(metrics)):
            continue
        value = metrics[name]
        if value is None or not math.isfinite(value):
            yield name


def _has_left_out(metrics: Mapping[str, float | None]) -> bool:
    return bool(metrics.get("update/skipped_steps_total"))


def _is_dead(metrics: Mapping[str, float | None]) -> bool:
    groups, dead = metrics.get("rollout/groups"), metrics.get("rollout/dead_groups")
    return bool(groups) and dead is not None and dead >= _DEAD_SHARE * (groups or 0)


def _lost_share(metrics: Mapping[str, float | None]) -> float:
    """Share of the round's rollouts without a reward; their number is tokens over mean length."""
    tokens, mean = metrics.get("rollout/tokens"), metrics.get("rollout/completion_tokens")
    lost = metrics.get("rollout/errors_total") or 0.0
    return lost / round(tokens / mean) if tokens and mean else 0.0
