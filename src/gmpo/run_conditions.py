"""What is wrong with a training run now, read from its folder: its guard's alarms as conditions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gmpo.errors import ConfigError, GmpoError
from gmpo.guard import GuardState, decide
from gmpo.guard_events import RESPONSES
from gmpo.monitoring.alerts import Condition
from gmpo.tracking import read_lines

__all__ = ["run_conditions", "unreadable_run"]


def run_conditions(folder: Path) -> list[Condition]:
    """Alarms of a run whose cause goes on after its last round.

    The guard writes an alarm once, so the rounds are judged anew to see which causes go on. Two
    alarms do not come from rounds: a value that was not finite lasts until that round is there, a
    drop of held-out accuracy until the next evaluation. What a roll-back has answered is over, and
    a step left out needs nothing.

    Args:
        folder: of a run, also while it is written.

    Raises:
        ConfigError: it is no run folder.
        RunFolderError: a file cannot be read.
        DataError: a line is damaged.
    """
    if not (folder / "recipe.toml").is_file():
        raise ConfigError(f"{folder} is no run folder: it holds no recipe.toml; check the path")
    state = GuardState()
    found: dict[str, Mapping[str, Any]] = {}
    last_round = last_evaluation = 0
    for line in read_lines(folder, "metrics.jsonl"):
        if line["kind"] == "evaluation":
            last_evaluation = line["round"]
        elif line["kind"] == "round":
            last_round = line["round"]
            events, state = decide(line, state, round_number=last_round)
            found |= {event.alarm: vars(event) for event in events}
    found = {alarm: found[alarm] for alarm in state.raised}
    for event in read_lines(folder, "events.jsonl"):
        goes_on = {
            "non_finite": last_round < event["round"],
            "held_out_drop": last_evaluation <= event["round"],
        }
        alarm = event.get("alarm", "")  # events of other kinds are none
        if goes_on.get(alarm, False) and event["taken"] != "roll_back":
            found[alarm] = event
    return [_condition(folder, event) for event in found.values()]


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


def _condition(folder: Path, event: Mapping[str, Any]) -> Condition:
    response = RESPONSES[event["alarm"]]
    name = "".join(word.capitalize() for word in event["alarm"].split("_"))
    return Condition(
        labels={"alertname": f"Gmpo{name}", "run": str(folder.absolute())},
        severity="critical" if response.action == "roll_back" else "warning",
        annotations={"summary": _summary(event), "action": response.recommended_action},
    )


def _summary(event: Mapping[str, Any]) -> str:
    value = "not a number" if event["value"] is None else f"{event['value']:.3g}"
    bound = "" if event["threshold"] is None else f", beyond {event['threshold']:.3g}"
    return f"{event['metric']} is {value}{bound}, since about round {event['onset']}"
