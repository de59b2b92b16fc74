"""The adaptive study's arithmetic, on runs made by hand."""

from __future__ import annotations

from typing import Any

import pytest
from scripts.adaptive_study import (
    ARMS,
    OUTCOMES,
    PAIRS,
    RATES,
    comparisons,
    markdown,
    measured,
    nearness,
    recipe,
)


def line(correct: float, *, low: float | None = 0.01, high: float | None = 0.03) -> dict[str, Any]:
    found = {
        "rollout/reward": correct / 2,
        "rollout/reward/correct": correct,
        "clip/low_fraction": low,
        "clip/high_fraction": high,
        "kl_old/k1": 0.002,
    }
    return {name: value for name, value in found.items() if value is not None}


def test_a_runs_figures_by_hand():
    # 20 rounds of warm-up that only right answers count, then 10: all low shares are in the band,
    # no high one is.
    run = [line(0.9, low=0.5)] * 20 + [line(0.4)] * 10
    figures = measured(run)
    assert figures["final_correct"] == pytest.approx(0.4)
    assert figures["best_correct"] == pytest.approx(0.9)
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


def run_of(rate: str, arm: str, seed: int, correct: float) -> dict[str, Any]:
    figures = measured([line(correct)] * 30)
    return {"rate": rate, "arm": arm, "seed": seed, **figures}


def test_arms_are_compared_seed_by_seed():
    shares = {("floor", 0): 0.1, ("falling floor", 0): 0.3, ("floor", 1): 0.6}
    shares["falling floor", 1] = 0.9
    runs = [
        run_of(rate, arm, seed, shares.get((arm, seed), 0.5))
        for rate in RATES
        for arm in ARMS
        for seed in (1, 0)
    ]
    rows = comparisons(runs)
    assert len(rows) == len(RATES) * len(PAIRS) * (len(OUTCOMES) + 1)
    pair = {"rate": "suitable", "baseline": "floor", "arm": "falling floor"}
    of_pair = [row for row in rows if pair.items() <= row.items()]
    first = next(row for row in of_pair if row["outcome"] == "final_correct")
    assert (first["before"], first["after"]) == (pytest.approx(0.35), pytest.approx(0.6))
    assert first["difference"] == pytest.approx(0.25)  # of 0.2 and 0.3
    low, high = first["interval"]
    # t(1) at 0.9875 is tan(pi * 0.4875) = 25.45; the deviation is 0.0707, over sqrt(2) 0.05.
    assert (high - low) / 2 == pytest.approx(25.45 * 0.05, rel=1e-3)
    (collapses,) = [row for row in of_pair if row["outcome"] == "collapses"]
    assert (collapses["before"], collapses["after"]) == (0, 0)
    assert len(markdown(rows)) == 2 + len(rows)


def test_a_seed_without_one_of_the_arms_is_in_no_pair_of_it():
    runs = [run_of("suitable", "constant", seed, 0.5) for seed in (0, 1)]
    runs.append(run_of("suitable", "clip", 1, 0.5))
    seeds = {row["arm"]: row["seeds"] for row in comparisons(runs) if row["rate"] == "suitable"}
    assert (seeds["clip"], seeds["step size"]) == (1, 0)


def test_clip_and_step_size_are_apart_and_each_pair_differs_in_what_it_is_named_for():
    recipes = {arm: recipe("no model", rate="suitable", arm=arm, seed=3) for arm in ARMS}
    on = {arm: (r.adaptive.clip, r.adaptive.learning_rate) for arm, r in recipes.items()}
    assert on["clip"] == (True, False)
    assert on["step size"] == (False, True)
    assert on["adaptive"] == (True, True)
    for baseline, arm in PAIRS[:4]:
        one, other = recipes[baseline], recipes[arm]
        assert other.adaptive.is_on and not one.adaptive.is_on
        assert one == other.model_copy(update={"adaptive": one.adaptive})
    falling, low = recipes["falling floor"], recipes["low floor"]
    assert falling.adaptive.reward_floor_end == low.reward.floor < falling.reward.floor


def test_a_near_answer_earns_by_how_far_it_is_off():
    said = ["12", " 13 ", "2", "1", "no", "-3"]
    completions = [[{"role": "assistant", "content": text}] for text in said]
    near = nearness(completions=completions, answer=["12"] * 6, prompts=[])
    assert near == pytest.approx([1.0, 0.9, 0.0, 0.0, 0.0, 0.0])
