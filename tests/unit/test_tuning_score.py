"""What a study maximises, by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gmpo.errors import StudyError
from gmpo.recipe import load_recipe
from gmpo.tuning.score import (
    FAILED,
    Score,
    final_score,
    given_up_rounds,
    held_out_outcomes,
    scores_during,
    stability,
)


@pytest.fixture
def recipe():
    return load_recipe("quickstart", ["training.rounds=2", "training.steps_per_round=2"])


def round_line(number: int, **changes: float) -> dict[str, Any]:
    """A round of which no detector has anything to say."""
    figures = {"rollout/reward": 0.5, "rollout/entropy": 1.0}
    return {"kind": "round", "round": number, **figures, **changes}


def step_line(number: int, *, norm: float, loss: float, clipped: float = 0.0) -> dict[str, Any]:
    return {
        "kind": "step",
        "round": (number + 1) // 2,
        "step": number,
        "update/loss": loss,
        "update/gradient_norm": norm,
        "ratio/min": 1.0,
        "ratio/max": 1.0,
        "ratio/log_q01": 0.0,
        "ratio/log_q99": 0.0,
        "ratio/am_gm_gap": 0.0,
        "clip/low_fraction": clipped,
        "clip/high_fraction": 0.0,
    }


def two_rounds(*, norms: list[float], clipped: float = 0.0, **last_round: float) -> list[dict]:
    steps = [
        step_line(place + 1, norm=norm, loss=(-1.0) ** place, clipped=clipped)
        for place, norm in enumerate(norms)
    ]
    return [*steps[:2], round_line(1), *steps[2:], round_line(2, **last_round)]


def test_the_objective_is_the_articles_sum():
    assert Score(accuracy=0.5, stability=1.0).objective == pytest.approx(0.65)
    assert FAILED.objective == 0


def test_a_steady_run_scores_one(recipe):
    lines = two_rounds(norms=[2.0, 2.0, 2.0, 2.0])
    assert stability(lines, recipe=recipe, kind="meaningful", rounds=2) == 1


def test_a_spread_of_gradient_norms_lowers_it(recipe):
    norms = [1.0, 1.0, 3.0, 1.0]
    # q50 = 1; q95 lies 0.85 of the way from the third to the fourth: 1 + 0.85 * 2 = 2.7.
    spread = float((np.quantile(norms, 0.95) - 1) / 1)
    assert spread == pytest.approx(1.7)
    lines = two_rounds(norms=norms)
    found = stability(lines, recipe=recipe, kind="meaningful", rounds=2)
    assert found == pytest.approx(1 / 2.7)


def test_tokens_clipped_beyond_a_tenth_lower_it(recipe):
    def of(clipped: float) -> float:
        lines = two_rounds(norms=[2.0] * 4, clipped=clipped)
        return stability(lines, recipe=recipe, kind="meaningful", rounds=2)

    assert of(0.1) == 1
    assert of(0.55) == pytest.approx(0.5)


def test_a_whole_clipped_sequence_is_its_objectives_habit():
    gspo = load_recipe("quickstart", ["objective.name=gspo"])
    lines = two_rounds(norms=[2.0] * 4, clipped=0.9)
    assert stability(lines, recipe=gspo, kind="meaningful", rounds=2) == 1


def test_rounds_that_are_missing_or_alarmed_count(recipe):
    lines = two_rounds(norms=[2.0] * 4)
    assert stability(lines, recipe=recipe, kind="meaningful", rounds=4) == 0.5
    # Half of the last round's ten rollouts have no reward.
    lost = {"rollout/tokens": 30, "rollout/completion_tokens": 3.0, "rollout/errors_total": 5}
    alarmed = two_rounds(norms=[2.0] * 4, **lost)
    assert stability(alarmed, recipe=recipe, kind="meaningful", rounds=2) == 0.5


def test_a_falling_floor_is_no_falling_reward(recipe):
    """Forty rounds whose floor takes the reward from 0.8 to 0, at equal completions."""
    fallen = [round_line(n, **{"rollout/reward": 0.8 - 0.02 * n}) for n in range(1, 41)]
    steps = two_rounds(norms=[2.0] * 4)[:2]
    assert stability([*steps, *fallen], recipe=recipe, kind="meaningful", rounds=40) < 1
    same = [line | {"adaptive/reward_at_first_floor": 0.8} for line in fallen]
    assert stability([*steps, *same], recipe=recipe, kind="meaningful", rounds=40) == 1


def test_a_round_with_a_step_left_out_is_not_calm(recipe):
    lines = two_rounds(norms=[2.0] * 4, **{"update/skipped_steps_total": 1.0})
    assert stability(lines, recipe=recipe, kind="meaningful", rounds=2) == 0.5


def test_rounds_that_were_given_up_are_rounds_that_were_not_calm(recipe):
    lines = two_rounds(norms=[2.0] * 4)
    # Two calm rounds of the six that were trained.
    found = stability(lines, recipe=recipe, kind="meaningful", rounds=2, given_up=4)
    assert found == pytest.approx(1 / 3)


def test_the_articles_formula_is_one_over_one_plus_the_variance(recipe):
    lines = two_rounds(norms=[2.0] * 4)
    # Losses 1, -1, 1, -1: sample variance 4 / 3.
    assert stability(lines, recipe=recipe, kind="article", rounds=2) == pytest.approx(3 / 7)


@pytest.mark.parametrize("kind", ["meaningful", "article"])
def test_without_steps_there_is_no_stability(recipe, kind):
    assert stability([round_line(1)], recipe=recipe, kind=kind, rounds=2) == 0


def event(alarm: str, *, attempt: int, at: int, taken: str, to: int | None = None) -> dict:
    return {"alarm": alarm, "attempt": attempt, "round": at, "taken": taken, "to_round": to}


def run_folder(
    tmp_path: Path, lines: list[dict], evaluations: list[dict], events: list[dict] | None = None
) -> Path:
    for name, records in (
        ("metrics.jsonl", lines),
        ("evaluations.jsonl", evaluations),
        ("events.jsonl", events or []),
    ):
        text = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_finished_run_is_scored_by_its_greedy_answers_after_training(recipe, tmp_path: Path):
    before = {"stage": "before", "results": [{"name": "greedy", "outcomes": {"a": 1, "b": 1}}]}
    after = {
        "stage": "after",
        "results": [
            {"name": "sampled", "outcomes": {"a": 1, "b": 1}},
            {"name": "greedy", "outcomes": {"a": 0, "b": 1}},
        ],
    }
    run = run_folder(tmp_path, two_rounds(norms=[2.0] * 4), [before, after])
    assert held_out_outcomes(run) == {"a": 0.0, "b": 1.0}
    assert final_score(run, recipe, kind="meaningful") == Score(accuracy=0.5, stability=1.0)


def test_a_run_without_an_evaluation_after_training_is_named(recipe, tmp_path: Path):
    run = run_folder(tmp_path, two_rounds(norms=[2.0] * 4), [])
    with pytest.raises(StudyError, match="has nothing after training"):
        final_score(run, recipe, kind="meaningful")


def test_evaluations_during_training_see_the_rounds_before_them_only(recipe, tmp_path: Path):
    lines = two_rounds(norms=[2.0, 2.0, 2.0, 8.0])
    first = {"kind": "evaluation", "round": 1, "evaluation/accuracy": 0.25}
    second = {"kind": "evaluation", "round": 2, "evaluation/accuracy": 0.75}
    run = run_folder(tmp_path, [*lines[:3], first, *lines[3:], second], [])
    found = scores_during(run, recipe, kind="meaningful")
    assert found[1] == Score(accuracy=0.25, stability=1.0)
    assert found[2].accuracy == 0.75
    assert found[2].stability < 1
    assert list(scores_during(run, recipe, kind="meaningful", after=1)) == [2]


def test_a_run_that_was_taken_back_scores_less_than_one_that_was_not(recipe, tmp_path: Path):
    after = {"stage": "after", "results": [{"name": "greedy", "outcomes": {"a": 1}}]}
    events = [
        event("gradient_spike", attempt=0, at=2, taken="skip_step"),
        event("entropy_collapse", attempt=0, at=2, taken="warn"),
        event("ratio_explosion", attempt=0, at=2, taken="roll_back", to=0),
        event("reward_drop", attempt=0, at=2, taken="roll_back", to=0),  # of the same round
        event("non_finite", attempt=1, at=1, taken="roll_back", to=0),
    ]
    run = run_folder(tmp_path, two_rounds(norms=[2.0] * 4), [after], events)
    assert given_up_rounds(run) == 3
    # Two calm rounds of the five that were trained, of which the run's own lines are steady.
    assert final_score(run, recipe, kind="meaningful") == Score(accuracy=1.0, stability=0.4)


def test_an_evaluation_counts_what_was_given_up_before_it(tmp_path: Path):
    recipe = load_recipe("quickstart", ["training.rounds=8", "training.steps_per_round=2"])
    lines: list[dict] = []
    for number in range(1, 9):
        steps = (2 * number - 1, 2 * number)
        lines += [step_line(step, norm=2.0, loss=0.0) for step in steps]
        lines += [round_line(number)]
        lines += [{"kind": "evaluation", "round": number, "evaluation/accuracy": 0.5}]
    events = [
        event("reward_drop", attempt=0, at=6, taken="roll_back", to=4),  # 5 and 6
        event("reward_drop", attempt=1, at=5, taken="roll_back", to=2),  # 3, 4 and 5
        event("reward_drop", attempt=2, at=8, taken="roll_back", to=7),  # 8
    ]
    run = run_folder(tmp_path, lines, [], events)
    found = scores_during(run, recipe, kind="meaningful")
    # What is left of rounds 1 and 2 is from before all three, of 3 to 7 from before the last.
    given_up = {1: 0, 2: 0, 3: 5, 4: 5, 5: 5, 6: 5, 7: 5, 8: 6}
    for number, count in given_up.items():
        assert found[number].stability == pytest.approx(number / (number + count))
