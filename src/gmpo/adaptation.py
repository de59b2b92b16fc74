"""Adaptive settings at the training loop: what a round runs with, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

from gmpo.assembly import TrainingParts
from gmpo.checkpoint import TrainingState
from gmpo.config import RewardConfig, RunConfig
from gmpo.errors import ConfigError
from gmpo.guard import GuardState
from gmpo.records import Group, Rollout
from gmpo.rewards import floored_geometric_mean
from gmpo.schedules import (
    REWARD_AT_FIRST_FLOOR,
    ClipLaw,
    ClipSide,
    StepSize,
    StepSizeLaw,
    adapted_clip,
    adapted_step_size,
    deciding_strain,
    scheduled_floor,
)
from gmpo.tracking import RunFolder

__all__ = [
    "AdaptedSettings",
    "Change",
    "adapt_round",
    "adapted_parts",
    "adaptive_metrics",
    "constant_recipe",
]


@dataclass(frozen=True, kw_only=True)
class AdaptedSettings:
    """What the next round runs with, and what the controllers remember; None is constant.

    Attributes:
        clip_low: lower side of the clip.
        clip_high: upper side of the clip.
        step_size: factor on the scheduled step size.
        reward_floor: of geometrically combined rewards.
        floor_rounds: rounds that count towards the floor's end.
    """

    clip_low: ClipSide | None
    clip_high: ClipSide | None
    step_size: StepSize | None
    reward_floor: float | None
    floor_rounds: int = 0

    @classmethod
    def of(cls, config: RunConfig, state: TrainingState) -> AdaptedSettings:
        """Those that the state holds; before the first round, the recipe's own."""
        if state.adapted:
            return cls._from_record(state.adapted)
        adaptive = config.adaptive
        clips = config.objective.clips() if adaptive.clip else {}
        sides = {name: ClipSide(half_width=value) for name, value in clips.items()}
        return cls(
            clip_low=sides.get("clip_low"),
            clip_high=sides.get("clip_high"),
            step_size=StepSize() if adaptive.learning_rate else None,
            reward_floor=None if adaptive.reward_floor_end is None else config.reward.floor,
        )

    @classmethod
    def _from_record(cls, record: Mapping[str, Any]) -> AdaptedSettings:
        low, high, size = (record[name] for name in ("clip_low", "clip_high", "step_size"))
        return cls(
            clip_low=None if low is None else ClipSide(**low),
            clip_high=None if high is None else ClipSide(**high),
            step_size=None if size is None else StepSize.from_record(size),
            reward_floor=record["reward_floor"],
            floor_rounds=record["floor_rounds"],
        )

    def values(self) -> dict[str, float]:
        """Each adaptive setting by the name of its metric."""
        found: dict[str, float] = {}
        if self.clip_low is not None:
            found["adaptive/clip_low"] = self.clip_low.half_width
        if self.clip_high is not None:
            found["adaptive/clip_high"] = self.clip_high.half_width
        if self.step_size is not None:
            found["adaptive/learning_rate_factor"] = self.step_size.factor
        if self.reward_floor is not None:
            found["adaptive/reward_floor"] = self.reward_floor
        return found


@dataclass(frozen=True, kw_only=True)
class Change:
    """One setting that moved between two rounds, with its evidence.

    Attributes:
        setting: name of its metric.
        round: after which it moved.
        before: value in that round.
        after: value in the next round.
        metric: that it followed; None for the reward's floor, which follows the plan.
        value: of the metric, over recent rounds.
        low: end of the metric's range in which the setting stays.
        high: other end of that range.
    """

    setting: str
    round: int
    before: float
    after: float
    metric: str | None = None
    value: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def kind(self) -> str:
        """What tells it from the guard's alarms in `events.jsonl`."""
        return "adaptation"


def adapted_parts(parts: TrainingParts, state: TrainingState) -> TrainingParts:
    """The parts of the next round: those of the run, under the settings that the state holds."""
    config = parts.config
    if not config.adaptive.is_on:
        return parts
    settings = AdaptedSettings.of(config, state)
    objective, training, reward = config.objective, config.training, config.reward
    sides = {"clip_low": settings.clip_low, "clip_high": settings.clip_high}
    clips = {name: side.half_width for name, side in sides.items() if side is not None}
    objective = objective.model_copy(update=clips)
    if settings.step_size is not None:
        rate = training.learning_rate * settings.step_size.factor
        training = training.model_copy(update={"learning_rate": rate})
    if settings.reward_floor is not None:
        reward = reward.model_copy(update={"floor": settings.reward_floor})
    changes = {"objective": objective, "training": training, "reward": reward}
    return parts.under(config.model_copy(update=changes))


def adaptive_metrics(
    config: RunConfig, state: TrainingState, groups: Sequence[Group]
) -> dict[str, float]:
    """The values that a round runs with, for its line in `metrics.jsonl`; empty if constant.

    Args:
        config: the recipe.
        state: before the round.
        groups: of the round, with rewards.
    """
    if not config.adaptive.is_on:
        return {}
    metrics = AdaptedSettings.of(config, state).values()
    if config.adaptive.reward_floor_end is not None:
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        rewards = [
            _reward_at_first_floor(config.reward, rollout)
            for rollout in rollouts
            if rollout.reward is not None
        ]
        if rewards:
            metrics[REWARD_AT_FIRST_FLOOR] = fmean(rewards)
    return metrics


def adapt_round(
    run: RunFolder, config: RunConfig, state: TrainingState, metrics: Mapping[str, float | None]
) -> TrainingState:
    """The state with the settings of the next round; each change is a line of `events.jsonl`.

    Call it once the guard has judged the round that `state` ended. What adapts is saved with the
    state, so that a resumed run goes on as one that was not killed.

    Args:
        run: folder of the run.
        config: the recipe.
        state: after the round.
        metrics: of the round, as the guard judged them.

    Raises:
        RunFolderError: a line cannot be written.
    """
    if not config.adaptive.is_on:
        return state
    before = AdaptedSettings.of(config, state)
    frozen = bool(state.guard and GuardState.from_record(state.guard).raised)
    after = _next_settings(config, before, metrics, state=state, frozen=frozen)
    if state.round < config.training.rounds:  # no round comes that a last change could act in
        for change in _changes(config, before, after, metrics, round_number=state.round):
            run.log_event({"kind": change.kind, **asdict(change), "attempt": state.attempt})
    return replace(state, adapted=asdict(after))


def constant_recipe(config: RunConfig) -> RunConfig:
    """The recipe of a loop that has no rounds or total of steps to plan with: nothing moves.

    Raises:
        ConfigError: something in the recipe adapts.
    """
    if config.adaptive.is_on:
        raise ConfigError(
            "settings of [adaptive] follow the rounds of train(), and a loop of your own has none; "
            "leave them out, or call train()"
        )
    training = config.training.model_copy(update={"schedule": "constant"})
    return config.model_copy(update={"training": training})


def _next_settings(
    config: RunConfig,
    settings: AdaptedSettings,
    metrics: Mapping[str, float | None],
    *,
    state: TrainingState,
    frozen: bool,
) -> AdaptedSettings:
    adaptive, training = config.adaptive, config.training
    if settings.reward_floor is not None and adaptive.reward_floor_end is not None and not frozen:
        rounds = settings.floor_rounds + 1
        floor = scheduled_floor(
            rounds,
            first=config.reward.floor,
            last=adaptive.reward_floor_end,
            total_rounds=training.rounds,
        )
        settings = replace(settings, floor_rounds=rounds, reward_floor=floor)
    if state.step - training.steps_per_round < training.warmup_steps:
        return settings  # what small first steps do says nothing about those that follow
    low, high, size = settings.clip_low, settings.clip_high, settings.step_size
    if low is not None and high is not None:
        law = _clip_law(config)
        low = adapted_clip(metrics.get(_share_metric("clip_low")), low, law, frozen=frozen)
        high = adapted_clip(metrics.get(_share_metric("clip_high")), high, law, frozen=frozen)
    if size is not None:
        size = adapted_step_size(metrics, size, _step_size_law(config), frozen=frozen)
    return replace(settings, clip_low=low, clip_high=high, step_size=size)


def _changes(
    config: RunConfig,
    before: AdaptedSettings,
    after: AdaptedSettings,
    metrics: Mapping[str, float | None],
    *,
    round_number: int,
) -> Iterator[Change]:
    old, new = before.values(), after.values()
    for setting in new:
        if new[setting] == old[setting]:
            continue
        yield Change(
            setting=setting,
            round=round_number,
            before=old[setting],
            after=new[setting],
            **_evidence(config, after, metrics, setting),
        )


def _evidence(
    config: RunConfig,
    after: AdaptedSettings,
    metrics: Mapping[str, float | None],
    setting: str,
) -> dict[str, Any]:
    """What moved a setting: the metric, its value, and where it would have moved nothing."""
    name = setting.removeprefix("adaptive/")
    side = {"clip_low": after.clip_low, "clip_high": after.clip_high}.get(name)
    if side is not None:
        law = _clip_law(config)
        return {
            "metric": _share_metric(name),
            "value": side.share,
            "low": law.share_min,
            "high": law.share_max,
        }
    if name == "learning_rate_factor" and after.step_size is not None:
        strain = deciding_strain(metrics, after.step_size, _step_size_law(config))
        assert strain is not None, "the factor moves after a signal only"
        evidence = asdict(strain)
        del evidence["deviations"], evidence["is_measured"]
        return evidence
    return {}


def _share_metric(side: str) -> str:
    return {"clip_low": "clip/low_fraction", "clip_high": "clip/high_fraction"}[side]


def _clip_law(config: RunConfig) -> ClipLaw:
    adaptive = config.adaptive
    narrowest, widest = adaptive.clip_bounds(config.objective.name)
    return ClipLaw(
        narrowest=narrowest,
        widest=widest,
        share_min=adaptive.clip_share_min,
        share_max=adaptive.clip_share_max,
        gain=adaptive.clip_gain,
        average_rounds=adaptive.clip_average_rounds,
        warm_up_rounds=adaptive.warm_up_rounds,
    )


def _step_size_law(config: RunConfig) -> StepSizeLaw:
    adaptive = config.adaptive
    return StepSizeLaw(
        lowest=adaptive.learning_rate_min,
        gain=adaptive.learning_rate_gain,
        tolerance=adaptive.learning_rate_tolerance,
        warm_up_rounds=adaptive.warm_up_rounds,
    )


def _reward_at_first_floor(reward: RewardConfig, rollout: Rollout) -> float:
    """A rewarded rollout's reward, had the floor stayed where the recipe begins."""
    if reward.truncated == "zero" and rollout.is_truncated:
        return 0.0
    components = {name: rollout.rewards.get(name) for name in reward.weights}
    value = floored_geometric_mean(components, reward.weights, reward.floor)
    assert value is not None, "a rollout with a reward has a component"
    return value
