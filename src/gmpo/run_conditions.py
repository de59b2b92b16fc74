"""What is wrong with a training run now, read from its folder: alarms of its guard, and ratios."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gmpo.errors import ConfigError, GmpoError
from gmpo.guard import GuardState, decide
from gmpo.guard_events import RESPONSES
from gmpo.monitoring.actions import ACTIONS
from gmpo.monitoring.alerts import Condition
from gmpo.monitoring.severity import AnomalyReport, Level, level_of
from gmpo.monitoring.training_anomalies import (
    RATIO_BOUNDS,
    TRAINING_DETECTORS,
    is_left_out,
    training_report,
)
from gmpo.schedules import judged_metrics
from gmpo.tracking import read_lines

__all__ = ["RunHealth", "run_health", "unreadable_run"]


@dataclass(frozen=True, kw_only=True)
class RunHealth:
    """A run after its last round.

    Attributes:
        conditions: what is wrong, each with what to do.
        report: the same in families, with one severity.
    """

    conditions: Sequence[Condition]
    report: AnomalyReport


def run_health(folder: Path) -> RunHealth:
    """What is wrong with a run after its last round.

    The guard writes an alarm once, so the rounds are judged anew to see which causes go on. Three
    alarms do not come from rounds: a value that was not finite lasts until that round is there, a
    drop of held-out accuracy until the next evaluation. What a roll-back has answered is over, and
    a step left out needs nothing: it is in the report of its round alone.

    A level is left below where it is entered, so each round is judged with the levels that held
    after the one before: a run near a bound is not told anew with each look.

    Args:
        folder: of a run, also while it is written.

    Raises:
        ConfigError: it is no run folder.
        RunFolderError: a file cannot be read.
        DataError: a line is damaged.
    """
    if not (folder / "recipe.toml").is_file():
        raise ConfigError(f"{folder} is no run folder: it holds no recipe.toml; check the path")
    written = [event for event in read_lines(folder, "events.jsonl") if "alarm" in event]
    state = GuardState()
    told: dict[str, Mapping[str, Any]] = {}
    rounds: list[Mapping[str, Any]] = []
    last_round = last_evaluation = 0
    judged = _Judged()
    for line in read_lines(folder, "metrics.jsonl"):
        if line["kind"] == "evaluation":
            last_evaluation = line["round"]
        elif line["kind"] == "round":
            last_round = line["round"]
            rounds.append(line)
            events, state = decide(judged_metrics(line), state, round_number=last_round)
            told |= {event.alarm: vars(event) for event in events}
            known = [event for event in written if event["round"] <= last_round]
            found = {alarm: told[alarm] for alarm in state.raised}
            found |= _going_on(known, last_round=last_round, last_evaluation=last_evaluation)
            judged = _judged(found, rounds, before=judged)
    # An evaluation, or an event of the round that is not there yet, may have come since.
    found = {alarm: told[alarm] for alarm in state.raised}
    found |= _going_on(written, last_round=last_round, last_evaluation=last_evaluation)
    judged = _judged(found, rounds, before=judged)
    return RunHealth(conditions=list(_conditions(folder, found, judged)), report=judged.report)


@dataclass(frozen=True, kw_only=True)
class _Judged:
    """A run after a round: all that is wrong together, and the level of each bound by itself."""

    report: AnomalyReport = field(default_factory=lambda: training_report({}, []))
    alone: Mapping[str, Level] = field(default_factory=dict)


def _judged(
    found: Mapping[str, Mapping[str, Any]], rounds: Sequence[Mapping[str, Any]], *, before: _Judged
) -> _Judged:
    report = training_report(found, rounds, now=before.report.level)
    alone = {
        name: level_of(
            TRAINING_DETECTORS[name][1] * (report.signals[name]["score"] or 0.0),
            now=before.alone.get(name, "ok"),
        )
        for name in RATIO_BOUNDS
        if name in report.signals
    }
    return _Judged(report=report, alone=alone)


def _going_on(
    events: Iterable[Mapping[str, Any]], *, last_round: int, last_evaluation: int
) -> dict[str, Mapping[str, Any]]:
    """Alarms that do not come from rounds and whose cause goes on, by name."""
    found = {}
    for event in events:
        goes_on = {
            "non_finite": last_round < event["round"],
            "held_out_drop": last_evaluation <= event["round"],
            # The spike of a round, whose steps were taken, is judged anew like a drift.
            "gradient_spike": last_round <= event["round"] and is_left_out(event),
        }
        if goes_on.get(event["alarm"], False) and event["taken"] != "roll_back":
            found[event["alarm"]] = event
    return found


def unreadable_run(folder: Path, error: GmpoError) -> Condition:
    """The condition of a run whose folder could be read before and cannot be read now."""
    return Condition(
        labels={"alertname": "GmpoRunUnreadable", "run": str(folder.absolute())},
        severity="critical",
        annotations={
            "summary": str(error),
            "action": "see whether the folder was moved or damaged",
        },
    )


def _conditions(
    folder: Path, alarms: Mapping[str, Mapping[str, Any]], judged: _Judged
) -> Iterator[Condition]:
    """Of each alarm and bound, and of all together where they are worse than each alone."""
    is_critical = False
    for name, event in alarms.items():
        if not is_left_out(event):
            is_critical |= RESPONSES[name].action == "roll_back"
            yield _condition(folder, name, _summary(event))
    report = judged.report
    for name, level in judged.alone.items():
        if level != "ok":
            bound, value = RATIO_BOUNDS[name], report.signals[name]["value"]
            yield _condition(
                folder, name, f"{bound.metric} is {value:.3g}, beyond {bound.nothing_at}"
            )
    if report.level == "critical" and not is_critical:
        names = [name for scores in report.families.values() for name in scores]
        yield Condition(
            labels={"alertname": "GmpoAnomaly", "run": str(folder.absolute())},
            severity="critical",
            annotations={
                "summary": f"severity {report.severity:.2f} of {', '.join(names)} together",
                "action": report.recommended_actions[0],
            },
        )


def _condition(folder: Path, name: str, summary: str) -> Condition:
    response = RESPONSES.get(name)
    is_critical = response is not None and response.action == "roll_back"
    words = "".join(word.capitalize() for word in name.split("_"))
    return Condition(
        labels={"alertname": f"Gmpo{words}", "run": str(folder.absolute())},
        severity="critical" if is_critical else "warning",
        annotations={"summary": summary, "action": ACTIONS[name]},
    )


def _summary(event: Mapping[str, Any]) -> str:
    value = "not a number" if event["value"] is None else f"{event['value']:.3g}"
    bound = "" if event["threshold"] is None else f", beyond {event['threshold']:.3g}"
    return f"{event['metric']} is {value}{bound}, since about round {event['onset']}"
