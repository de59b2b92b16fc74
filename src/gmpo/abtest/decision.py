"""What an experiment's evidence calls for: one table, a pure function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from gmpo.abtest.plan import ExperimentPlan

__all__ = ["Action", "Decision", "Evidence", "GuardrailState", "PrimaryState", "decide"]

Action = Literal["promote", "roll_back", "keep_running", "stop_for_futility", "blocked"]
PrimaryState = Literal["better", "worse", "unclear"]
GuardrailState = Literal["safe", "harmed", "unclear"]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a decision rests on.

    Attributes:
        ratio_alarm: whether the arms' shares are not those that were asked for.
        versions_alarm: whether one of the arms was answered by more than one model.
        primary: better or worse where the sequence excludes no difference.
        guardrails: by metric: harmed where the sequence lies beyond the margin, safe where within.
        num_units: exposed units of both arms.
        hours: since the experiment began.
    """

    ratio_alarm: bool
    versions_alarm: bool
    primary: PrimaryState
    guardrails: Mapping[str, GuardrailState]
    num_units: int
    hours: float


@dataclass(frozen=True, kw_only=True)
class Decision:
    """An action and the rule that called for it.

    Attributes:
        action: promote the candidate, roll_back to control, keep_running, stop_for_futility, or
            blocked: no decision is to be taken from this data.
        rule: name of the row of the table: ratio_mismatch, versions_changed, guardrail_harmed,
            primary_worse, primary_better, all_units_seen, time_is_up, guardrails_open or undecided.
        because: the guardrails that the rule speaks of; empty for the other rules.
    """

    action: Action
    rule: str
    because: tuple[str, ...] = ()


def decide(evidence: Evidence, *, plan: ExperimentPlan) -> Decision:
    """The first row that applies.

    1. The shares are wrong: blocked, because whatever moved units may have chosen which.
    2. An arm's model changed: blocked, because what was seen is about neither of the two.
    3. A guardrail is harmed beyond its margin: roll back.
    4. The primary metric is worse: roll back.
    5. It is better, and no guardrail is in the way: promote. With `guardrails_proven` each has to
       be shown safe.
    6. All units were seen, or the time is up: stop for futility.
    7. Otherwise keep running.
    """
    if evidence.ratio_alarm:
        return Decision(action="blocked", rule="ratio_mismatch")
    if evidence.versions_alarm:
        return Decision(action="blocked", rule="versions_changed")
    harmed = tuple(name for name, state in evidence.guardrails.items() if state == "harmed")
    if harmed:
        return Decision(action="roll_back", rule="guardrail_harmed", because=harmed)
    if evidence.primary == "worse":
        return Decision(action="roll_back", rule="primary_worse")
    open_ones = tuple(name for name, state in evidence.guardrails.items() if state == "unclear")
    waits = evidence.primary == "better" and plan.guardrails_proven and bool(open_ones)
    if evidence.primary == "better" and not waits:
        return Decision(action="promote", rule="primary_better", because=open_ones)
    if evidence.num_units >= plan.max_units:
        return Decision(action="stop_for_futility", rule="all_units_seen")
    if plan.end_after_hours is not None and evidence.hours >= plan.end_after_hours:
        return Decision(action="stop_for_futility", rule="time_is_up")
    if waits:
        return Decision(action="keep_running", rule="guardrails_open", because=open_ones)
    return Decision(action="keep_running", rule="undecided")
