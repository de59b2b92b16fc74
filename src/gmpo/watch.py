"""The guard at the training loop: judges each round, writes down what it finds, and says what next.

Judging and deciding are pure; what is written is one line of `events.jsonl` an event.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from gmpo.checkpoint import TrainingState, checkpoint_round, checkpoints_newest_first
from gmpo.guard import (
    GuardState,
    Measured,
    decide,
    judge_evaluation,
    non_finite_event,
    skipped_step_event,
)
from gmpo.guard_config import GuardConfig
from gmpo.guard_events import GuardEvent
from gmpo.spikes import StepVerdict
from gmpo.tracking import RunFolder

__all__ = [
    "Answer",
    "Watched",
    "alarm_sentence",
    "answer_to",
    "round_to_go_back_to",
    "watch_evaluation",
    "watch_non_finite",
    "watch_round",
]

Answer = Literal["go_on", "stop", "roll_back"]
"""What the loop does next."""


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What the guard says of a round.

    Attributes:
        state: with what the guard remembers.
        answer: what is to be done.
        reason: the first critical alarm as a sentence, for "stop" and "roll_back"; else "".
        to_round: whose checkpoint is gone back to, for "roll_back"; else None.
    """

    state: TrainingState
    answer: Answer = "go_on"
    reason: str = ""
    to_round: int | None = None


def watch_round(
    run: RunFolder,
    guard: GuardConfig,
    *,
    state: TrainingState,
    metrics: Mapping[str, float | None],
    steps: Sequence[StepVerdict | None],
    warn: Callable[[str], None],
) -> Watched:
    """What the guard says of the round that `state` ended.

    Each event is a line of `events.jsonl` and a sentence to `warn`. What the guard remembers is
    saved with the state, so that a resumed run raises the alarms of one that was not killed.

    Args:
        run: the run's folder.
        guard: the recipe's table.
        state: after the round.
        metrics: of the round.
        steps: of each of its optimizer steps the verdict; None where steps are not judged.
        warn: told each event.

    Raises:
        RunFolderError: a line cannot be written.
    """
    if guard.mode == "off":
        return Watched(state=state)
    first_step = state.step - len(steps) + 1
    skipped = [
        skipped_step_event(verdict, round_number=state.round, step=number)
        for number, verdict in enumerate(steps, start=first_step)
        if verdict is not None and not verdict.is_taken
    ]
    remembered = GuardState.from_record(state.guard) if state.guard else GuardState()
    alarms, remembered = decide(
        metrics,
        remembered,
        round_number=state.round,
        is_on_trial=guard.mends and 0 < state.attempt < guard.most_rollbacks,
    )
    state = replace(state, guard=asdict(remembered))
    return _answered(run, guard, state, [*skipped, *alarms], warn)


def watch_evaluation(
    run: RunFolder,
    guard: GuardConfig,
    *,
    watched: Watched,
    measured: Measured,
    untrained: Measured | None,
    warn: Callable[[str], None],
) -> Watched:
    """What the guard says of a round once its weights have been evaluated.

    Args:
        run: the run's folder.
        guard: the recipe's table.
        watched: what it said of the round itself.
        measured: held-out accuracy after that round.
        untrained: likewise, before the first; None if it is not known.
        warn: told each event.

    Raises:
        RunFolderError: a line cannot be written.
    """
    if guard.mode == "off":
        return watched
    remembered = GuardState.from_record(watched.state.guard)
    if remembered.best is None:
        remembered = replace(remembered, best=untrained)
    events, remembered = judge_evaluation(measured, remembered)
    state = replace(watched.state, guard=asdict(remembered))
    answered = _answered(run, guard, state, events, warn)
    return answered if watched.answer == "go_on" else replace(watched, state=state)


def watch_non_finite(
    run: RunFolder, guard: GuardConfig, *, state: TrainingState, warn: Callable[[str], None]
) -> Watched:
    """What the guard says of the round after `state`, which a value that is not finite has ended.

    Raises:
        RunFolderError: the line cannot be written.
    """
    if guard.mode == "off":
        return Watched(state=state)
    return _answered(run, guard, state, [non_finite_event(state.round + 1)], warn)


def answer_to(events: Sequence[GuardEvent], guard: GuardConfig, *, attempt: int) -> Answer:
    """What is to be done about a round's events.

    Args:
        events: that the round raised.
        guard: the recipe's table.
        attempt: how often the run has been rolled back.
    """
    if not any(event.severity == "critical" for event in events):
        return "go_on"
    if guard.mends and attempt < guard.most_rollbacks:
        return "roll_back"
    ends = guard.mode != "warn" or any(event.alarm == "non_finite" for event in events)
    return "stop" if ends else "go_on"


def round_to_go_back_to(events: Sequence[GuardEvent], rounds: Sequence[int]) -> int:
    """Of these rounds with a checkpoint, the newest whose weights are known to be healthy.

    A round's rollouts are drawn from the weights that the round before left. So the weights after
    round c are known to be healthy if round c + 1 was, which therefore came before the trouble.
    Where no checkpoint is that old, the untrained weights are.

    Args:
        events: critical ones.
        rounds: that have a checkpoint, 0 among them.
    """
    onset = min(event.onset for event in events)
    return max((number for number in rounds if number + 1 < onset), default=0)


def alarm_sentence(event: GuardEvent) -> str:
    """What was found in which round, with its evidence, and what to do."""
    value = "not a number" if event.value is None else f"{event.value:.3g}"
    evidence = "" if event.baseline is None else f", while healthy {event.baseline:.3g}"
    evidence += "" if event.threshold is None else f", threshold {event.threshold:.3g}"
    since = "" if event.onset == event.round else f", since about round {event.onset}"
    where = "" if event.step is None else f", step {event.step}"
    return (
        f"{event.alarm} in round {event.round}{where}{since} ({event.metric} is {value}{evidence})"
        f"; {event.recommended_action}"
    )


def _answered(
    run: RunFolder,
    guard: GuardConfig,
    state: TrainingState,
    events: Sequence[GuardEvent],
    warn: Callable[[str], None],
) -> Watched:
    """The events written down and told, and what is to be done about them."""
    answer = answer_to(events, guard, attempt=state.attempt)
    critical = [event for event in events if event.severity == "critical"]
    to_round = None
    if answer == "roll_back":
        rounds = [checkpoint_round(path) for path in checkpoints_newest_first(run.checkpoints)]
        to_round = round_to_go_back_to(critical, rounds)
    for event in events:
        is_answered = event in critical and answer != "go_on"
        taken = "skip_step" if event.action == "skip_step" else answer if is_answered else "warn"
        run.log_event(
            {
                **_record(event),
                "attempt": state.attempt,
                "taken": taken,
                "to_round": to_round if taken == "roll_back" else None,
            }
        )
        warn(f"guard: {alarm_sentence(event)}")
    reason = alarm_sentence(critical[0]) if answer != "go_on" else ""
    return Watched(state=state, answer=answer, reason=reason, to_round=to_round)


def _record(event: GuardEvent) -> dict[str, Any]:
    """For JSON, which has no infinity: such a value is null."""
    value = event.value
    finite = value if value is not None and math.isfinite(value) else None
    return {**asdict(event), "value": finite, "severity": event.severity}
