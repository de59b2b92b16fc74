"""Spaces of a tuning study: what may be searched, and the recipes that come of it."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from gmpo.errors import ConfigError
from gmpo.recipe import load_recipe, recipe_values
from gmpo.tuning.space import (
    TUNABLE,
    Choices,
    Range,
    default_space,
    own_values,
    read_space,
    recipe_with,
    space_from_dict,
    space_to_dict,
)


@pytest.fixture
def recipe():
    return load_recipe("quickstart", [])


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "space.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_default_space_has_the_articles_parameters_and_what_the_recipe_has(recipe):
    space = default_space(recipe)
    assert space["training.learning_rate"] == Range(low=1e-6, high=1e-3, log=True)
    assert space["objective.clip_low"] == space["objective.clip_high"] == Range(low=0.1, high=0.8)
    # 16 prompts of 8: 128 rollouts a round in 2, 4 or 8 steps of 64, 32 or 16.
    assert space["batch_size"] == Choices(values=(16, 32, 64))
    assert space["sampling.group_size"] == Choices(values=(4, 8, 16))
    assert "reward.floor" not in space
    own = own_values(recipe, space)
    assert own["batch_size"] == 32
    assert all(space[key].holds(value) for key, value in own.items())
    assert own_values(recipe_with(recipe, own), space) == own
    assert space.keys() <= TUNABLE.keys()


def test_the_reward_floor_is_searched_where_rewards_are_combined_geometrically():
    recipe = load_recipe(
        "quickstart",
        [
            "reward.combine=geometric",
            'reward.weights={"correct"=1.0,"format"=1.0}',
            'reward.format_pattern="x"',
        ],
    )
    assert default_space(recipe)["reward.floor"] == Range(low=0.001, high=0.3, log=True)


def test_clips_have_the_objectives_own_unit():
    grpo = default_space(load_recipe("quickstart", ["objective.name=grpo"]))
    assert grpo["objective.clip_low"] == Range(low=0.1, high=0.5)
    free = default_space(load_recipe("quickstart", ["objective.name=gmpo_no_clip"]))
    assert not any("clip" in key for key in free)


def test_every_pair_of_sizes_keeps_the_rounds_rollouts(recipe):
    space = default_space(recipe)
    for batch, group in product(space["batch_size"].ends(), space["sampling.group_size"].ends()):
        made = recipe_with(recipe, {"batch_size": batch, "sampling.group_size": group})
        assert made.sampling.prompts_per_round * made.sampling.group_size == 128
        assert made.sampling.group_size == group
        rollouts_a_step = 128 / made.training.steps_per_round
        assert rollouts_a_step == batch


def test_a_recipe_differs_in_the_values_alone(recipe):
    made = recipe_values(recipe_with(recipe, {"training.learning_rate": 1e-4}))
    was = recipe_values(recipe)
    assert {key for key in was if made[key] != was[key]} == {"training.learning_rate"}


def test_a_batch_that_cuts_groups_is_refused(recipe):
    with pytest.raises(ConfigError, match="a batch must hold whole groups"):
        recipe_with(recipe, {"batch_size": 20})


def test_a_file_narrows_the_space_or_replaces_it(recipe, tmp_path: Path):
    text = """
        [training.learning_rate]
        low = 1e-5
        high = 1e-4
        log = true
        ["objective.kl_coefficient"]
        choices = [0, 0.1]
    """
    narrowed = read_space(written(tmp_path, text), recipe)
    assert narrowed["training.learning_rate"] == Range(low=1e-5, high=1e-4, log=True)
    assert narrowed["objective.kl_coefficient"] == Choices(values=(0.0, 0.1))
    assert narrowed.keys() == default_space(recipe).keys()
    alone = read_space(written(tmp_path, "replace = true\n" + text), recipe)
    assert alone.keys() == {"training.learning_rate", "objective.kl_coefficient"}
    assert space_from_dict(space_to_dict(narrowed)) == narrowed


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[training.learning_rat]\nlow=1\nhigh=2", "did you mean 'training.learning_rate'"),
        ("[training.rounds]\nchoices=[1,2]", "is not tuned: every trial has the recipe's rounds"),
        ("[training.learning_rate]\nlow=2.0\nhigh=1.0", "must rise"),
        ("[training.learning_rate]\nlow=0\nhigh=1.0\nlog=true", "from above 0"),
        ("[training.learning_rate]\nlow='a'\nhigh=1.0", "low = 'a' must be a number"),
        ("[training.learning_rate]\nlow=1.0\nhihg=2.0", "no setting 'hihg'; did you mean 'high'"),
        ("[sampling.group_size]\nlow=2\nhigh=4", "has no range, but choices"),
        ("[sampling.group_size]\nchoices=[2.5]", "must be a list of whole numbers"),
        ("[sampling.group_size]\nchoices=[7]", "a batch must hold whole groups"),
        ("[training.learning_rate]\nchoices=[]", "must be a list of numbers"),
        ("[reward.floor]\nlow=0.1\nhigh=0.2", "does nothing with reward.combine"),
        ("replace = true", "names no parameter"),
        ("replace = 3", "must be true or false"),
        ("not toml", "is not valid TOML"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(recipe, tmp_path: Path, text: str, said: str):
    with pytest.raises(ConfigError, match=said) as refused:
        read_space(written(tmp_path, text), recipe)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_not_there_is_refused(recipe, tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_space(tmp_path / "none.toml", recipe)
