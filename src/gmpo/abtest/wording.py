"""The recommendation in plain words with numbers, and warnings about the data."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from datetime import UTC, datetime

from gmpo.abtest.decision import Decision
from gmpo.abtest.plan import ExperimentPlan
from gmpo.abtest.ratio import RatioCheck
from gmpo.abtest.records import PRESUMED
from gmpo.abtest.report import MetricResult

__all__ = [
    "NAMES",
    "effect_words",
    "moment",
    "recommendation",
    "value_words",
    "warnings_about",
    "warnings_of_presumed",
    "warnings_of_versions",
]

NAMES = {
    "success": "success rate",
    "quality": "mean quality",
    "latency": "latency (geometric mean)",
    "latency_p95": "latency (95th percentile)",
}
"""Of the metrics, for readers."""

_WEEK_HOURS = 168.0
_UNEQUAL_MISSING = 0.02
_MANY_PRESUMED = 0.1


def moment(at: float) -> str:
    """A time, given in unix seconds, to the minute."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M UTC")


def recommendation(
    decision: Decision,
    results: Mapping[str, MetricResult],
    ratio: RatioCheck,
    plan: ExperimentPlan,
    *,
    is_stopped: bool = False,
) -> str:
    """One or two sentences: what to do, and the figures that say so.

    Args:
        decision: of the table.
        results: primary and guardrails by metric.
        ratio: test of the shares.
        plan: the experiment's settings.
        is_stopped: whether somebody ended it, so that nothing keeps running.
    """
    primary = results[plan.primary]
    models = plan.models
    candidate = f"the candidate ({models['candidate']})"
    if decision.action == "blocked":
        return f"Decide nothing from this data: {_why_blocked(decision, ratio)}."
    if decision.rule == "guardrail_harmed":
        harmed = "; ".join(_guardrail(results[name]) for name in decision.because)
        return f"Roll back to control ({models['control']}): {harmed}."
    if decision.rule == "primary_worse":
        return f"Roll back to control ({models['control']}): {effect_words(primary)}."
    if decision.action == "promote":
        guarded = _open(results, decision.because)
        return f"Promote {candidate}: {effect_words(primary)}.{guarded}"
    undecided = "Undecided" if is_stopped else "Keep running"
    if decision.rule == "guardrails_open":
        return (
            f"{undecided}: {effect_words(primary)}, but not yet shown safe: "
            f"{'; '.join(_guardrail(results[name]) for name in decision.because)}."
        )
    if decision.action == "stop_for_futility":
        why = (
            f"{plan.max_units} units were seen"
            if decision.rule == "all_units_seen"
            else f"the {plan.end_after_hours:g} hours are over"
        )
        return (
            f"Stop and stay with control ({models['control']}): {why}, and the evidence does not "
            f"call for {candidate}: {effect_words(primary)}."
        )
    return f"{undecided}: {effect_words(primary)}."


def effect_words(result: MetricResult) -> str:
    """A metric's effect in words: estimate, interval, and both arms."""
    name = NAMES[result.metric]
    if result.interval is None:
        return (
            f"{name} is not judged yet, with {result.control.num_units} and "
            f"{result.candidate.num_units} units (control, candidate)"
        )
    arms = (
        f"{value_words(result.metric, result.control.value)} to "
        f"{value_words(result.metric, result.candidate.value)}"
    )
    interval = (
        f"{_effect(result, result.interval.low)} to {_effect(result, result.interval.high)} "
        f"with {100 * (1 - result.alpha):g} % confidence at every look"
    )
    verdict = {"better": "is better", "worse": "is worse", "safe": "is within its margin"}
    says = {**verdict, "harmed": "is beyond its margin"}.get(result.state, "may not differ")
    return f"{name} {says}: {_effect(result, result.estimate)} ({interval}; {arms})"


def value_words(metric: str, value: float) -> str:
    """A figure of one arm: percent, quality or seconds."""
    if math.isnan(value):
        return "unknown"
    if metric == "success":
        return f"{100 * value:.1f} %"
    return f"{value:.3f}" if metric == "quality" else f"{value:.3g} s"


def warnings_about(
    results: list[MetricResult], counts: Mapping[str, int], hours: float
) -> list[str]:
    """Sentences about data that may mislead; none where nothing is odd."""
    found = []
    for result in results:
        shares = (result.control.missing_share, result.candidate.missing_share)
        if result.interval is not None and abs(shares[0] - shares[1]) > _UNEQUAL_MISSING:
            found.append(
                f"{NAMES[result.metric]} is unknown of {100 * shares[0]:.1f} % of control's "
                f"requests and {100 * shares[1]:.1f} % of the candidate's; their comparison is of "
                "the others only"
            )
    if counts.get("moved_units"):
        found.append(
            f"{counts['moved_units']} units were assigned another variant later; they count by "
            "their first"
        )
    if counts.get("units_under_other_weights"):
        found.append(
            f"{counts['units_under_other_weights']} units were first exposed under other shares "
            "and are left out: pooled, a trend over time would pass for a difference of the arms; "
            "the evidence, with its probability of error, began anew with the present shares"
        )
    if counts.get("sessions_in_both_arms"):
        found.append(
            f"{counts['sessions_in_both_arms']} sessions saw both models, which may affect each "
            "other's answers; assign by session"
        )
    if counts.get("malformed_events"):
        found.append(f"{counts['malformed_events']} events could not be read and are left out")
    if hours < _WEEK_HOURS:
        found.append(f"{hours:.1f} hours of traffic do not show a whole week")
    return found


def warnings_of_presumed(
    metrics: Collection[str], judgements: Mapping[str, Mapping[str, int]]
) -> list[str]:
    """That successes are presumed, where success is looked at and many of them are."""
    shares = {arm: _presumed_share(counts) for arm, counts in judgements.items()}
    if "success" not in metrics or max(shares.values(), default=0.0) <= _MANY_PRESUMED:
        return []
    told = " and ".join(f"{100 * share:.0f} % of {arm}'s" for arm, share in shares.items())
    return [
        f"{told} judged requests count as a success because nobody judged them: they were served "
        "whole. The success rate then says how few failed or were disliked, not how many are "
        "right; have answers graded (quality.verify by references, gmpo serve --task or "
        "quality.task by a task's own scorer), or ask for feedback"
    ]


def warnings_of_versions(versions: Mapping[str, Mapping[str, int]]) -> list[str]:
    """That an arm was answered by more than one model version, and how often by each."""
    return [
        f"{arm} was answered by {len(counts)} model versions: "
        + ", ".join(f"{version} {count} times" for version, count in counts.items())
        + "; its figures are of all of them. Where a server's fingerprint changes and its weights "
        "do not, name them with backends.NAME.version"
        for arm, counts in versions.items()
        if len(counts) > 1
    ]


def _presumed_share(counts: Mapping[str, int]) -> float:
    total = sum(counts.values())
    return counts.get(PRESUMED, 0) / total if total else 0.0


def _effect(result: MetricResult, value: float) -> str:
    if math.isnan(value):
        return "unknown"
    if math.isinf(value) or (result.scale == "ratio" and value == 0):
        return "no bound"
    if result.scale == "ratio":
        return f"{100 * (value - 1):+.1f} %"
    return f"{100 * value:+.2f} points"


def _guardrail(result: MetricResult) -> str:
    unit = " %" if result.scale == "ratio" else " points"
    margin = "" if result.margin is None else f", margin {100 * result.margin:g}{unit}"
    return effect_words(result) + margin


def _open(results: Mapping[str, MetricResult], names: tuple[str, ...]) -> str:
    if not names:
        return ""
    listed = " and ".join(_guardrail(results[name]) for name in names)
    return f" Not harmed as far as is known, but not shown safe either: {listed}."


def _why_blocked(decision: Decision, ratio: RatioCheck) -> str:
    if decision.rule == "versions_changed":
        return (
            "an arm's model changed meanwhile (see the notes), so that what was seen is about "
            "neither of its models. Begin another experiment (gmpo ab start) with models that stay"
        )
    return f"{_shares(ratio)}. Find what loses or moves units"


def _shares(ratio: RatioCheck) -> str:
    total = sum(ratio.counts.values())
    parts = ", ".join(
        f"{name} has {ratio.counts[name]} of {total} units ({100 * ratio.counts[name] / total:.1f} "
        f"%, expected {100 * ratio.expected[name]:g} %)"
        for name in ratio.counts
    )
    return f"the arms' shares are wrong: {parts}, p = {ratio.p_value:.1g}"
