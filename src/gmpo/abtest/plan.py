"""An experiment's settings: arms, shares, metrics, error probabilities, and when it ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from gmpo.abtest.assignment import check_weights
from gmpo.recipe import settings_of
from gmpo.task_config import Table

__all__ = ["ARMS", "ExperimentPlan", "Guardrail", "GuardrailMetric", "MeanMetric", "plan_of"]

ARMS = ("control", "candidate")
"""The model that serves now, and the one that may replace it."""

MeanMetric = Literal["success", "quality", "latency"]
GuardrailMetric = Literal["success", "quality", "latency", "latency_p95"]


class Guardrail(Table):
    """A metric that the candidate must not harm."""

    metric: GuardrailMetric
    """`success` and `quality` are means over requests, `latency` the geometric mean, `latency_p95`
    the 95th percentile."""
    margin: float = Field(ge=0)
    """Worsening that is tolerated: a difference for `success` and `quality` (0.02 is 2 points), a
    share of control's value for latencies (0.1 is 10 % slower)."""


class ExperimentPlan(Table):
    """What an experiment compares and when it is decided; kept with it in the store."""

    salt: str = Field(min_length=1)
    """Of the assignment; each experiment has its own, so that experiments split independently."""
    models: dict[str, str]
    """What serves each arm, `control` and `candidate`."""
    weights: dict[str, float]
    """Share of the units of each arm, above 0, together 1."""
    weights_since: float | None = None
    """When the weights were last changed, unix seconds; None if never. Units that were exposed
    before count no more, also where they had the same weights."""
    primary: MeanMetric = "success"
    """The one metric that decides about promotion."""
    guardrails: tuple[Guardrail, ...] = ()
    """Metrics that must not be harmed; each gets an equal share of `alpha`."""
    guardrails_proven: bool = False
    """True promotes only when every guardrail is shown to lie within its margin; False when none is
    shown to lie beyond it."""
    alpha: float = Field(default=0.05, gt=0, lt=0.5)
    """Probability that the primary metric's sequence ever misses the truth, and the same again for
    the guardrails together."""
    tuned_for: int = Field(default=1000, ge=10)
    """Units of both arms together after which the sequence is about narrowest; set it near the
    number that a decision should need."""
    burn_in: int = Field(default=50, ge=10)
    """Units of each arm before a metric is judged: the sequence is asymptotic."""
    max_units: int = Field(default=20_000, ge=20)
    """Units of both arms after which an undecided experiment is stopped for futility."""
    end_after_hours: float | None = Field(default=None, gt=0)
    """Hours after which the split ends by itself, so that everybody gets control, and an undecided
    experiment is stopped for futility; None has no such end."""
    unanswered_after_seconds: float = Field(default=900.0, gt=0)
    """A unit without any outcome this long after its exposure counts as one failed request."""
    use_covariates: bool = True
    """Whether covariates that exposures carry take noise out of the primary metric."""

    @model_validator(mode="after")
    def _two_arms(self) -> ExperimentPlan:
        for name, table in (("models", self.models), ("weights", self.weights)):
            if set(table) != set(ARMS):
                raise ValueError(f"{name} must name {list(ARMS)}, got {sorted(table)}")
        nameless = [arm for arm in ARMS if not self.models[arm].strip()]
        if nameless:
            raise ValueError(f"{nameless[0]} has an empty name; name the model that serves it")
        check_weights(self.weights)
        if min(self.weights.values()) <= 0:
            raise ValueError(f"weights are {self.weights}; an arm without units shows nothing")
        if self.models["control"] == self.models["candidate"]:
            raise ValueError(
                f"both arms are {self.models['control']!r}; name two models, or two names of one "
                "model to test the test itself"
            )
        return self

    @model_validator(mode="after")
    def _each_metric_once(self) -> ExperimentPlan:
        metrics = [self.primary, *(guardrail.metric for guardrail in self.guardrails)]
        twice = sorted({metric for metric in metrics if metrics.count(metric) > 1})
        if twice:
            raise ValueError(f"{twice[0]!r} is judged twice; name each metric once")
        return self

    def ends(self, began: float) -> float | None:
        """When the hours of an experiment that began then are over; None without such an end.

        Args:
            began: unix seconds, as is what is returned.
        """
        return None if self.end_after_hours is None else began + 3600 * self.end_after_hours

    @property
    def guardrail_alpha(self) -> float:
        """Bonferroni's share of one guardrail."""
        return self.alpha / max(1, len(self.guardrails))


def plan_of(config: Mapping[str, Any]) -> ExperimentPlan:
    """The plan that an experiment's stored settings are.

    Raises:
        ConfigError: an unknown setting (the nearest name is offered), or a value not allowed.
    """
    return settings_of(ExperimentPlan, config, of="experiment")
