"""An experiment's traffic as arrays, by the variant that each unit was assigned.

Intention to treat: a request belongs to the variant that its unit was first assigned, whichever
model answered it in the end. Otherwise an arm would be judged only by the requests that it managed
to serve.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from gmpo.abtest.plan import ARMS, ExperimentPlan
from gmpo.abtest.records import JUDGES, Exposure, Outcome

__all__ = ["Look", "Traffic", "answering_versions", "collect", "judgements", "look_at"]


@dataclass(frozen=True, kw_only=True)
class Look:
    """What is known at one time.

    Attributes:
        arms: of each exposed unit, in order of exposure: 0 control, 1 candidate.
        covariates: of each unit; NaN where unknown.
        units: of each request, its unit's place in `arms`; in order of time.
        values: of each request, by metric: success, quality, and the log of latency in seconds;
            NaN where unknown.
        unanswered: units that count as one failed request each.
    """

    arms: Int[np.ndarray, " units"]
    covariates: Float[np.ndarray, " units"]
    units: Int[np.ndarray, " requests"]
    values: dict[str, Float[np.ndarray, " requests"]]
    unanswered: int


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Units in order of exposure, requests in order of time.

    Attributes:
        arms: of each unit, 0 control, 1 candidate.
        exposed: when each unit was, unix seconds.
        covariates: of each unit; NaN where unknown.
        units: of each request, the place of its unit.
        times: of each request, unix seconds.
        values: of each request, by metric; see `Look`.
        judges: of each request, the place in `JUDGES` of what its success comes from; -1 where
            that is not known.
        versions: of each request, the model version of its unit's own variant that answered it
            whole; empty where another variant did, nobody, or it is not known.
        counts: what was left out or stands out, by name.
    """

    arms: Int[np.ndarray, " units"]
    exposed: Float[np.ndarray, " units"]
    covariates: Float[np.ndarray, " units"]
    units: Int[np.ndarray, " requests"]
    times: Float[np.ndarray, " requests"]
    values: dict[str, Float[np.ndarray, " requests"]]
    judges: Int[np.ndarray, " requests"]
    versions: list[str]
    counts: dict[str, int]


def collect(
    plan: ExperimentPlan, exposures: Sequence[Exposure], outcomes: Sequence[Outcome]
) -> Traffic:
    """Exposures and outcomes joined by unit.

    A unit counts from its first exposure. Units first exposed under other weights than the plan's,
    or before these were set, are left out with their requests: shares changed with time would turn
    a trend over time into a difference of arms, and what was seen of a unit under one share may
    since have come from the other arm. A failed request without a quality has quality 0.
    """
    counts: Counter[str] = Counter()
    kept, left_out = _first_exposures(plan, exposures, counts)
    place = {exposure.unit: number for number, exposure in enumerate(kept)}
    known = []
    for outcome in sorted(outcomes, key=lambda one: one.time):
        if outcome.unit in place:
            known.append(outcome)
        else:
            reason = "left_out_units" if outcome.unit in left_out else "units_never_exposed"
            counts[f"requests_of_{reason}"] += 1
    arms = [ARMS.index(exposure.variant) for exposure in kept]
    counts["sessions_in_both_arms"] = _mixed_sessions(known, place, arms)
    counts["latencies_of_zero"] = sum(one.latency_seconds == 0 for one in known)
    return Traffic(
        arms=np.array(arms, dtype=int),
        exposed=np.array([exposure.time for exposure in kept], dtype=float),
        covariates=_floats([exposure.covariate for exposure in kept]),
        units=np.array([place[one.unit] for one in known], dtype=int),
        times=np.array([one.time for one in known], dtype=float),
        values={
            "success": _floats([one.success for one in known]),
            "quality": _floats([_quality(one) for one in known]),
            "latency": _floats([_log_latency(one) for one in known]),
        },
        judges=np.array([_judge(one) for one in known], dtype=int),
        versions=[_version(one, ARMS[arms[place[one.unit]]]) for one in known],
        counts=dict(counts),
    )


def look_at(traffic: Traffic, plan: ExperimentPlan, *, time: float) -> Look:
    """What was known at a time, with feedback that came later already in its request.

    A unit that was exposed `unanswered_after_seconds` before and has no outcome counts as one
    request with success 0 and quality 0, of unknown latency.
    """
    num_units = int(np.searchsorted(traffic.exposed, time, side="right"))
    num_requests = int(np.searchsorted(traffic.times, time, side="right"))
    units = traffic.units[:num_requests]
    # Clocks of two gateways may put an outcome before its exposure by a moment.
    early = units >= num_units
    units = units[~early]
    overdue = traffic.exposed[:num_units] + plan.unanswered_after_seconds <= time
    overdue[units] = False
    unanswered = np.flatnonzero(overdue)
    filled = {"success": 0.0, "quality": 0.0, "latency": math.nan}
    return Look(
        arms=traffic.arms[:num_units],
        covariates=traffic.covariates[:num_units],
        units=np.concatenate([units, unanswered]),
        values={
            name: np.concatenate([values[:num_requests][~early], np.full(len(unanswered), fill)])
            for (name, values), fill in zip(traffic.values.items(), filled.values(), strict=True)
        },
        unanswered=len(unanswered),
    )


def judgements(traffic: Traffic, *, time: float) -> dict[str, dict[str, int]]:
    """Of each arm, how many requests' success comes from what; "unknown" where it is not on record.

    Requests whose success is not known are left out, and so are zeros.
    """
    is_known = (traffic.times <= time) & ~np.isnan(traffic.values["success"])
    names = (*JUDGES, "unknown")  # unknown is place -1
    found: dict[str, dict[str, int]] = {}
    for place, arm in enumerate(ARMS):
        of_arm = traffic.judges[is_known & (traffic.arms[traffic.units] == place)]
        counts = Counter(names[judge] for judge in of_arm)
        found[arm] = {name: counts[name] for name in names if counts[name]}
    return found


def answering_versions(traffic: Traffic, *, time: float) -> dict[str, dict[str, int]]:
    """Of each arm, how many requests each model version answered, the most frequent one first.

    Requests that another variant answered are left out: they say nothing of the arm's own model.
    """
    found: dict[str, Counter[str]] = {arm: Counter() for arm in ARMS}
    for unit, at, version in zip(traffic.units, traffic.times, traffic.versions, strict=True):
        if version and at <= time:
            found[ARMS[traffic.arms[unit]]][version] += 1
    return {arm: dict(counts.most_common()) for arm, counts in found.items()}


def _first_exposures(
    plan: ExperimentPlan, exposures: Sequence[Exposure], counts: Counter[str]
) -> tuple[list[Exposure], set[str]]:
    """Each unit's first exposure where it is of the plan, and the units that are left out."""
    first: dict[str, Exposure] = {}
    moved: set[str] = set()
    for exposure in sorted(exposures, key=lambda one: one.time):
        before = first.setdefault(exposure.unit, exposure)
        if before is exposure:
            continue
        counts["repeated_exposures"] += 1
        if before.variant != exposure.variant:
            moved.add(exposure.unit)
    kept, left_out = [], set()
    since = plan.weights_since or -math.inf
    for exposure in first.values():
        if exposure.variant not in plan.weights:
            counts["units_of_unknown_variants"] += 1
            left_out.add(exposure.unit)
        elif exposure.time < since or not math.isclose(
            exposure.weight, plan.weights[exposure.variant], abs_tol=1e-9
        ):
            counts["units_under_other_weights"] += 1
            left_out.add(exposure.unit)
        else:
            kept.append(exposure)
    counts["moved_units"] = len(moved - left_out)
    return kept, left_out


def _mixed_sessions(outcomes: Sequence[Outcome], place: dict[str, int], arms: list[int]) -> int:
    seen: defaultdict[str, set[int]] = defaultdict(set)
    for one in outcomes:
        if one.session is not None:
            seen[one.session].add(arms[place[one.unit]])
    return sum(len(found) > 1 for found in seen.values())


def _quality(outcome: Outcome) -> float | None:
    if outcome.quality is None and outcome.success == 0:
        return 0.0
    return outcome.quality


def _log_latency(outcome: Outcome) -> float | None:
    # A clock that did not tick says nothing; such requests are counted.
    return math.log(outcome.latency_seconds) if outcome.latency_seconds else None


def _judge(outcome: Outcome) -> int:
    return -1 if outcome.judged_by is None else JUDGES.index(outcome.judged_by)


def _version(outcome: Outcome, arm: str) -> str:
    is_own = outcome.served_variant == arm and outcome.latency_seconds is not None
    return (outcome.model_version or "") if is_own else ""


def _floats(values: Sequence[float | None]) -> np.ndarray:
    return np.array([math.nan if value is None else value for value in values], dtype=float)
