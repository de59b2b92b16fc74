"""`GMPOConfig`: every setting is a key of the recipe, and what it cannot mean is refused."""

from __future__ import annotations

from typing import Any

import pytest

from gmpo.config import RunConfig
from gmpo.errors import ConfigError
from gmpo.trainer_config import GMPOConfig

TASK = {"kind": "arithmetic", "held_out_items": 5}


def recipe(**settings: Any) -> RunConfig:
    return GMPOConfig(**settings).to_recipe({"task": TASK, "training.rounds": 3})


def refusal(**settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        recipe(**settings)
    return str(caught.value)


def test_the_articles_settings_mean_what_they_say():
    config = recipe(
        learning_rate=1e-5,
        batch_size=16,
        max_length=512,
        geometric_mean_epsilon=1e-8,
        importance_ratio_clip=2.0,
        gradient_clip_norm=1.0,
        entropy_coefficient=0.01,
    )
    assert config.training.learning_rate == 1e-5
    assert config.training.gradient_clip_norm == 1.0
    assert config.training.rounds == 3
    # 16 rollouts a step are 2 groups of 8; 4 steps a round.
    assert (config.sampling.prompts_per_round, config.sampling.group_size) == (8, 8)
    assert config.training.steps_per_round == 4
    assert (config.sampling.max_length, config.sampling.max_new_tokens) == (512, 256)
    assert config.objective.name == "gmpo"
    assert (config.objective.clip_low, config.objective.clip_high) == (2.0, 2.0)
    assert config.objective.entropy_coefficient == 0.01
    assert config.reward.floor == RunConfig(task=TASK).reward.floor  # type: ignore[arg-type]


def test_the_defaults_are_the_papers():
    config = recipe()
    assert config.objective.clips() == {"clip_low": 0.4, "clip_high": 0.4}
    assert config.sampling.group_size == 8
    assert config.sampling.temperature == 1.0
    assert config.objective.kl_coefficient == config.objective.entropy_coefficient == 0.0
    assert config.training.steps_per_round > 1  # with 1, GMPO is GRPO


def test_every_other_key_of_a_recipe_can_be_set():
    config = recipe(recipe={"training.schedule": "cosine", "objective.name": "grpo"})
    assert config.training.schedule == "cosine"
    assert config.objective.clips() == {"clip_low": 0.2, "clip_high": 0.2}


def test_the_epsilon_is_the_floor_of_combined_rewards():
    config = recipe(geometric_mean_epsilon=0.125, recipe={"reward.combine": "geometric"})
    assert config.reward.floor == 0.125


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"importance_ratio_clip": 2.0},
            "importance_ratio_clip = 2 is a half-width in log space: token ratios are clipped "
            "beyond 0.135 and 7.39 only; the paper's 0.4 clips at 0.67 and 1.49",
        ),
        (
            {"geometric_mean_epsilon": 1e-8},
            "geometric_mean_epsilon = 1e-08 does nothing here: it is the floor of rewards combined "
            'with recipe={"reward.combine": "geometric"}; the objective\'s own geometric mean '
            "needs none",
        ),
    ],
)
def test_what_is_hardly_meant_is_said(settings: dict[str, Any], said: str):
    heard: list[str] = []
    GMPOConfig(**settings).warn_of_oddities(heard.append)
    assert heard == [said]


def test_usual_settings_are_not_warned_of():
    heard: list[str] = []
    usual = {"importance_ratio_clip": 1.0, "geometric_mean_epsilon": 0.1}
    GMPOConfig(**usual, recipe={"reward.combine": "geometric"}).warn_of_oddities(heard.append)
    assert heard == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"learning_rat": 1},
            "GMPOConfig: unknown setting 'learning_rat'; did you mean 'learning_rate'?",
        ),
        (
            {"learning_rate": -1.0},
            "GMPOConfig: learning_rate = -1.0: input should be greater than 0",
        ),
        (
            {"batch_size": 12},
            "batch_size is 12 with group_size 8; a step takes whole groups, so it must be a "
            "multiple of the group size",
        ),
        (
            {"importance_ratio_clip": 0.3, "recipe": {"objective.name": "grpo"}},
            "importance_ratio_clip is in log space, and the clip of 'grpo' is not; set "
            'recipe={"objective.clip_low": ..., "objective.clip_high": ...} in its own unit',
        ),
        (
            {"recipe": {"training.seed": 1}},
            "GMPOConfig(recipe=...) sets 'training.seed', for which GMPOConfig or GMPOTrainer has "
            "a setting of its own; use that",
        ),
        (
            {"recipe": {"task.kind": "svamp"}},
            "GMPOConfig(recipe=...) sets 'task.kind', for which GMPOConfig or GMPOTrainer has a "
            "setting of its own; use that",
        ),
        (
            {"recipe": {"training.shedule": "cosine"}},
            "recipe of GMPOConfig: unknown key 'training.shedule'; did you mean "
            "'training.schedule'?",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(settings: dict[str, Any], said: str):
    assert refusal(**settings) == said
