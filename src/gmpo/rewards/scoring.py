"""Groups scored: every function called, faults handled by the rule, components combined."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from gmpo.errors import ConfigError, DataError
from gmpo.records import Group, Prompt, Rollout
from gmpo.rewards.calls import RewardFunctions
from gmpo.rewards.combination import floored_geometric_mean, weighted_sum
from gmpo.rewards.convention import RewardCall, RewardFault, RewardRows, rows_by_form

__all__ = ["RewardRule", "ScoredGroups", "joined", "score_groups"]


@dataclass(frozen=True, kw_only=True)
class RewardRule:
    """How components become a reward, and what happens to a rollout without one.

    Attributes:
        weights: of each component; None is 1 each.
        combine: `weighted_sum` or `floored_geometric_mean`.
        floor: of the geometric combination.
        truncated: "score" treats completions cut by the token limit like others; "zero" makes
            their reward 0 and keeps their components.
        on_error: "stop" ends the run at a function's first fault; "drop" marks the rollouts with
            an error, so that they are counted and not trained on.

    Raises:
        ConfigError: an option does not exist.
    """

    weights: Mapping[str, float] | None = None
    combine: Literal["sum", "geometric"] = "sum"
    floor: float = 0.05
    truncated: Literal["score", "zero"] = "score"
    on_error: Literal["stop", "drop"] = "stop"

    def __post_init__(self) -> None:
        allowed = {
            "combine": ("sum", "geometric"),
            "truncated": ("score", "zero"),
            "on_error": ("stop", "drop"),
        }
        for name, values in allowed.items():
            value = vars(self)[name]
            if value not in values:
                raise ConfigError(
                    f"{name} is {value!r}; it must be {' or '.join(map(repr, values))}"
                )


@dataclass(frozen=True, kw_only=True)
class ScoredGroups:
    """Groups with rewards, and what happened on the way.

    Every rollout is in exactly one of: rewarded, `num_errors`, `num_unrewarded`. The others
    count some of the rewarded ones. `grading` holds the counts of `Grader.counts`, of this call.
    """

    groups: tuple[Group, ...]
    num_rollouts: int
    num_errors: int  # sampled with an error, or a function failed on it; the reward stays None
    num_unrewarded: int  # no component said anything; the reward stays None
    num_truncated: int  # cut by the token limit, whatever reward that led to
    num_zeroed: int  # of these, given 0 because of `truncated="zero"`
    num_timeouts: int  # grading did not end
    grading: Mapping[str, int]
    component_errors: Mapping[str, int] = field(default_factory=dict)  # failed rollouts by function
    metrics: Mapping[str, list[float]] = field(default_factory=dict)  # what functions logged


def score_groups(
    groups: Sequence[Group],
    rewards: RewardFunctions,
    *,
    rule: RewardRule,
    trainer_state: object = None,
) -> ScoredGroups:
    """The groups with `rewards` and `reward` filled in on every rollout that has no error.

    Each function is called once with all usable rollouts of chats, and once with all of plain
    texts, whichever there are. A component that is None is left out of the rollout's `rewards`.

    Args:
        groups: as sampled; not changed.
        rewards: the functions by the name of their component.
        rule: how their values are combined.
        trainer_state: handed on to the functions.

    Raises:
        ConfigError: a weight is not allowed or missing.
        DataError: a function did something wrong and the rule says stop: function, prompt,
            rollout and value are named. Or a component does not fit the combination.
    """
    usable = [(group.prompt, r) for group in groups for r in group.rollouts if r.error is None]
    before = _grading_counts(rewards)
    components, calls = _components(usable, rewards, trainer_state)
    grading = {name: count - before[name] for name, count in _grading_counts(rewards).items()}
    if rule.on_error == "stop":
        _stop_at_a_fault(usable, components, calls)
    notes = _notes(calls)
    rewarded = {
        id(rollout): replace(_rewarded(rollout, row, rule), notes=notes.get(place, {}))
        for place, ((_, rollout), row) in enumerate(zip(usable, components, strict=True))
    }
    scored = tuple(
        replace(group, rollouts=tuple(rewarded.get(id(r), r) for r in group.rollouts))
        for group in groups
    )
    rollouts = [rollout for group in scored for rollout in group.rollouts]
    counted = [rollout for rollout in rollouts if rollout.error is None]
    return ScoredGroups(
        groups=scored,
        num_rollouts=len(rollouts),
        num_errors=len(rollouts) - len(counted),
        num_unrewarded=sum(rollout.reward is None for rollout in counted),
        num_truncated=sum(rollout.is_truncated for rollout in counted),
        num_zeroed=sum(
            rule.truncated == "zero" and rollout.is_truncated and rollout.reward is not None
            for rollout in counted
        ),
        num_timeouts=grading.get("timeouts", 0),
        grading=grading,
        component_errors={
            name: sum(isinstance(row[name], RewardFault) for row in components)
            for name in rewards.functions
        },
        metrics=_metrics(calls),
    )


def joined(first: ScoredGroups, second: ScoredGroups) -> ScoredGroups:
    """Both, the first's groups first; counts are added, logged values stand one after another."""
    counts = {
        name: value + vars(second)[name]
        for name, value in vars(first).items()
        if name.startswith("num_")
    }
    names = [*first.metrics, *(name for name in second.metrics if name not in first.metrics)]
    return ScoredGroups(
        groups=first.groups + second.groups,
        **counts,
        grading=_added(first.grading, second.grading),
        component_errors=_added(first.component_errors, second.component_errors),
        metrics={
            name: [*first.metrics.get(name, []), *second.metrics.get(name, [])] for name in names
        },
    )


_Row = dict[str, float | RewardFault | None]


def _components(
    usable: Sequence[tuple[Prompt, Rollout]], rewards: RewardFunctions, trainer_state: object
) -> tuple[list[_Row], list[RewardCall]]:
    """Each usable rollout's components by name, and the calls that gave them."""
    rows: list[_Row] = [{} for _ in usable]
    calls: list[RewardCall] = []
    for form in rows_by_form(usable):
        values, made = rewards.call(form, trainer_state=trainer_state)
        calls += made
        for name, of_form in values.items():
            for place, value in zip(form.places, of_form, strict=True):
                rows[place][name] = value
    return rows, calls


def _rewarded(rollout: Rollout, row: _Row, rule: RewardRule) -> Rollout:
    """The rollout with its components and their combination, or with the faults as its error."""
    faults = {name: value for name, value in row.items() if isinstance(value, RewardFault)}
    values = {name: value for name, value in row.items() if not isinstance(value, RewardFault)}
    present = {name: value for name, value in values.items() if value is not None}
    if faults:
        error = "; ".join(f"reward {name!r} {fault.what}" for name, fault in faults.items())
        return replace(rollout, rewards=present, error=error)
    weights = dict.fromkeys(values, 1.0) if rule.weights is None else rule.weights
    try:
        reward = (
            weighted_sum(values, weights)
            if rule.combine == "sum"
            else floored_geometric_mean(values, weights, rule.floor)
        )
    except DataError as error:
        raise DataError(f"{_named(rollout)}: {error}") from error
    if rule.truncated == "zero" and rollout.is_truncated and reward is not None:
        reward = 0.0
    return replace(rollout, rewards=present, reward=reward)


def _stop_at_a_fault(
    usable: Sequence[tuple[Prompt, Rollout]],
    components: Sequence[_Row],
    calls: Sequence[RewardCall],
) -> None:
    """Raise what the first fault was, with the rows it concerns."""
    for place, row in enumerate(components):
        for name, value in row.items():
            if not isinstance(value, RewardFault):
                continue
            where = f"{_named(usable[place][1])}: reward {name!r} {value.what}"
            if value.of_whole_call:
                called = next(c.rows for c in calls if place in c.rows.places)
                where = f"reward {name!r} {value.what}; it was called with {_range(called)}"
            raise DataError(
                f"{where}; mend it, or set reward.on_error = 'drop' to leave such rollouts out of "
                "training and count them"
            ) from value.cause


def _notes(calls: Sequence[RewardCall]) -> dict[int, dict[str, Any]]:
    """What functions logged beside each usable rollout, by its place."""
    notes: dict[int, dict[str, Any]] = {}
    for call in calls:
        for column, values in call.notes:
            for place, value in zip(call.rows.places, values, strict=True):
                notes.setdefault(place, {})[column] = _plain(value)
    return notes


def _plain(value: Any) -> str | float | None:
    """What JSON can hold of a logged value: numbers and texts as they are, the rest as text."""
    if value is None or isinstance(value, str | bool | int):
        return value
    is_number = isinstance(value, float) and math.isfinite(value)
    return float(value) if is_number else str(value)


def _metrics(calls: Sequence[RewardCall]) -> dict[str, list[float]]:
    metrics: dict[str, list[float]] = {}
    for call in calls:
        for name, value in call.metrics:
            metrics.setdefault(name, []).append(value)
    return metrics


def _named(rollout: Rollout) -> str:
    return f"prompt {rollout.prompt_id!r}, rollout {rollout.index}"


def _range(rows: RewardRows) -> str:
    first, last = rows.rollouts[0], rows.rollouts[-1]
    return f"{len(rows.rollouts)} rollouts, {_named(first)} to {_named(last)}"


def _added(first: Mapping[str, int], second: Mapping[str, int]) -> dict[str, int]:
    return {name: first.get(name, 0) + second.get(name, 0) for name in {**first, **second}}


def _grading_counts(rewards: RewardFunctions) -> dict[str, int]:
    """The counts of all graders behind the functions, each grader once."""
    totals: Counter[str] = Counter()
    for grader in rewards.graders:
        totals.update(grader.counts)
    return dict(totals)
