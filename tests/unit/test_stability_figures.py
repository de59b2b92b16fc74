"""The stability study's own arithmetic: collapse, the paired test, tables of unfinished studies."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from scripts.stability_figures import (
    collapse_round,
    log_digest,
    run_figures,
)
from scripts.stability_report import markdown, results

ARMS = ("grpo", "grpo-wide", "gmpo", "gspo")


def test_a_reward_that_falls_to_nothing_and_stays_has_collapsed_ten_rounds_after_it_was_down():
    # B = 0.4. With k rounds of 0 among the last ten, E = 0.4 (10 - k) / 10, and B - E = 0.04 k is
    # above 0.2 from k = 6 on; the variance of the last ten is 0.16 * k (10 - k) / 90, at k = 6
    # 0.0427, so 3 standard errors are 3 sqrt(0.0427 / 10) = 0.196 < 0.24. Down at rounds 26 to 35.
    rewards = [0.4] * 20 + [0.0] * 30
    assert collapse_round(rewards, start=0.3) == 35
    assert collapse_round(rewards[:34], start=0.3) is None


def test_a_run_that_collapses_in_its_first_rounds_fell_from_the_untrained_policy():
    # From ten rounds of 0.4 before the first. The two windows do not overlap, so the first round
    # that can be down is the tenth, and the first collapse is at round 19.
    assert collapse_round([0.0] * 30, start=0.4) == 19


def test_a_dip_that_recovers_is_no_collapse():
    # Eight rounds of 0 leave six or more among the last ten at seven rounds in a row.
    assert collapse_round([0.4] * 20 + [0.0] * 8 + [0.4] * 30, start=0.4) is None


def test_half_of_the_best_is_no_collapse_and_less_is_one():
    assert collapse_round([0.4] * 20 + [0.21] * 40, start=0.4) is None
    assert collapse_round([0.4] * 20 + [0.19] * 40, start=0.4) is not None


def test_a_flat_noisy_reward_does_not_collapse():
    draw = random.Random(0)
    for _ in range(50):
        # 16 prompts of 8 completions, each prompt with a chance of its own, as in the study
        rewards = [
            sum(draw.random() < p for p in [draw.betavariate(1, 3) for _ in range(16)] * 8) / 128
            for _ in range(300)
        ]
        assert collapse_round(rewards, start=0.25) is None


def step(number: int, **values: float) -> dict[str, Any]:
    names = {
        "ratio/max": 1.0, "ratio/min": 1.0, "update/gradient_norm": 1.0, "update/loss": 0.0,
        "ratio/log_q99": 0.0, "ratio/log_q01": 0.0, "ratio/am_gm_gap": 0.0, "kl_old/k1": 0.0,
        "clip/low_fraction": 0.0, "clip/high_fraction": 0.0,
    }  # fmt: skip
    named = {key.replace("__", "/"): value for key, value in values.items()}
    return {"kind": "step", "round": 1, "step": number, **names, **named}


def test_figures_leave_dead_steps_out_and_take_ratios_of_later_steps_only():
    lines = [
        step(1, update__gradient_norm=1.0, ratio__log_q99=9.0),
        step(2, update__gradient_norm=3.0, ratio__log_q99=0.5, ratio__max=4.0),
        {"kind": "step", "round": 1, "step": 3, "update/gradient_norm": 0.0, "update/loss": 0.0},
        {"kind": "round", "round": 1, "rollout/reward": 0.25, "rollout/entropy": 0.5},
    ]
    figures = run_figures(lines, steps_per_round=3, collapsed=False)
    assert figures["gradient_norm_deviation"] == pytest.approx(math.sqrt(2))  # of 1 and 3
    assert figures["log_ratio_spread"] == 0.5
    assert figures["log_ratio_max"] == pytest.approx(math.log(4))
    assert figures["reward_end"] == 0.25


def test_the_digest_sees_every_number_but_times_and_what_was_not_logged_when_it_was_stored():
    line = {"kind": "round", "rollout/reward": 0.1, "time/rollout_seconds": 1.0}
    assert log_digest([line]) == log_digest([line | {"time/rollout_seconds": 2.0}])
    assert log_digest([line]) == log_digest([line | {"update/a_later_metric": 0.0}])
    assert log_digest([line]) != log_digest([line | {"rollout/reward": 0.1 + 1e-16}])


def record(arm: str, seed: int, **figures: float) -> dict[str, Any]:
    values = {
        "rounds_survived": 300.0, "reward_end": 0.3, "gradient_norm_deviation": 1.0,
        "log_ratio_min": -1.0, "log_ratio_max": 1.0,
    } | figures  # fmt: skip
    return {"cell": f"{arm}-seed{seed}", "arm": arm, "seed": seed, "ended": "finished",
            "figures": values, "curves": {}}  # fmt: skip


def study_results(cells: list[dict[str, Any]], seeds: int) -> dict[str, Any]:
    arms = {arm: {} for arm in ARMS}
    return results(cells, settings={"arms": arms}, seeds=range(seeds))


def test_no_test_is_made_before_every_planned_seed_is_complete():
    cells = [record(arm, seed) for seed in range(3) for arm in ARMS][:-1]
    report = study_results(cells, seeds=3)
    assert report["seeds_complete"] == [0, 1]
    assert all("p" not in of for c in report["comparisons"] for of in c["figures"].values())
    assert "2 of 3 planned seeds are complete" in markdown(report)


def test_a_complete_study_is_tested_by_gmpo_minus_grpo():
    cells = [
        record(arm, seed, reward_end=0.5 if arm == "gmpo" else 0.3 + 0.01 * seed)
        for seed in range(10)
        for arm in ARMS
    ]
    report = study_results(cells, seeds=10)
    reward = report["comparisons"][0]["figures"]["reward_end"]
    assert (report["comparisons"][0]["left"], report["comparisons"][0]["right"]) == ("gmpo", "grpo")
    assert reward["mean"] == pytest.approx(0.2 - 0.045)  # 0.01 times the mean seed 4.5
    assert reward["p"] == 2 / 1024
    assert reward["p_holm"] == pytest.approx(6 / 1024)
    assert reward["is_significant"]
    survived = report["comparisons"][0]["figures"]["rounds_survived"]
    assert survived["p"] == 1.0
    assert not survived["is_significant"]
