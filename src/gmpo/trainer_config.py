"""`GMPOConfig`: the settings of `GMPOTrainer`, flat, and the recipe that they stand for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gmpo.config import RunConfig
from gmpo.errors import ConfigError
from gmpo.recipe import explain_settings, put_key, recipe_of_table

__all__ = ["GMPOConfig"]

_WIDEST_USUAL_CLIP = 1.0
"""In log space; ratios from e^-1 to e are then left alone, far beyond the paper's range."""


class GMPOConfig(BaseModel):
    """Settings of `GMPOTrainer`; each is a key of a recipe, and `recipe` sets all other keys.

    Raises:
        ConfigError: an unknown name (the nearest is offered) or a value that is not allowed.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    learning_rate: float = Field(default=1e-6, gt=0)
    """Peak step size of AdamW: `training.learning_rate`."""
    batch_size: int = Field(default=16, ge=2)
    """Rollouts of an optimizer step: whole groups, so a multiple of `group_size`."""
    group_size: int = Field(default=8, ge=2)
    """G, completions of a prompt: `sampling.group_size`."""
    steps_per_round: int = Field(default=4, ge=1)
    """Optimizer steps between two samplings: `training.steps_per_round`. With 1, GMPO is GRPO."""
    max_length: int = Field(default=1024, ge=2)
    """Longest prompt plus completion, in tokens: `sampling.max_length`."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Longest completion, in tokens: `sampling.max_new_tokens`. None is half of `max_length`."""
    temperature: float = Field(default=1.0, gt=0)
    """Of sampling: `sampling.temperature`."""
    importance_ratio_clip: float | None = Field(default=None, gt=0)
    """Half-width of GMPO's clip in log space, on both sides: `objective.clip_low` and
    `objective.clip_high`. None is the paper's 0.4, token ratios of 0.67 and 1.49; above 1 a
    warning says how wide that is."""
    geometric_mean_epsilon: float | None = Field(default=None, gt=0, lt=1)
    """Floor of the geometric combination of several rewards, `reward.floor`, and of nothing else:
    the objective's geometric mean is of ratios, which are never 0. It acts with
    `recipe={"reward.combine": "geometric"}`; without that a warning says that it does nothing."""
    gradient_clip_norm: float = Field(default=1.0, gt=0)
    """Largest gradient norm: `training.gradient_clip_norm`."""
    entropy_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the mean token entropy: `objective.entropy_coefficient`."""
    kl_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the k3 estimate of KL(policy || reference): `objective.kl_coefficient`."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps of warm-up: `training.warmup_steps`."""
    seed: int = Field(default=0, ge=0)
    """Of data order and sampling: `training.seed`."""
    output_dir: str | None = None
    """Run folder; None takes the first free one of runs/gmpo, runs/gmpo-2 ..."""
    recipe: Mapping[str, Any] = Field(default={})
    """Any other key of a recipe, as in `{"training.schedule": "cosine"}`."""

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise ConfigError(explain_settings(error, GMPOConfig, of="GMPOConfig")) from None
        if self.batch_size % self.group_size:
            raise ConfigError(
                f"batch_size is {self.batch_size} with group_size {self.group_size}; a step takes "
                "whole groups, so it must be a multiple of the group size"
            )

    @property
    def prompts_per_round(self) -> int:
        """Prompts sampled in a round."""
        return self.steps_per_round * (self.batch_size // self.group_size)

    def to_recipe(self, keys: Mapping[str, Any]) -> RunConfig:
        """The recipe that these settings stand for.

        Args:
            keys: what the trainer's arguments stand for, as `table.key` or `table`.

        Raises:
            ConfigError: a value is not allowed, or `recipe` sets what has a place of its own.
        """
        table: dict[str, Any] = {}
        named = {**keys, **self._keys()}
        for key, value in named.items():
            put_key(table, key, value)
        for key, value in self.recipe.items():
            if key in named or key.partition(".")[0] in named:
                raise ConfigError(
                    f"GMPOConfig(recipe=...) sets {key!r}, for which GMPOConfig or GMPOTrainer has "
                    "a setting of its own; use that"
                )
            put_key(table, key, value)
        return recipe_of_table(table, source="of GMPOConfig")

    def warn_of_oddities(self, warn: Callable[[str], None]) -> None:
        """Say what is allowed and hardly meant."""
        clip, epsilon = self.importance_ratio_clip, self.geometric_mean_epsilon
        if clip is not None and clip > _WIDEST_USUAL_CLIP:
            warn(
                f"importance_ratio_clip = {clip:g} is a half-width in log space: token ratios are "
                f"clipped beyond {math.exp(-clip):.3g} and {math.exp(clip):.3g} only; the paper's "
                "0.4 clips at 0.67 and 1.49"
            )
        if epsilon is not None and not self._combines_geometrically:
            warn(
                f"geometric_mean_epsilon = {epsilon:g} does nothing here: it is the floor of "
                'rewards combined with recipe={"reward.combine": "geometric"}; the objective\'s '
                "own geometric mean needs none"
            )

    @property
    def _combines_geometrically(self) -> bool:
        return self.recipe.get("reward.combine") == "geometric"

    def _keys(self) -> dict[str, Any]:
        keys = {
            "training.learning_rate": self.learning_rate,
            "training.steps_per_round": self.steps_per_round,
            "training.gradient_clip_norm": self.gradient_clip_norm,
            "training.warmup_steps": self.warmup_steps,
            "training.seed": self.seed,
            "sampling.group_size": self.group_size,
            "sampling.prompts_per_round": self.prompts_per_round,
            "sampling.max_length": self.max_length,
            "sampling.max_new_tokens": self.max_new_tokens or self.max_length // 2,
            "sampling.temperature": self.temperature,
            "objective.entropy_coefficient": self.entropy_coefficient,
            "objective.kl_coefficient": self.kl_coefficient,
        }
        if self.importance_ratio_clip is not None:
            self._require_log_space()
            keys["objective.clip_low"] = self.importance_ratio_clip
            keys["objective.clip_high"] = self.importance_ratio_clip
        if self._combines_geometrically and self.geometric_mean_epsilon is not None:
            keys["reward.floor"] = self.geometric_mean_epsilon
        return keys

    def _require_log_space(self) -> None:
        objective = str(self.recipe.get("objective.name", "gmpo"))
        if not objective.startswith("gmpo"):
            raise ConfigError(
                f"importance_ratio_clip is in log space, and the clip of {objective!r} is not; set "
                'recipe={"objective.clip_low": ..., "objective.clip_high": ...} in its own unit'
            )
