"""Rewards: groups of rollouts in, the same groups with their components and rewards out."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from gmpo.errors import ConfigError, DataError
from gmpo.grading import Grader
from gmpo.records import Group, Prompt, Rollout

__all__ = [
    "CorrectReward",
    "RewardFunction",
    "ScoredGroups",
    "correct_reward",
    "floored_geometric_mean",
    "format_reward",
    "score_groups",
    "weighted_sum",
]


class RewardFunction(Protocol):
    """One value a completion, None where the function has nothing to say about it.

    `prompts` and `completions` are texts of equal number (a chat is its turns, a blank line
    between them); `columns` holds, by name, one value a completion of every column that any
    of the prompts has, None where a prompt lacks it.
    """

    def __call__(
        self, prompts: list[str], completions: list[str], **columns: list[Any]
    ) -> list[float | None]:
        """The rewards, in the order of the completions."""


@dataclass(frozen=True, kw_only=True)
class ScoredGroups:
    """Groups with rewards, and what happened on the way.

    Every rollout is in exactly one of: rewarded, `num_errors`, `num_unrewarded`. The others
    count some of the rewarded ones. `grading` holds the counts of `Grader.counts`, of this call.
    """

    groups: tuple[Group, ...]
    num_rollouts: int
    num_errors: int  # came with an error; the reward stays None
    num_unrewarded: int  # no component said anything; the reward stays None
    num_truncated: int  # cut by the token limit, whatever reward that led to
    num_zeroed: int  # of these, given 0 because of `truncated="zero"`
    num_timeouts: int  # grading did not end
    grading: Mapping[str, int]


class CorrectReward:
    """1.0 for a right final answer, 0.0 for any other; see `correct_reward`."""

    def __init__(self, grader: Grader) -> None:
        self.grader = grader

    def __call__(
        self, prompts: list[str], completions: list[str], **columns: list[Any]
    ) -> list[float | None]:
        """The rewards, in the order of the completions.

        Raises:
            DataError: a prompt has no answer, or a kind of grading that does not exist.
        """
        rewards: list[float | None] = []
        for row, completion in enumerate(completions):
            item = {name: values[row] for name, values in columns.items()}
            try:
                verdict = self.grader.grade_item(completion, item)
            except DataError as error:
                raise DataError(f"row {row}: {error}") from error
            rewards.append(1.0 if verdict.is_correct else 0.0)
        return rewards


def correct_reward(grader: Grader) -> CorrectReward:
    """A reward function: 1.0 where the final answer is right, else 0.0.

    `Grader.grade_item` says which columns are read. A time-out is 0.0, and is counted in
    `ScoredGroups.num_timeouts`.

    Args:
        grader: stays the caller's to close.
    """
    return CorrectReward(grader)


def format_reward(pattern: str) -> RewardFunction:
    """A reward function: 1.0 where the whole completion matches the pattern, else 0.0.

    Args:
        pattern: a regular expression; put (?s) first to let the dot match line ends.

    Raises:
        ConfigError: it is not a regular expression.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{pattern!r} is not a regular expression: {error}") from error

    def reward(
        prompts: list[str], completions: list[str], **columns: list[Any]
    ) -> list[float | None]:
        return [1.0 if compiled.fullmatch(completion) else 0.0 for completion in completions]

    return reward


def weighted_sum(
    components: Mapping[str, float | None], weights: Mapping[str, float]
) -> float | None:
    """sum_m w_m r_m over the components that are there; None if none with a weight is.

    A component that is None is missing, not 0: the weights of the others grow in proportion, so
    that their total stays what it was.

    Args:
        components: rewards r_m by name, finite or None.
        weights: w_m for the same names, finite, 0 or more.

    Raises:
        DataError: a component is NaN or infinite.
        ConfigError: weights are negative, not finite, or for other names.
    """
    present, share = _present(components, weights)
    if share == 0:
        return None
    return sum(weights[name] * value for name, value in present.items()) / share


def floored_geometric_mean(
    components: Mapping[str, float | None], weights: Mapping[str, float], floor: float = 0.05
) -> float | None:
    """prod_m (f + (1 - f) r_m)^(w_m / W) over the components that are there; None if none is.

    W is the sum of the weights that are there, so a missing component (None) is left out rather
    than counted as 0. The result lies in [f, 1]. A component of 0 is a soft veto: the floor keeps
    failures of different size apart, where a plain geometric mean gives them all 0.

    Args:
        components: rewards r_m by name, each from 0 to 1 or None.
        weights: w_m for the same names, finite, 0 or more.
        floor: f, above 0 and below 1.

    Raises:
        DataError: a component is NaN or outside [0, 1].
        ConfigError: the floor or the weights are not as above.
    """
    if not 0 < floor < 1:
        raise ConfigError(f"floor is {floor}; it must be above 0 and below 1")
    present, share = _present(components, weights)
    for name, value in present.items():
        if not 0 <= value <= 1:
            raise DataError(
                f"component {name!r} is {value}; a geometric combination needs rewards from 0 to "
                "1; map it into that range or combine by sum"
            )
    if share == 0:
        return None
    total = sum(weights[name] for name in present)
    logs = (weights[name] * math.log(floor + (1 - floor) * r) for name, r in present.items())
    return math.exp(sum(logs) / total)


def score_groups(
    groups: Sequence[Group],
    rewards: Mapping[str, RewardFunction],
    *,
    weights: Mapping[str, float] | None = None,
    combine: Literal["sum", "geometric"] = "sum",
    floor: float = 0.05,
    truncated: Literal["score", "zero"] = "score",
) -> ScoredGroups:
    """The groups with `rewards` and `reward` filled in on every rollout that has no error.

    Each function is called once, with all usable rollouts. A component that is None is left out
    of the rollout's `rewards`.

    Args:
        groups: as sampled; not changed.
        rewards: the functions by the name of their component, at least one.
        weights: for the same names; None is 1 each.
        combine: `weighted_sum` or `floored_geometric_mean`.
        floor: of the geometric combination.
        truncated: "score" treats completions cut by the token limit like others; "zero" makes
            their reward 0 and keeps their components.

    Raises:
        ConfigError: there is no function, an option is unknown, or a weight is not allowed.
        DataError: a function returned the wrong number of values, or one that is not usable;
            prompt and rollout are named.
    """
    if not rewards:
        raise ConfigError("there is no reward function; give at least one")
    if combine not in ("sum", "geometric") or truncated not in ("score", "zero"):
        raise ConfigError(
            f"combine is {combine!r} and truncated {truncated!r}; "
            "they must be 'sum' or 'geometric', and 'score' or 'zero'"
        )
    used_weights = dict.fromkeys(rewards, 1.0) if weights is None else weights
    usable = [(group.prompt, r) for group in groups for r in group.rollouts if r.error is None]
    before = _grading_counts(rewards)
    components = _components(usable, rewards)
    grading = {name: count - before[name] for name, count in _grading_counts(rewards).items()}
    scored: dict[int, Rollout] = {}
    for (_, rollout), row in zip(usable, components, strict=True):
        try:
            reward = (
                weighted_sum(row, used_weights)
                if combine == "sum"
                else floored_geometric_mean(row, used_weights, floor)
            )
        except DataError as error:
            raise DataError(f"{_named(rollout)}: {error}") from error
        if truncated == "zero" and rollout.is_truncated and reward is not None:
            reward = 0.0
        present = {name: value for name, value in row.items() if value is not None}
        scored[id(rollout)] = replace(rollout, rewards=present, reward=reward)
    num_truncated = sum(rollout.is_truncated for rollout in scored.values())
    return ScoredGroups(
        groups=tuple(
            replace(group, rollouts=tuple(scored.get(id(r), r) for r in group.rollouts))
            for group in groups
        ),
        num_rollouts=sum(len(group.rollouts) for group in groups),
        num_errors=sum(r.error is not None for group in groups for r in group.rollouts),
        num_unrewarded=sum(rollout.reward is None for rollout in scored.values()),
        num_truncated=num_truncated,
        num_zeroed=sum(
            truncated == "zero" and rollout.is_truncated and rollout.reward is not None
            for rollout in scored.values()
        ),
        num_timeouts=grading.get("timeouts", 0),
        grading=grading,
    )


def _components(
    usable: Sequence[tuple[Prompt, Rollout]], rewards: Mapping[str, RewardFunction]
) -> list[dict[str, float | None]]:
    """Each usable rollout's components by name."""
    rows: list[dict[str, float | None]] = [{} for _ in usable]
    if not usable:
        return rows
    prompts = [_prompt_text(prompt) for prompt, _ in usable]
    completions = [rollout.text for _, rollout in usable]
    columns = _columns([prompt for prompt, _ in usable])
    for name, function in rewards.items():
        values = function(prompts, completions, **columns)
        if len(values) != len(usable):
            raise DataError(
                f"reward {name!r} returned {len(values)} values for {len(usable)} completions; "
                "it must return one a completion, None where it has none"
            )
        for row, value, (_, rollout) in zip(rows, values, usable, strict=True):
            row[name] = None if value is None else _number(value, f"{_named(rollout)}: {name!r}")
    return rows


def _columns(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    names = list(dict.fromkeys(name for prompt in prompts for name in prompt.columns))
    for reserved in ("prompts", "completions"):
        if reserved in names:
            raise DataError(
                f"a prompt has a column {reserved!r}, which reward functions get for something "
                "else; rename it in the data set"
            )
    return {name: [prompt.columns.get(name) for prompt in prompts] for name in names}


def _number(value: object, where: str) -> float:
    try:
        return float(value)  # type: ignore[arg-type]  # user functions may return anything
    except (TypeError, ValueError) as error:
        raise DataError(f"{where} is {value!r}; a reward must be a number or None") from error


def _present(
    components: Mapping[str, float | None], weights: Mapping[str, float]
) -> tuple[dict[str, float], float]:
    """The components that are not None, and the share of the total weight that they hold."""
    if set(weights) != set(components):
        raise ConfigError(
            f"weights are for {sorted(weights)} and rewards for {sorted(components)}; "
            "give one weight a reward"
        )
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(
                f"the weight of {name!r} is {weight}; it must be a finite number, 0 or more; "
                "for a penalty let the reward itself be negative"
            )
    present = {name: value for name, value in components.items() if value is not None}
    for name, value in present.items():
        if not math.isfinite(value):
            raise DataError(
                f"component {name!r} is {value}; it must be a finite number, "
                "or None where there is none"
            )
    total = sum(weights.values())
    if total == 0:
        raise ConfigError("all weights are 0, so no reward would count; give one above 0")
    return present, sum(weights[name] for name in present) / total


def _prompt_text(prompt: Prompt) -> str:
    if prompt.messages is None:
        return prompt.text or ""
    return "\n\n".join(message.content for message in prompt.messages)


def _named(rollout: Rollout) -> str:
    return f"prompt {rollout.prompt_id!r}, rollout {rollout.index}"


def _grading_counts(rewards: Mapping[str, RewardFunction]) -> dict[str, int]:
    """The counts of all graders behind the functions, each grader once."""
    graders = {id(f.grader): f.grader for f in rewards.values() if isinstance(f, CorrectReward)}
    totals: dict[str, int] = {}
    for grader in graders.values():
        for name, count in grader.counts.items():
            totals[name] = totals.get(name, 0) + count
    return totals
