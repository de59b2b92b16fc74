"""What `[adaptive]` may say beside the rest of a recipe, and what it tells people."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError
from tests.tiny_runs import tiny_recipe

from gmpo.adaptation import constant_recipe
from gmpo.errors import ConfigError

GEOMETRIC = {"combine": "geometric", "floor": 0.1, "weights": {"format": 1.0}}
MANY_STEPS = {"training__rounds": 40}


def recipe(adaptive: dict[str, Any], **changes: Any):
    return tiny_recipe("no model", adaptive=adaptive, **{**MANY_STEPS, **changes})


def test_by_default_nothing_adapts():
    config = tiny_recipe("no model")
    assert not config.adaptive.is_on
    assert list(config.adaptive.descriptions(config)) == []


@pytest.mark.parametrize(
    ("objective", "bounds"),
    [
        ("gmpo", (0.1, 0.8)),
        ("gmpo_no_norm", (0.1, 0.8)),
        ("grpo", (0.05, 0.4)),
        ("dr_grpo", (0.05, 0.4)),
    ],
)
def test_bounds_are_in_the_objectives_own_unit(objective: str, bounds: tuple[float, float]):
    config = recipe({"clip": True}, objective={"name": objective})
    assert config.adaptive.clip_bounds(objective) == bounds


@pytest.mark.parametrize(
    ("adaptive", "changes", "says"),
    [
        ({"clip": True}, {"objective__name": "gspo"}, "gspo has no clip of single tokens"),
        ({"clip": True}, {"objective__name": "gmpo_no_clip"}, "no clip of single tokens"),
        ({"clip": True}, {"objective__clip_negative_high": 2.0}, "remove one of them"),
        ({"clip": True}, {"training__steps_per_round": 1}, "every ratio is 1"),
        ({"clip": True}, {"objective__clip_low": 0.05}, "lies outside adaptive.clip_min = 0.1"),
        (
            {"clip": True, "clip_max": 1.5},
            {"objective__name": "grpo"},
            "must be below 1 in ratio space",
        ),
        (
            {"clip": True},
            {"guard": {"mode": "mend", "clip_factor": 0.5}},
            "both move the clip",
        ),
        ({"clip": True}, {"guard": {"mode": "off"}}, "set guard.mode = 'warn'"),
        ({"clip": True, "clip_share_min": 0.1}, {}, "must be below adaptive.clip_share_max"),
        ({"clip_gain": 0.1}, {}, "needs adaptive.clip, which is off"),
        ({"learning_rate_min": 0.2}, {}, "needs adaptive.learning_rate, which is off"),
        ({"warm_up_rounds": 10}, {}, "set one of them to true"),
        ({"reward_floor_end": 0.01}, {}, "reward.combine is 'sum'"),
        ({"reward_floor_end": 0.1}, {"reward": GEOMETRIC}, "must be below reward.floor = 0.1"),
    ],
)
def test_what_contradicts_itself_is_refused_in_a_sentence(adaptive, changes, says):
    table = {"objective": {}, **changes}
    with pytest.raises(ValidationError, match=says):
        recipe(adaptive, **table)


def test_a_recipe_says_what_follows_the_run():
    config = recipe(
        {"clip": True, "learning_rate": True, "reward_floor_end": 0.001}, reward=GEOMETRIC
    )
    clip, size, floor = config.adaptive.descriptions(config)
    assert "clip_low from 0.4 and clip_high from 0.4, each within 0.1 to 0.8 in log space" in clip
    assert "step size times 0.1 to 1" in size
    assert "reward.floor from 0.1 down to 0.001" in floor


def test_a_run_too_short_to_change_anything_is_noted():
    short = recipe({"clip": True}, training__rounds=20)
    assert any("clip and step size never change" in note for note in short.notes())
    enough = recipe({"clip": True}, training__rounds=21)
    assert not any("adaptive" in note for note in enough.notes())


def test_a_loop_of_ones_own_has_nothing_that_follows_rounds():
    with pytest.raises(ConfigError, match="call train"):
        constant_recipe(recipe({"learning_rate": True}))
    linear = tiny_recipe("no model", training__schedule="linear")
    assert constant_recipe(linear).training.schedule == "constant"
