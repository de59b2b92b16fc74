"""The adaptive study's arithmetic, on runs made by hand."""

from __future__ import annotations

from typing import Any

import pytest
from scripts.adaptive_study import ARMS, RATES, comparisons, markdown, measured, recipe


def line(reward: float, *, low: float | None = 0.01, high: float | None = 0.03) -> dict[str, Any]:
    found = {
        "rollout/reward": reward,
        "clip/low_fraction": low,
        "clip/high_fraction": high,
        "kl_old/k1": 0.002,
    }
    return {name: value for name, value in found.items() if value is not None}


def test_a_runs_figures_by_hand():
    # 20 rounds of warm-up that only the reward counts, then 10: all low shares are in the band,
    # no high one is.
    run = [line(0.9, low=0.5)] * 20 + [line(0.4)] * 10
    figures = measured(run)
    assert figures["final_reward"] == pytest.approx(0.4)
    assert figures["best_reward"] == pytest.approx(0.9)
    assert figures["collapsed"]  # 0.4 is less than 0.45
    assert figures["low_share"] == pytest.approx(0.01)
    assert figures["high_share"] == pytest.approx(0.03)
    assert figures["in_band"] == pytest.approx(0.5)
    assert figures["kl"] == pytest.approx(0.002)


def test_half_of_the_best_is_no_collapse_and_dead_rounds_have_no_shares():
    run = [line(0.8)] * 20 + [line(0.4, low=None, high=None)] * 10
    figures = measured(run)
    assert not figures["collapsed"]
    assert figures["low_share"] is figures["in_band"] is None


def run_of(rate: str, arm: str, seed: int, reward: float) -> dict[str, Any]:
    figures = measured([line(reward)] * 30)
    return {"rate": rate, "arm": arm, "seed": seed, **figures}


def test_arms_are_compared_seed_by_seed():
    rewards = {("constant", 0): 0.1, ("adaptive", 0): 0.3, ("constant", 1): 0.6}
    rewards["adaptive", 1] = 0.9
    runs = [
        run_of(rate, arm, seed, rewards[arm, seed])
        for rate in RATES
        for arm in ARMS
        for seed in (1, 0)
    ]
    rows = comparisons(runs)
    first = next(row for row in rows if row["outcome"] == "final_reward")
    assert first["difference"] == pytest.approx(0.25)  # of 0.2 and 0.3
    low, high = first["interval"]
    # t(1) at 0.9875 is tan(pi * 0.4875) = 25.45; the deviation is 0.0707, over sqrt(2) 0.05.
    assert (high - low) / 2 == pytest.approx(25.45 * 0.05, rel=1e-3)
    collapses = [row for row in rows if row["outcome"] == "collapses"]
    assert [(row["constant"], row["adaptive"]) for row in collapses] == [(0, 0), (0, 0)]
    assert len(markdown(rows)) == 2 + len(rows)


def test_arms_differ_in_their_adaptive_table_alone():
    constant, adaptive = (recipe("no model", rate="suitable", arm=arm, seed=3) for arm in ARMS)
    assert adaptive.adaptive.clip
    assert constant == adaptive.model_copy(update={"adaptive": constant.adaptive})
