"""The report of an experiment, as records that turn into JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from gmpo.abtest.decision import Decision
from gmpo.abtest.plan import ExperimentPlan
from gmpo.abtest.ratio import RatioCheck
from gmpo.abtest.sequences import Interval

__all__ = ["ArmSummary", "ExperimentReport", "MetricResult", "PathPoint", "Scale"]

Scale = Literal["difference", "ratio"]


@dataclass(frozen=True, kw_only=True)
class ArmSummary:
    """One arm by one metric.

    Attributes:
        value: mean of success or quality; geometric mean or 95th percentile of latency, seconds.
        num_units: units with a request that the metric is known of.
        num_requests: such requests.
        missing_share: share of the arm's requests that it is not known of; NaN without requests.
    """

    value: float
    num_units: int
    num_requests: int
    missing_share: float


@dataclass(frozen=True, kw_only=True)
class MetricResult:
    """A metric's two arms, their difference and what it says.

    Attributes:
        metric: success, quality, latency or latency_p95.
        role: primary, guardrail, or shadow (pairs; control is what was served).
        scale: candidate less control, or candidate over control.
        control: summary of the arm.
        candidate: summary of the arm.
        estimate: on the scale, adjusted for covariates; NaN while there is nothing to compare.
        interval: confidence sequence on the scale; None during the burn-in.
        p_value: of no difference, valid at every look; None where the test has none.
        alpha: probability that the sequence ever misses.
        margin: tolerated worsening of a guardrail; None for the others.
        state: better, worse or unclear; of a guardrail safe, harmed or unclear.
        variance_kept: share of the variance that covariates left; 1 without.
        exact: non-asymptotic sequence for the difference of means of units' first requests; None
            for latencies, and where a metric is not known of both arms.
    """

    metric: str
    role: Literal["primary", "guardrail", "shadow"]
    scale: Scale
    control: ArmSummary
    candidate: ArmSummary
    estimate: float
    interval: Interval | None
    p_value: float | None
    alpha: float
    margin: float | None
    state: Literal["better", "worse", "safe", "harmed", "unclear"]
    variance_kept: float = 1.0
    exact: Interval | None = None


@dataclass(frozen=True, kw_only=True)
class PathPoint:
    """The primary metric's confidence sequence at an earlier look.

    Attributes:
        time: unix seconds.
        num_units: exposed units of both arms.
        estimate: on the primary metric's scale.
        interval: confidence sequence then.
    """

    time: float
    num_units: int
    estimate: float
    interval: Interval


@dataclass(frozen=True, kw_only=True)
class ExperimentReport:
    """Everything that a look at an experiment shows.

    Attributes:
        name: of the experiment.
        plan: its settings.
        time: of the look, unix seconds.
        hours: since the experiment began, until its hours were over.
        num_units: exposed units of both arms.
        ratio: test of the arms' shares.
        primary: the metric that decides.
        guardrails: metrics that must not be harmed.
        shadow: paired differences of shadow answers; empty without them.
        path: the primary sequence over time, oldest first; empty during the burn-in.
        judgements: of each arm, how many requests' success comes from what: a name of `JUDGES`,
            or "unknown"; zeros are left out.
        versions: of each arm, how many requests each model version of its own answered, the most
            frequent one first.
        counts: of what was left out, merged or filled in, by name; zeros are left out.
        warnings: sentences about data that may mislead.
        decision: what the table of `decide` says.
        recommendation: the same in words, with numbers.
    """

    name: str
    plan: ExperimentPlan
    time: float
    hours: float
    num_units: int
    ratio: RatioCheck
    primary: MetricResult
    guardrails: tuple[MetricResult, ...]
    shadow: tuple[MetricResult, ...]
    path: tuple[PathPoint, ...]
    judgements: dict[str, dict[str, int]]
    versions: dict[str, dict[str, int]]
    counts: dict[str, int]
    warnings: tuple[str, ...]
    decision: Decision
    recommendation: str

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values; NaN and infinite ends are None."""
        plain = {name: value for name, value in vars(self).items() if name != "plan"}
        table: dict[str, Any] = _json(plain)
        return {**table, "plan": self.plan.model_dump(mode="json")}


def _json(value: object) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _json(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_json(one) for one in value]
    if isinstance(value, ArmSummary | MetricResult | PathPoint | RatioCheck | Decision | Interval):
        return _json(asdict(value))
    return value
