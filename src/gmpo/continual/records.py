"""What a cycle of continual learning knows, what its steps report, and what became of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from gmpo.store import Cycle

__all__ = [
    "REASONS",
    "ROLL_BACK",
    "STEPS",
    "CycleFacts",
    "CycleResult",
    "Outcome",
    "StepReport",
    "facts_of",
    "reports_of",
    "result_of",
]

Outcome = Literal["promoted", "refused", "rolled_back", "abandoned", "waiting", "dry_run"]
"""What became of a cycle; "waiting" goes on once a person has decided."""

STEPS = (
    "validate",
    "small_update",
    "safety_test",
    "update",
    "evaluate",
    "gate",
    "live_test",
    "approve",
    "promote",
    "watch",
)
"""A cycle's steps in their order."""

ROLL_BACK = "roll_back"
"""The step that follows where the new champion disappoints."""

REASONS: Mapping[str, str] = {
    "validate": "Data validation failed",
    "small_update": "Safety test failed",
    "safety_test": "Safety test failed",
    "update": "Update failed",
    "evaluate": "Evaluation failed",
    "gate": "Performance degradation detected",
    "live_test": "Live test failed",
    "approve": "Refused by a person",
    "promote": "Champion moved",
    "watch": "Performance degradation detected",
    "roll_back": "Champion moved",
}
"""Why a cycle ended, by the step that did not pass, unless its report says it better."""


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What a step found.

    Attributes:
        passed: whether the cycle goes on.
        sentence: what was found, for a person.
        details: the evidence, JSON.
        reason: why the cycle ends, in a few words; None takes the step's own of `REASONS`.
    """

    passed: bool
    sentence: str
    details: Mapping[str, Any] = field(default_factory=dict)
    reason: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "details": dict(self.details)}


@dataclass(frozen=True, kw_only=True)
class CycleFacts:
    """What a step may know of its cycle.

    Attributes:
        name: of the model.
        number: of the cycle.
        folder: of the cycle; finished steps have theirs in it.
        champion: version that served when the cycle began.
        champion_revision: of the champion's history then.
        request: what the cycle was asked to do.
        reports: of the steps that are done, by step.
    """

    name: str
    number: int
    folder: Path
    champion: str
    champion_revision: int
    request: Mapping[str, Any]
    reports: Mapping[str, StepReport]

    def files(self, step: str) -> Path:
        """The folder of a finished step."""
        return self.folder / step

    @property
    def candidate(self) -> str:
        """Version that the update made."""
        version: str = self.reports["update"].details["new_model_version"]
        return version


@dataclass(frozen=True, kw_only=True)
class CycleResult:
    """What became of a cycle: the article's fields, then ours.

    Attributes:
        success: whether the candidate serves now.
        reason: why not, in a few words; None if it does.
        details: what the step that decided found.
        new_model_version: the candidate, if there is one.
        performance_improvement: candidate minus champion, in points of accuracy over all suites;
            None if they were not compared.
        stability_metrics: of the update's run; of the small update's where the cycle ended before
            the update. None of a run that diverged, or if nothing was trained.
        outcome: what became of the cycle.
        step: that decided, or that waits for a person.
        sentence: what it said.
        name: of the model.
        number: of the cycle.
        champion: version that served when the cycle began.
    """

    success: bool
    reason: str | None
    details: Mapping[str, Any]
    new_model_version: str | None
    performance_improvement: float | None
    stability_metrics: Mapping[str, Any] | None
    outcome: Outcome
    step: str
    sentence: str
    name: str
    number: int
    champion: str

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def reports_of(cycle: Cycle) -> dict[str, StepReport]:
    """What the cycle's steps reported so far, in their order."""
    return {step: StepReport(**told) for step, told in cycle.payload["reports"].items()}


def facts_of(cycle: Cycle, *, folder: Path) -> CycleFacts:
    """What the cycle's next step may know; `folder` is that of all the model's cycles."""
    return CycleFacts(
        name=cycle.name,
        number=cycle.number,
        folder=folder / f"cycle-{cycle.number:06}",
        champion=cycle.payload["champion"],
        champion_revision=cycle.payload["champion_revision"],
        request=cycle.payload["request"],
        reports=reports_of(cycle),
    )


def result_of(
    cycle: Cycle, *, outcome: Outcome, reason: str | None = None, sentence: str | None = None
) -> CycleResult:
    """What became of a cycle, by what its steps reported.

    Args:
        cycle: with its reports.
        outcome: of it.
        reason: in place of that of the report that did not pass.
        sentence: in place of what the newest step said.
    """
    reports = reports_of(cycle)
    failed = [step for step, report in reports.items() if not report.passed]
    step = failed[0] if failed else next(reversed(reports), cycle.state)
    report = reports.get(step) or StepReport(passed=False, sentence="no step was done")
    if outcome == "waiting":
        step = cycle.state  # its report is not there yet
    if reason is None and failed:
        reason = report.reason or REASONS[step]
    update = reports["update"].details if "update" in reports else {}
    trained = reports.get("update") or reports.get("small_update")
    gate = reports["gate"].details if "gate" in reports else {}
    return CycleResult(
        success=outcome == "promoted",
        reason=reason,
        details=report.details,
        new_model_version=update.get("new_model_version"),
        performance_improvement=gate.get("performance_improvement"),
        stability_metrics=None if trained is None else trained.details.get("stability_metrics"),
        outcome=outcome,
        step=step,
        sentence=sentence or report.sentence,
        name=cycle.name,
        number=cycle.number,
        champion=cycle.payload["champion"],
    )
