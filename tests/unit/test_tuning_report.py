"""Candidates against the recipe, from outcomes written by hand."""

from __future__ import annotations

import numpy as np
import pytest

from gmpo.errors import StudyError
from gmpo.statistics import crossed_interval
from gmpo.tuning.report import JudgedRun, judgements
from gmpo.tuning.score import FAILED, Score

ITEMS = [str(number) for number in range(40)]


def run(right: float, *, stability: float = 0.5, seed: int = 0) -> JudgedRun:
    rng = np.random.default_rng(seed)
    outcomes = {
        name: float(value) for name, value in zip(ITEMS, rng.random(40) < right, strict=True)
    }
    accuracy = sum(outcomes.values()) / len(ITEMS)
    return JudgedRun(
        score=Score(accuracy=accuracy, stability=stability), outcomes=outcomes, crashed=False
    )


CRASHED = JudgedRun(score=FAILED, outcomes={}, crashed=True)


def test_differences_are_paired_by_seed_and_item():
    own = {seed: run(0.3, seed=seed) for seed in (1, 2, 3)}
    better = {seed: run(0.9, stability=0.7, seed=10 + seed) for seed in (1, 2, 3)}
    (found,) = judgements({None: own, 4: better})
    outcomes = np.array(
        [[better[s].outcomes[i] - own[s].outcomes[i] for i in ITEMS] for s in (1, 2, 3)]
    )
    assert (found.number, found.seeds) == (4, 3)
    assert found.accuracy == pytest.approx(outcomes.mean())
    assert found.objective == pytest.approx(0.7 * outcomes.mean() + 0.3 * 0.2)
    assert found.accuracy_interval == pytest.approx(crossed_interval(outcomes))
    assert found.beats_recipe


def test_the_same_runs_are_no_better_than_themselves():
    own = {seed: run(0.5, seed=seed) for seed in (1, 2)}
    (found,) = judgements({None: own, 0: own})
    assert found.objective == 0
    assert found.objective_interval == (0, 0)
    assert not found.beats_recipe


def test_more_candidates_widen_every_interval():
    own = {seed: run(0.3, seed=seed) for seed in (1, 2, 3)}
    other = {seed: run(0.6, seed=10 + seed) for seed in (1, 2, 3)}
    (alone,) = judgements({None: own, 1: other})
    first, second = judgements({None: own, 1: other, 2: other})
    assert first.objective == alone.objective
    assert first.objective_interval == second.objective_interval
    assert first.objective_interval[0] < alone.objective_interval[0]


def test_a_crashed_run_answers_nothing_right():
    own = {seed: run(1.0, seed=seed) for seed in (1, 2)}
    (found,) = judgements({None: own, 1: {1: CRASHED, 2: CRASHED}})
    assert found.accuracy == -1
    assert found.objective == pytest.approx(-0.7 - 0.3 * 0.5)


def test_what_cannot_be_judged_is_left_out():
    own = {seed: run(0.5, seed=seed) for seed in (1, 2)}
    assert judgements({None: own, 1: {1: run(0.9)}}) == []
    assert judgements({None: {1: CRASHED, 2: CRASHED}, 1: {1: CRASHED, 2: CRASHED}}) == []


def test_runs_with_other_items_are_no_pair():
    own = {seed: run(0.5, seed=seed) for seed in (1, 2)}
    odd = JudgedRun(score=Score(accuracy=1.0, stability=1.0), outcomes={"x": 1.0}, crashed=False)
    with pytest.raises(StudyError, match="different items"):
        judgements({None: own, 1: {1: odd, 2: odd}})
