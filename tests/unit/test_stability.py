"""The stability figures of a run, from log lines written by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmpo.stability import FIGURES, RunFigures, common_target, has_collapsed, run_figures
from gmpo.stability import window_rounds as window


def step(number: int, **figures: float | None) -> dict[str, Any]:
    """A step's line as a run with two steps a round logs it."""
    live = {
        "update/loss": 0.0,
        "update/gradient_norm": 1.0,
        "ratio/min": 1.0,
        "ratio/max": 1.0,
        "ratio/log_q01": 0.0,
        "ratio/log_q99": 0.0,
        "ratio/am_gm_gap": 0.0,
        "clip/low_fraction": 0.0,
        "clip/high_fraction": 0.0,
    }
    named = {name.replace("__", "/"): value for name, value in figures.items()}
    return {"kind": "step", "round": (number + 1) // 2, "step": number, **live, **named}


def round_line(number: int, reward: float, **figures: float) -> dict[str, Any]:
    named = {name.replace("__", "/"): value for name, value in figures.items()}
    line = {"kind": "round", "round": number, "rollout/reward": reward, "rollout/entropy": 1.0}
    return {**line, **named}


def figures_of(lines: list[dict[str, Any]], **changes: Any) -> RunFigures:
    settings: dict[str, Any] = {
        "held_out_end": 0.5,
        "target": None,
        "rounds": 2,
        "steps_per_round": 2,
        "diverged": False,
    }
    return run_figures(lines, **{**settings, **changes})


LINES = [
    step(1, update__loss=0.0, update__gradient_norm=1.0),
    step(
        2,
        update__loss=-0.2,
        update__gradient_norm=3.0,
        ratio__min=0.5,
        ratio__max=2.0,
        ratio__log_q01=-0.4,
        ratio__log_q99=0.2,
        ratio__am_gm_gap=0.02,
        clip__low_fraction=0.1,
        clip__high_fraction=0.05,
    ),
    round_line(1, 0.2, rollout__entropy=2.0, kl_ref__k3=0.1),
    step(3, update__loss=0.0, update__gradient_norm=2.0),
    step(
        4,
        update__loss=0.6,
        update__gradient_norm=2.0,
        ratio__min=0.25,
        ratio__max=1.5,
        ratio__log_q01=-0.6,
        ratio__log_q99=0.4,
        ratio__am_gm_gap=0.04,
        clip__low_fraction=0.0,
        clip__high_fraction=0.05,
    ),
    round_line(2, 0.4, rollout__entropy=1.0, kl_ref__k3=0.3),
]


def test_the_articles_figures_have_hand_computed_values():
    found = figures_of(LINES)
    # Losses 0, -0.2, 0, 0.6: mean 0.1, squares 0.01 + 0.09 + 0.01 + 0.25 = 0.36, over 3: 0.12.
    assert found.values["loss_variance"] == pytest.approx(0.12)
    # Norms 1, 3, 2, 2: mean 2, squares 1 + 1 = 2, over 3, root 0.8165.
    assert found.values["gradient_norm_deviation"] == pytest.approx(math.sqrt(2 / 3))
    assert found.values["gradient_norm_variation"] == pytest.approx(math.sqrt(2 / 3) / 2)
    # 0.25 to 2: log 8.
    assert (found.ratio_min, found.ratio_max) == (0.25, 2.0)
    assert found.values["log_ratio_range"] == pytest.approx(math.log(8))
    assert found.crash is None
    assert found.rounds_done == 2


def test_ratio_figures_are_means_over_the_steps_after_a_rounds_first():
    found = figures_of(LINES).values
    assert found["log_ratio_q01"] == pytest.approx(-0.5)
    assert found["log_ratio_q99"] == pytest.approx(0.3)
    assert found["log_ratio_spread"] == pytest.approx(0.8)
    assert found["am_gm_gap"] == pytest.approx(0.03)
    assert found["clip_fraction"] == pytest.approx(0.1)  # (0.15 + 0.05) / 2


def test_the_last_window_and_the_last_kl_are_what_the_end_means():
    found = figures_of(LINES).values  # 2 rounds: a window of 1
    assert found["entropy_end"] == 1.0
    assert found["reward_end"] == 0.4
    assert found["kl_to_start"] == 0.3
    assert found["held_out_end"] == 0.5


def test_steps_without_a_live_row_are_in_no_figure():
    dead = {"kind": "step", "round": 3, "step": 6, "update/loss": 0.0, "update/gradient_norm": 0.0}
    assert figures_of([*LINES, dead]).values == figures_of(LINES).values


def test_a_run_without_a_live_step_has_no_figures_of_steps():
    found = figures_of([round_line(1, 0.0)])
    assert found.ratio_max is None
    absent = {name for name, value in found.values.items() if value is None}
    assert absent == set(FIGURES) - {"entropy_end", "reward_end", "held_out_end"}


@pytest.mark.parametrize("broken", [{"ratio__max": None}, {"ratio__min": 0.0}])
def test_a_ratio_that_is_not_finite_or_0_leaves_the_range_unknown(broken: dict[str, Any]):
    assert figures_of([*LINES, step(6, **broken)]).values["log_ratio_range"] is None


def test_the_target_is_reached_by_the_mean_of_a_window():
    # 8 rounds: windows of 2; means from round 2 on: 0.45, 0.45, 0.35, 0.5, 0.75 ...
    rewards = [0.0, 0.9, 0.0, 0.7, 0.3, 1.2, 1.0, 1.0]
    lines = [round_line(number, reward) for number, reward in enumerate(rewards, start=1)]
    reach = {target: figures_of(lines, rounds=8, target=target) for target in (0.45, 0.5, 2.0)}
    found = {target: figures.values["rounds_to_target"] for target, figures in reach.items()}
    assert found == {0.45: 2.0, 0.5: 5.0, 2.0: None}
    assert figures_of(lines, rounds=8).values["rounds_to_target"] is None


@pytest.mark.parametrize(("rounds", "size"), [(1, 1), (7, 1), (8, 2), (24, 6), (40, 10), (300, 10)])
def test_a_window_is_a_quarter_of_the_run_up_to_ten_rounds(rounds: int, size: int):
    assert window(rounds) == size


def test_the_common_target_is_half_way_over_all_runs():
    # 4 rounds, windows of 1: first (0.1 + 0.3) / 2 = 0.2, last (0.5 + 0.9) / 2 = 0.7.
    runs = [[0.1, 0.2, 0.3, 0.5], [0.3, 0.2, 0.1, 0.9]]
    assert common_target(runs, rounds=4) == pytest.approx(0.45)
    assert common_target(runs[::-1], rounds=4) == common_target(runs, rounds=4)


def test_rewards_that_do_not_rise_have_no_target():
    assert common_target([[0.5, 0.5], [0.4, 0.3]], rounds=2) is None
    assert common_target([], rounds=2) is None


def test_a_reward_that_falls_to_less_than_half_of_its_best_has_collapsed():
    assert has_collapsed([0.8] * 15 + [0.3] * 10) is True
    assert has_collapsed([0.8] * 15 + [0.41] * 10) is False


def test_a_reward_that_comes_back_has_not_collapsed():
    assert has_collapsed([0.8] * 10 + [0.0] * 10 + [0.8] * 10) is False


def test_a_fall_within_the_noise_is_no_collapse():
    noisy = [0.1, -0.1] * 10
    # The best ten may begin anywhere: here they have the mean of the last ten.
    assert has_collapsed(noisy) is False
    # A fall by more than half, of windows whose spread is ten times the fall.
    assert has_collapsed([1.0, -0.8] * 5 + [1.0, -0.98] * 5) is False


def test_rewards_below_0_collapse_by_the_size_of_their_best():
    assert has_collapsed([-1.0] * 10 + [-1.6] * 10) is True
    assert has_collapsed([-1.0] * 10 + [-1.4] * 10) is False


def test_a_run_of_less_than_20_rounds_is_too_short_to_tell():
    assert has_collapsed([1.0] * 10 + [0.0] * 9) is None
    figures = figures_of([round_line(number, 1.0) for number in range(1, 20)], rounds=19)
    assert (figures.crash, figures.could_collapse) == (None, False)


@given(st.lists(st.floats(0, 1), min_size=20, max_size=60))
def test_a_run_that_ends_at_its_best_has_not_collapsed(rewards: list[float]):
    assert has_collapsed([*rewards, *[1.0] * 10]) is False


def test_divergence_is_the_crash_that_is_named():
    lines = [round_line(number, float(number <= 20)) for number in range(1, 41)]
    assert figures_of(lines, rounds=40).crash == "collapsed"
    assert figures_of(lines, rounds=40, diverged=True).crash == "diverged"


def test_a_run_that_collapses_in_its_first_rounds_is_told_by_where_it_started():
    # Half of what the untrained policy earned is gone by round 3 and stays away.
    rewards = [0.4, 0.2, *[0.0] * 10]
    assert has_collapsed(rewards, start=0.4) is True
    assert has_collapsed(rewards) is None
    assert has_collapsed([0.4] * 12, start=0.4) is False
    # Without it a long run looks like a task that was never learned.
    assert has_collapsed([0.4, *[0.0] * 30]) is False
    assert has_collapsed([0.4, *[0.0] * 30], start=0.4) is True
