"""From a recipe's `[reward]` table to the functions it names and the rule that combines them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from gmpo.config import RewardConfig, RunConfig
from gmpo.errors import ConfigError
from gmpo.grading import Grader
from gmpo.named_functions import load_function
from gmpo.policy.load import choose_device
from gmpo.rewards import (
    RewardFunction,
    RewardFunctions,
    RewardRule,
    correct_reward,
    format_reward,
    length_reward,
)
from gmpo.rewards.classifier import load_classifier_reward

__all__ = ["build_rewards", "reward_rule"]


def build_rewards(
    config: RunConfig, grader: Grader, *, given: Mapping[str, RewardFunction]
) -> RewardFunctions:
    """The functions that the recipe's weights name.

    Args:
        config: the recipe, device and precision resolved; reward models take the policy's.
        grader: of the `correct` component.
        given: by a name of `[reward.functions]`, taken in place of the import.

    Raises:
        ConfigError: a function cannot be imported or called, or one was given without a name.
        ModelError: a reward model cannot be loaded.
    """
    reward = config.reward
    unknown = sorted(given.keys() - reward.functions.keys())
    if unknown:
        raise ConfigError(
            f"reward function {unknown[0]!r} was given, and the recipe names "
            f"{sorted(reward.functions)} in [reward.functions]; name it there"
        )
    functions = {
        name: given[name] if name in given else _component(name, config, grader)
        for name in reward.weights
    }
    seconds = reward.function_timeout_seconds
    limits = {} if seconds is None else dict.fromkeys(reward.functions, seconds)
    return RewardFunctions(functions, time_limits=limits)


def reward_rule(reward: RewardConfig) -> RewardRule:
    """How the recipe combines components, and what it does about faults."""
    return RewardRule(
        weights=reward.weights,
        combine=reward.combine,
        floor=reward.floor,
        truncated=reward.truncated,
        on_error=reward.on_error,
    )


def _component(name: str, config: RunConfig, grader: Grader) -> RewardFunction:
    reward = config.reward
    if name in reward.functions:
        return load_function(reward.functions[name], key=f"reward.functions.{name}")
    if name in reward.models:
        return load_classifier_reward(
            reward.models[name],
            device=choose_device(config.model.device),
            dtype=torch.bfloat16 if config.model.dtype == "bf16" else torch.float32,
        )
    if name == "length":
        full, zero = reward.length_full_tokens, reward.length_zero_tokens
        assert full is not None and zero is not None, "the recipe is checked for both"
        return length_reward(full_tokens=full, zero_tokens=zero)
    if name == "format":
        return format_reward(reward.format_pattern)
    assert name == "correct", "the recipe is checked for unknown names"
    return correct_reward(grader)
