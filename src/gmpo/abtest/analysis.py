"""The report of an experiment from its exposures and outcomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from gmpo.abtest.decision import Evidence, GuardrailState, PrimaryState, decide
from gmpo.abtest.measures import guardrail_result, primary_at, primary_result, shadow_results
from gmpo.abtest.plan import ExperimentPlan, plan_of
from gmpo.abtest.ratio import check_ratio
from gmpo.abtest.records import Exposure, Outcome, Records, ShadowPair
from gmpo.abtest.report import ExperimentReport, MetricResult, PathPoint
from gmpo.abtest.traffic import Traffic, answering_versions, collect, judgements, look_at
from gmpo.abtest.wording import (
    recommendation,
    warnings_about,
    warnings_of_presumed,
    warnings_of_versions,
)

__all__ = ["Registered", "analyse", "analyse_records"]

_PATH_POINTS = 60
_OTHER_VERSIONS = 0.01
"""Share of an arm's answers above which another version's block a decision; as many move a success
rate by at most a point."""


class Registered(Protocol):
    """An experiment as the store has it."""

    @property
    def name(self) -> str:
        """Tells experiments apart."""

    @property
    def created(self) -> float:
        """Unix seconds; when it began."""

    @property
    def status(self) -> str:
        """ "running" or "stopped"."""

    @property
    def config(self) -> Mapping[str, Any]:
        """Settings of an `ExperimentPlan`."""


def analyse_records(
    experiment: Registered, records: Records, *, now: float | None = None
) -> ExperimentReport:
    """The report of what was read from an experiment's events, its counts included.

    Raises:
        ConfigError: as for `analyse`.
    """
    return analyse(
        experiment,
        records.exposures,
        records.outcomes,
        shadow_pairs=records.shadow_pairs,
        counts=records.counts,
        now=now,
    )


def analyse(
    experiment: Registered,
    exposures: Sequence[Exposure],
    outcomes: Sequence[Outcome],
    *,
    shadow_pairs: Sequence[ShadowPair] = (),
    counts: Mapping[str, int] | None = None,
    now: float | None = None,
) -> ExperimentReport:
    """Everything that a look shows; it may be taken at any time and as often as one likes.

    Args:
        experiment: name, start, status and settings.
        exposures: assignments of units; see `Exposure`.
        outcomes: one a request; see `Outcome`.
        shadow_pairs: served and shadow answers to the same request.
        counts: of what was merged or left out before, for the report.
        now: time of the look, unix seconds; the newest record's by default.

    Raises:
        ConfigError: the experiment's settings are not a plan.
    """
    plan = plan_of(experiment.config)
    if now is None:
        times = [one.time for one in exposures] + [one.time for one in outcomes]
        now = max([experiment.created, *times])
    traffic = collect(plan, exposures, outcomes)
    look = look_at(traffic, plan, time=now)
    ratio = check_ratio(look.arms, {arm: plan.weights[arm] for arm in ("control", "candidate")})
    primary = primary_result(look, plan)
    guardrails = tuple(guardrail_result(look, plan, one) for one in plan.guardrails)
    hours = _hours_of_traffic(experiment, plan, now)
    versions = answering_versions(traffic, time=now)
    evidence = Evidence(
        ratio_alarm=ratio.alarm,
        versions_alarm=any(_is_mixed(counts) for counts in versions.values()),
        primary=_primary_state(primary),
        guardrails={result.metric: _guardrail_state(result) for result in guardrails},
        num_units=len(look.arms),
        hours=hours,
    )
    decision = decide(evidence, plan=plan)
    found = {**(counts or {}), **traffic.counts, "unanswered_units": look.unanswered}
    results = {result.metric: result for result in (primary, *guardrails)}
    judged = judgements(traffic, time=now)
    return ExperimentReport(
        name=experiment.name,
        plan=plan,
        time=now,
        hours=hours,
        num_units=len(look.arms),
        ratio=ratio,
        primary=primary,
        guardrails=guardrails,
        shadow=shadow_results(list(shadow_pairs), plan),
        path=_path(traffic, plan, now=now),
        judgements=judged,
        versions=versions,
        counts={name: count for name, count in found.items() if count},
        warnings=(
            *warnings_about([*results.values()], found, _hours_counted(experiment, plan, hours)),
            *warnings_of_presumed(results, judged),
            *warnings_of_versions(versions),
        ),
        decision=decision,
        recommendation=recommendation(
            decision, results, ratio, plan, is_stopped=experiment.status == "stopped"
        ),
    )


def _is_mixed(versions: Mapping[str, int]) -> bool:
    total = sum(versions.values())
    return total - max(versions.values(), default=0) > _OTHER_VERSIONS * total


def _hours_of_traffic(experiment: Registered, plan: ExperimentPlan, now: float) -> float:
    """Hours since it began, at most those after which no traffic is split."""
    hours = max(0.0, now - experiment.created) / 3600
    return hours if plan.end_after_hours is None else min(hours, plan.end_after_hours)


def _hours_counted(experiment: Registered, plan: ExperimentPlan, hours: float) -> float:
    """Hours of the traffic that counts: less than the experiment's once its shares were changed."""
    if plan.weights_since is None:
        return hours
    return max(0.0, hours - (plan.weights_since - experiment.created) / 3600)


def _path(traffic: Traffic, plan: ExperimentPlan, *, now: float) -> tuple[PathPoint, ...]:
    """Looks spread over the units, the last one now, from the end of the burn-in on."""
    exposed = traffic.exposed[traffic.exposed <= now]
    first = 2 * plan.burn_in
    if len(exposed) < first:
        return ()
    places = np.unique(np.linspace(first - 1, len(exposed) - 1, _PATH_POINTS).astype(int))
    points = []
    for time in [*(float(exposed[place]) for place in places[:-1]), now]:
        look = look_at(traffic, plan, time=time)
        found = primary_at(look, plan)
        if found is not None:
            estimate, interval = found
            points.append(
                PathPoint(time=time, num_units=len(look.arms), estimate=estimate, interval=interval)
            )
    return tuple(points)


def _primary_state(result: MetricResult) -> PrimaryState:
    assert result.state in ("better", "worse", "unclear")
    return result.state


def _guardrail_state(result: MetricResult) -> GuardrailState:
    assert result.state in ("safe", "harmed", "unclear")
    return result.state
