"""The guard at the training loop: judges each finished round and writes down what it finds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from gmpo.checkpoint import TrainingState
from gmpo.config import GuardConfig
from gmpo.guard import GuardEvent, GuardState, decide
from gmpo.tracking import RunFolder

__all__ = ["alarm_sentence", "reason_to_stop", "watch_round"]


def watch_round(
    run: RunFolder,
    guard: GuardConfig,
    state: TrainingState,
    metrics: Mapping[str, float | None],
    *,
    warn: Callable[[str], None],
) -> tuple[TrainingState, tuple[GuardEvent, ...]]:
    """The state with what the guard remembers, and the alarms of the round that `state` ended.

    Each alarm is a line of `events.jsonl` and a sentence to `warn`. What the guard remembers is
    saved with the state, so that a resumed run raises the alarms of one that was not killed.

    Raises:
        RunFolderError: the line cannot be written.
    """
    if guard.mode == "off":
        return state, ()
    remembered = GuardState.from_record(state.guard) if state.guard else GuardState()
    events, remembered = decide(metrics, remembered, round_number=state.round)
    for event in events:
        run.log_record("events.jsonl", _record(event))
        warn(f"guard: {alarm_sentence(event)}")
    return replace(state, guard=asdict(remembered)), events


def reason_to_stop(guard: GuardConfig, events: Sequence[GuardEvent]) -> str | None:
    """The first critical alarm as a sentence if the recipe stops on it, else None."""
    critical = [event for event in events if event.severity == "critical"]
    return alarm_sentence(critical[0]) if guard.mode == "stop" and critical else None


def alarm_sentence(event: GuardEvent) -> str:
    """What was found in which round, with its evidence, and what to do."""
    value = "not a number" if event.value is None else f"{event.value:.3g}"
    evidence = "" if event.baseline is None else f", while healthy {event.baseline:.3g}"
    evidence += "" if event.threshold is None else f", threshold {event.threshold:.3g}"
    since = "" if event.onset == event.round else f", since about round {event.onset}"
    return (
        f"{event.alarm} in round {event.round}{since} ({event.metric} is {value}{evidence}); "
        f"{event.recommended_action}"
    )


def _record(event: GuardEvent) -> dict[str, Any]:
    """For JSON, which has no infinity: such a value is null."""
    value = event.value
    finite = value if value is not None and math.isfinite(value) else None
    return {**asdict(event), "value": finite, "severity": event.severity}
