"""The `[adaptive]` table of a recipe: which settings follow the run, and within which bounds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from gmpo.task_config import Table

if TYPE_CHECKING:
    from gmpo.config import RunConfig

__all__ = ["AdaptiveConfig"]

_BOUNDS = {"log space": (0.1, 0.8), "ratio space": (0.05, 0.4)}
"""A quarter and twice of the default half-widths 0.4 and 0.2."""
_UNITS = {
    "gmpo": "log space",
    "gmpo_no_norm": "log space",
    "grpo": "ratio space",
    "dr_grpo": "ratio space",
}
"""Objectives that clip single tokens; their clipped shares are of one size."""


class AdaptiveConfig(Table):
    """Settings that follow the run between rounds; by default all are constant."""

    clip: bool = False
    """Whether `objective.clip_low` and `objective.clip_high` each follow the share of tokens that
    they cut; for gmpo and gmpo_no_norm (log space), grpo and dr_grpo (ratio space)."""
    clip_min: float | None = Field(default=None, gt=0)
    """Narrowest half-width, in the objective's own unit; None is 0.1 in log space and 0.05 in ratio
    space."""
    clip_max: float | None = Field(default=None, gt=0)
    """Widest half-width, in the same unit; None is 0.8 in log space and 0.4 in ratio space."""
    clip_share_min: float = Field(default=0.005, gt=0, lt=1)
    """Share of counted tokens below which a side narrows, as a fraction."""
    clip_share_max: float = Field(default=0.02, gt=0, lt=1)
    """Share of counted tokens above which a side widens, as a fraction."""
    clip_gain: float = Field(default=0.2, gt=0, le=1)
    """A half-width is multiplied by exp(gain x error) a round, the error cut to 0.2 either way."""
    clip_average_rounds: int = Field(default=10, ge=1)
    """Rounds that the moving mean of the share remembers."""
    learning_rate: bool = False
    """Whether the step size is lowered while gradients, ratios or KL lie above the run's first
    rounds or the reward falls, and raised back slowly afterwards."""
    learning_rate_min: float = Field(default=0.1, gt=0, lt=1)
    """Smallest factor on what `training.schedule` says; the largest is 1."""
    learning_rate_gain: float = Field(default=0.5, gt=0, le=1)
    """The factor is multiplied by exp(-gain x error) a round, the error cut to 0.2; it rises at a
    fifth of that pace."""
    learning_rate_tolerance: float = Field(default=3.0, gt=0)
    """Deviation from the first rounds, in their robust standard deviations, above which the step
    size is lowered; below half of it, it rises."""
    warm_up_rounds: int = Field(default=20, ge=5)
    """Measured rounds before clip and step size may change, and the step size's baseline."""
    reward_floor_end: float | None = Field(default=None, gt=0, lt=1)
    """Where the floor of geometrically combined rewards arrives in the last round, falling
    geometrically from `reward.floor`; None keeps it."""

    @model_validator(mode="after")
    def _settings_of_what_is_on(self) -> AdaptiveConfig:
        values: dict[str, Any] = vars(self)
        for switch in ("clip", "learning_rate"):
            for key, field in AdaptiveConfig.model_fields.items():
                is_changed = key.startswith(f"{switch}_") and values[key] != field.default
                if is_changed and not values[switch]:
                    raise ValueError(
                        f"adaptive.{key} = {values[key]!r} needs adaptive.{switch}, which is off; "
                        f"set adaptive.{switch} = true, or remove adaptive.{key}"
                    )
        if self.warm_up_rounds != 20 and not (self.clip or self.learning_rate):
            raise ValueError(
                f"adaptive.warm_up_rounds = {self.warm_up_rounds} is of clip and learning_rate, "
                "which are off; set one of them to true, or remove it"
            )
        if self.clip_share_min >= self.clip_share_max:
            raise ValueError(
                f"adaptive.clip_share_min = {self.clip_share_min} must be below "
                f"adaptive.clip_share_max = {self.clip_share_max}: in between nothing changes"
            )
        return self

    @property
    def is_on(self) -> bool:
        """Whether anything follows the run."""
        return self.clip or self.learning_rate or self.reward_floor_end is not None

    def clip_bounds(self, objective: str) -> tuple[float, float]:
        """Narrowest and widest half-width in the unit of an objective that clips tokens."""
        narrowest, widest = _BOUNDS[_UNITS[objective]]
        return (
            narrowest if self.clip_min is None else self.clip_min,
            widest if self.clip_max is None else self.clip_max,
        )

    def require_fit(self, run: RunConfig) -> None:
        """Refuse what the rest of the recipe gives no meaning.

        Raises:
            ValueError: it names the keys that contradict each other, and what to set.
        """
        if self.is_on and run.guard.mode == "off":
            raise ValueError(
                "[adaptive] needs the guard, whose alarms hold what adapts, and guard.mode is "
                "'off'; set guard.mode = 'warn'"
            )
        if self.clip:
            self._require_clip(run)
        if self.reward_floor_end is not None:
            self._require_floor(run, self.reward_floor_end)

    def descriptions(self, run: RunConfig) -> Iterator[str]:
        """What follows the run, a line each, for people."""
        if self.clip:
            name, clips = run.objective.name, run.objective.clips()
            low, high = self.clip_bounds(name)
            yield (
                f"adaptive: clip_low from {clips['clip_low']:g} and clip_high from "
                f"{clips['clip_high']:g}, each within {low:g} to {high:g} in {_UNITS[name]}, so "
                f"that it cuts {self.clip_share_min:.2g} to {self.clip_share_max:.2g} of the tokens"
            )
        if self.learning_rate:
            yield (
                f"adaptive: step size times {self.learning_rate_min:g} to 1, lowered beyond "
                f"{self.learning_rate_tolerance:g} deviations from the first "
                f"{self.warm_up_rounds} rounds"
            )
        if self.reward_floor_end is not None:
            yield (
                f"adaptive: reward.floor from {run.reward.floor:g} down to "
                f"{self.reward_floor_end:g} in the last round"
            )

    def notes(self, run: RunConfig) -> Iterator[str]:
        """What is allowed and hardly meant, a sentence each."""
        if (self.clip or self.learning_rate) and run.training.rounds <= self.warm_up_rounds:
            yield (
                f"adaptive.warm_up_rounds is {self.warm_up_rounds} and the run has "
                f"{run.training.rounds} rounds: clip and step size never change; lower "
                "warm_up_rounds if that is not meant"
            )

    def _require_clip(self, run: RunConfig) -> None:
        objective = run.objective
        if objective.name not in _UNITS:
            raise ValueError(
                f"adaptive.clip follows the share of tokens that the clip cuts, and "
                f"{objective.name} has no clip of single tokens; allowed objectives: "
                f"{list(_UNITS)}; set adaptive.clip = false for others"
            )
        if objective.clip_negative_high is not None:
            raise ValueError(
                "adaptive.clip and objective.clip_negative_high share one measured share, "
                "clip/high_fraction; remove one of them"
            )
        if run.training.steps_per_round == 1:
            raise ValueError(
                "adaptive.clip with training.steps_per_round = 1: every ratio is 1 and nothing is "
                "ever clipped; take more steps a round or set adaptive.clip = false"
            )
        if run.guard.clip_factor != 1:
            raise ValueError(
                f"adaptive.clip and guard.clip_factor = {run.guard.clip_factor:g} both move the "
                "clip; remove guard.clip_factor: a roll-back then lowers the step size alone"
            )
        low, high = self.clip_bounds(objective.name)
        if _UNITS[objective.name] == "ratio space" and high >= 1:
            raise ValueError(
                f"adaptive.clip_max = {high:g} must be below 1 in ratio space, which "
                f"{objective.name} has"
            )
        for key, value in objective.clips().items():
            if not low <= value <= high:
                raise ValueError(
                    f"objective.{key} = {value:g} lies outside adaptive.clip_min = {low:g} and "
                    f"adaptive.clip_max = {high:g}, between which it adapts; move one of them"
                )

    def _require_floor(self, run: RunConfig, end: float) -> None:
        if run.reward.combine != "geometric":
            raise ValueError(
                f"adaptive.reward_floor_end = {end:g} is of rewards combined geometrically, and "
                f"reward.combine is {run.reward.combine!r}; set it to 'geometric', or remove "
                "adaptive.reward_floor_end: the objective's geometric mean has no floor"
            )
        if end >= run.reward.floor:
            raise ValueError(
                f"adaptive.reward_floor_end = {end:g} must be below reward.floor = "
                f"{run.reward.floor:g}, from where the floor falls"
            )
