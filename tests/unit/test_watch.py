"""What the loop is told to do about events, and where it goes back to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gmpo.checkpoint import TrainingState
from gmpo.errors import ConfigError
from gmpo.guard import non_finite_event
from gmpo.guard_config import GuardConfig
from gmpo.guard_events import GuardEvent
from gmpo.recipe import load_recipe
from gmpo.rollback import mended_recipe
from gmpo.tracking import RunFolder
from gmpo.watch import answer_to, round_to_go_back_to, watch_round

CRITICAL = GuardEvent(
    alarm="ratio_explosion",
    action="roll_back",
    round=9,
    onset=7,
    metric="ratio/am_gm_gap",
    value=2.0,
    baseline=0.01,
    threshold=1.0,
    test="bound",
    recommended_action="lower the step size",
)
WARNING = replace(CRITICAL, alarm="dead_groups", action="warn")
SKIPPED = replace(CRITICAL, alarm="gradient_spike", action="skip_step")
MEND = GuardConfig(mode="mend", most_rollbacks=2)


@pytest.mark.parametrize(
    ("events", "guard", "attempt", "answer"),
    [
        ([], MEND, 0, "go_on"),
        ([WARNING, SKIPPED], MEND, 0, "go_on"),
        ([WARNING, CRITICAL], MEND, 0, "roll_back"),
        ([CRITICAL], MEND, 1, "roll_back"),
        ([CRITICAL], MEND, 2, "stop"),
        ([CRITICAL], GuardConfig(mode="stop"), 0, "stop"),
        ([CRITICAL], GuardConfig(mode="warn"), 0, "go_on"),
        ([WARNING], GuardConfig(mode="stop"), 0, "go_on"),
        ([non_finite_event(3)], GuardConfig(mode="warn"), 0, "stop"),
        ([non_finite_event(3)], MEND, 0, "roll_back"),
        ([non_finite_event(3)], MEND, 2, "stop"),
    ],
)
def test_the_answer_to_a_rounds_events(events, guard, attempt, answer):
    assert answer_to(events, guard, attempt=attempt) == answer


@pytest.mark.parametrize(
    ("onset", "rounds", "to_round"),
    [
        # Round 7 was drawn from the weights after round 6, so these are in doubt; those after 5
        # gave round 6, which was healthy.
        (7, [0, 2, 4, 5, 6, 8], 5),
        (7, [0, 6, 8], 0),
        (1, [0], 0),
        (2, [0, 1], 0),
        (3, [0, 1, 2], 1),
    ],
)
def test_the_run_goes_back_to_the_newest_weights_known_to_be_healthy(onset, rounds, to_round):
    event = replace(CRITICAL, onset=onset)
    later = replace(CRITICAL, onset=onset + 1)
    assert round_to_go_back_to([later, event], rounds) == to_round


@pytest.mark.parametrize(
    ("mode", "attempt", "is_told"),
    [("warn", 0, False), ("mend", 0, False), ("mend", 1, True), ("mend", 2, False)],
)
def test_an_attempt_is_on_trial_as_long_as_another_may_follow(
    tmp_path: Path, mode: str, attempt: int, is_told: bool
):
    """Twenty healthy rounds, then ratios that spread four times as far."""
    guard = GuardConfig(mode=mode) if mode == "warn" else MEND
    state = TrainingState(
        round=0,
        step=0,
        prompts_taken=0,
        mismatch_is_small=None,
        recipe_digest="",
        version="",
        attempt=attempt,
    )
    told: list[str] = []
    for number in range(1, 61):
        metrics = {"ratio/am_gm_gap": 0.001 if number <= 20 else 0.004}
        watched = watch_round(
            RunFolder(tmp_path),
            guard,
            state=replace(state, round=number),
            metrics=metrics,
            steps=[],
            warn=told.append,
        )
        state = watched.state
    assert bool(told) == is_told
    assert all("ratio_explosion" in sentence for sentence in told)


def test_each_attempt_has_a_smaller_step_size_and_a_narrower_clip():
    recipe = load_recipe(
        "quickstart",
        [
            "guard.mode=mend",
            "guard.learning_rate_factor=0.5",
            "guard.clip_factor=0.25",
            "checkpoint.keep=2",
        ],
    )
    assert mended_recipe(recipe, attempt=0) == recipe
    second = mended_recipe(recipe, attempt=2)
    # Halved, then a quarter of that; the clip a quarter, then a quarter of that.
    assert second.training.learning_rate == recipe.training.learning_rate / 8
    assert second.objective.clips() == {"clip_low": 0.025, "clip_high": 0.025}
    third = mended_recipe(recipe, attempt=3)
    assert third.training.learning_rate == recipe.training.learning_rate / 64


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["guard.mode=mend", "checkpoint.keep=1"], "set checkpoint.keep to 2 or more"),
        (["guard.clip_factor=0.5"], "works with mode = 'mend' only"),
        (["guard.mode=off", "guard.skip_steps=true"], "mode = 'off' writes none"),
        (
            [
                "guard.mode=mend",
                "checkpoint.keep=2",
                "guard.clip_factor=0.5",
                "objective.name=gmpo_no_clip",
            ],
            "has none; remove it",
        ),
        (["guard.mode=heal"], "guard.mode"),
    ],
)
def test_a_recipe_that_cannot_mend_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        load_recipe("quickstart", changes)
