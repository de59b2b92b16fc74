"""One metric of a look: both arms, their difference, and what it says about the candidate."""

from __future__ import annotations

import math

import numpy as np

from gmpo.abtest.decision import GuardrailState, PrimaryState
from gmpo.abtest.estimates import Difference, UnitTotals, difference, paired_difference
from gmpo.abtest.plan import ExperimentPlan, Guardrail
from gmpo.abtest.quantiles import quantile, quantile_interval
from gmpo.abtest.records import ShadowPair
from gmpo.abtest.report import ArmSummary, MetricResult, Scale
from gmpo.abtest.sequences import Interval, empirical_bernstein, interval_difference
from gmpo.abtest.traffic import Look

__all__ = ["guardrail_result", "primary_at", "primary_result", "shadow_results"]

_TAIL = 0.95
"""Level of the latency that `latency_p95` looks at."""


def primary_result(look: Look, plan: ExperimentPlan) -> MetricResult:
    """The metric that decides: better or worse once its sequence excludes no difference."""
    metric = plan.primary
    found = _difference(look, metric, use_covariates=plan.use_covariates)
    arms = _summaries(look, metric)
    interval = _judged(found, arms, plan, alpha=plan.alpha)
    return MetricResult(
        metric=metric,
        role="primary",
        scale=_scale(metric),
        control=arms[0],
        candidate=arms[1],
        estimate=math.nan if found is None else _shown(metric, found.estimate),
        interval=_shown_interval(metric, interval),
        p_value=_p_value(found, plan, alpha=plan.alpha),
        alpha=plan.alpha,
        margin=None,
        state=_verdict(metric, interval),
        variance_kept=1.0 if found is None else found.variance_kept,
        exact=None if metric == "latency" else _exact(look, metric, alpha=plan.alpha),
    )


def primary_at(look: Look, plan: ExperimentPlan) -> tuple[float, Interval] | None:
    """Estimate and sequence of the primary metric at a look, as reported; None while too few."""
    found = _difference(look, plan.primary, use_covariates=plan.use_covariates)
    interval = _judged(found, _summaries(look, plan.primary), plan, alpha=plan.alpha)
    if found is None or interval is None:
        return None
    return _shown(plan.primary, found.estimate), _reported(plan.primary, interval)


def guardrail_result(look: Look, plan: ExperimentPlan, guardrail: Guardrail) -> MetricResult:
    """A guardrail: harmed once its sequence lies beyond the margin, safe once within it."""
    metric, alpha = guardrail.metric, plan.guardrail_alpha
    is_tail = metric == "latency_p95"
    arms = _summaries(look, metric)
    found = None if is_tail else _difference(look, metric, use_covariates=False)
    if is_tail:
        interval = _tail_interval(look, arms, plan, alpha=alpha)
        estimate = math.log(arms[1].value / arms[0].value)
    else:
        interval = _judged(found, arms, plan, alpha=alpha)
        estimate = math.nan if found is None else found.estimate
    return MetricResult(
        metric=metric,
        role="guardrail",
        scale=_scale(metric),
        control=arms[0],
        candidate=arms[1],
        estimate=_shown(metric, estimate),
        interval=_shown_interval(metric, interval),
        p_value=_p_value(found, plan, alpha=alpha),
        alpha=alpha,
        margin=guardrail.margin,
        state=_safety(guardrail, interval),
    )


def shadow_results(pairs: list[ShadowPair], plan: ExperimentPlan) -> tuple[MetricResult, ...]:
    """Paired differences of quality and log-latency, shadow less served; none without pairs."""
    results = []
    for metric in ("quality", "latency"):
        known = [
            (pair.unit, *figures)
            for pair in pairs
            if (figures := _pair_figures(pair, metric)) is not None
        ]
        if known:
            results.append(_shadow_result(metric, known, len(pairs), plan))
    return tuple(results)


def _shadow_result(
    metric: str, known: list[tuple[str, float, float]], asked: int, plan: ExperimentPlan
) -> MetricResult:
    places: dict[str, int] = {}
    units = np.array([places.setdefault(unit, len(places)) for unit, _, _ in known])
    served, shadow = (np.array([row[side] for row in known]) for side in (1, 2))
    found = paired_difference(shadow - served, units)
    arms = [
        ArmSummary(
            value=_shown(metric, float(values.mean())),
            num_units=len(places),
            num_requests=len(known),
            missing_share=1 - len(known) / asked,
        )
        for values in (served, shadow)
    ]
    interval = _judged(found, (arms[0], arms[1]), plan, alpha=plan.alpha)
    return MetricResult(
        metric=metric,
        role="shadow",
        scale=_scale(metric),
        control=arms[0],
        candidate=arms[1],
        estimate=math.nan if found is None else _shown(metric, found.estimate),
        interval=_shown_interval(metric, interval),
        p_value=_p_value(found, plan, alpha=plan.alpha),
        alpha=plan.alpha,
        margin=None,
        state=_verdict(metric, interval),
    )


def _pair_figures(pair: ShadowPair, metric: str) -> tuple[float, float] | None:
    """Of the served answer and of the shadow's, where both are known."""
    if metric == "quality":
        both = pair.served_quality, pair.shadow_quality
        return None if both[0] is None or both[1] is None else (both[0], both[1])
    if not pair.served_seconds or not pair.shadow_seconds:
        return None
    return math.log(pair.served_seconds), math.log(pair.shadow_seconds)


def _difference(look: Look, metric: str, *, use_covariates: bool) -> Difference | None:
    values = look.values[metric]
    known = np.isfinite(values)
    size = len(look.arms)
    sums = np.bincount(look.units[known], weights=values[known], minlength=size)
    counts = np.bincount(look.units[known], minlength=size).astype(float)
    arms = [
        UnitTotals(
            sums=sums[look.arms == arm],
            counts=counts[look.arms == arm],
            covariates=look.covariates[look.arms == arm] if use_covariates else None,
        )
        for arm in (0, 1)
    ]
    return difference(arms[0], arms[1])


def _summaries(look: Look, metric: str) -> tuple[ArmSummary, ArmSummary]:
    control, candidate = (_summary(look, metric, arm) for arm in (0, 1))
    return control, candidate


def _summary(look: Look, metric: str, arm: int) -> ArmSummary:
    mine = look.arms[look.units] == arm
    values = look.values["latency" if metric == "latency_p95" else metric][mine]
    known = np.isfinite(values)
    if metric == "latency_p95":
        value = math.exp(quantile(values[known], _TAIL))
    else:
        value = _shown(metric, float(values[known].mean())) if known.any() else math.nan
    return ArmSummary(
        value=value,
        num_units=len(np.unique(look.units[mine][known])),
        num_requests=int(known.sum()),
        missing_share=1 - float(known.mean()) if len(known) else math.nan,
    )


def _judged(
    found: Difference | None,
    arms: tuple[ArmSummary, ArmSummary],
    plan: ExperimentPlan,
    *,
    alpha: float,
) -> Interval | None:
    if found is None or min(arm.num_units for arm in arms) < plan.burn_in:
        return None
    return found.interval(alpha=alpha, tuned_for=plan.tuned_for)


def _tail_interval(
    look: Look, arms: tuple[ArmSummary, ArmSummary], plan: ExperimentPlan, *, alpha: float
) -> Interval | None:
    if min(arm.num_units for arm in arms) < plan.burn_in:
        return None
    values = look.values["latency"]
    known = np.isfinite(values)
    intervals = []
    for arm, weight in enumerate((plan.weights["control"], plan.weights["candidate"])):
        mine = known & (look.arms[look.units] == arm)
        intervals.append(
            quantile_interval(
                values[mine],
                look.units[mine],
                level=_TAIL,
                alpha=alpha / 2,
                tuned_for=plan.tuned_for * weight,
            )
        )
    return interval_difference(intervals[0], intervals[1])


def _exact(look: Look, metric: str, *, alpha: float) -> Interval | None:
    """Empirical-Bernstein sequences of both arms over each unit's first request.

    A first request stays first, so that no value changes after a look has used it.
    """
    values = look.values[metric]
    known = np.flatnonzero(np.isfinite(values))
    units, first = np.unique(look.units[known], return_index=True)
    ends = []
    for arm in (0, 1):
        mine = look.arms[units] == arm
        if not mine.any():
            return None
        low, high = empirical_bernstein(values[known[first[mine]]], alpha=alpha / 2)
        ends.append(Interval(low=float(low[-1]), high=float(high[-1])))
    return interval_difference(ends[0], ends[1])


def _scale(metric: str) -> Scale:
    return "ratio" if metric.startswith("latency") else "difference"


def _worsening(metric: str, interval: Interval | None) -> Interval:
    """How much worse the candidate is: longer latencies, lower success or quality."""
    if interval is None:
        return Interval(low=-math.inf, high=math.inf)
    if _scale(metric) == "ratio":
        return interval
    return Interval(low=-interval.high, high=-interval.low)


def _verdict(metric: str, interval: Interval | None) -> PrimaryState:
    worsening = _worsening(metric, interval)
    if worsening.high < 0:
        return "better"
    return "worse" if worsening.low > 0 else "unclear"


def _safety(guardrail: Guardrail, interval: Interval | None) -> GuardrailState:
    worsening = _worsening(guardrail.metric, interval)
    is_ratio = _scale(guardrail.metric) == "ratio"
    bound = math.log1p(guardrail.margin) if is_ratio else guardrail.margin
    if worsening.low > bound:
        return "harmed"
    return "safe" if worsening.high < bound else "unclear"


def _p_value(found: Difference | None, plan: ExperimentPlan, *, alpha: float) -> float | None:
    return None if found is None else found.p_value(alpha=alpha, tuned_for=plan.tuned_for)


def _shown(metric: str, value: float) -> float:
    """A difference on the scale that it is reported on: latencies as ratios."""
    return math.exp(value) if _scale(metric) == "ratio" else value


def _shown_interval(metric: str, interval: Interval | None) -> Interval | None:
    return None if interval is None else _reported(metric, interval)


def _reported(metric: str, interval: Interval) -> Interval:
    return Interval(low=_shown(metric, interval.low), high=_shown(metric, interval.high))
