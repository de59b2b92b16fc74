"""The guard's judgement: each alarm on a trace that must raise it, none on healthy ones."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from tests.guard_traces import Metrics, healthy, steady

from gmpo.guard import GuardState, Measured, decide, judge_evaluation
from gmpo.guard_events import RESPONSES, GuardEvent


def broken(change: Mapping[str, float | None], *, first: int = 31, seed: int = 0) -> list[Metrics]:
    """A healthy run whose figures are these from round `first` on."""
    return [
        {**line, **change} if number >= first else line
        for number, line in enumerate(healthy(seed), start=1)
    ]


def events_of(trace: Sequence[Mapping[str, float | None]]) -> list[GuardEvent]:
    state, found = GuardState(), []
    for number, metrics in enumerate(trace, start=1):
        events, state = decide(metrics, state, round_number=number)
        found += events
    return found


@pytest.mark.parametrize("seed", range(20))
def test_a_run_that_learns_raises_no_alarm(seed: int):
    assert events_of(healthy(seed)) == []


DRIFTS: dict[str, dict[str, float | None]] = {
    "reward_drop": {"rollout/reward": 0.0},
    "entropy_surge": {"rollout/entropy": 4.0},
    "gradient_growth": {"update/gradient_norm": 30.0},
    "ratio_explosion": {"ratio/am_gm_gap": 0.6},
    "sampler_mismatch": {"rollout/mismatch_mean": 0.05},
    "entropy_collapse": {"rollout/entropy": 0.02, "rollout/reward": 0.2},
    "length_runaway": {
        "rollout/completion_tokens": 12.0,
        "rollout/tokens": 768.0,
        "rollout/reward": 0.2,
    },
}


@pytest.mark.parametrize("alarm", DRIFTS)
@pytest.mark.parametrize("seed", range(3))
def test_a_drift_is_found_within_30_rounds_and_its_onset_named(alarm: str, seed: int):
    events = [e for e in events_of(broken(DRIFTS[alarm], seed=seed)) if e.alarm == alarm]
    (event,) = events
    assert 31 <= event.round <= 60
    # Entropy falls while a run learns, so the onset of a collapse is named early rather than late.
    earliest = 10 if alarm == "entropy_collapse" else 28
    assert earliest <= event.onset <= 34
    assert event.test in ("Page-Hinkley", "ADWIN")
    assert event.baseline is not None and event.threshold is not None
    assert event.recommended_action == RESPONSES[alarm].recommended_action


@pytest.mark.parametrize("alarm", sorted(DRIFTS.keys() - {"reward_drop"}))
@pytest.mark.parametrize("seed", range(3))
def test_a_sudden_drift_is_told_in_its_7th_to_11th_round(alarm: str, seed: int):
    def first_told(began: int) -> int | None:
        events = events_of(broken(DRIFTS[alarm], first=began, seed=seed))
        return next((event.round for event in events if event.alarm == alarm), None)

    told = first_told(21)
    assert told is not None and 7 <= told - 21 + 1 <= 11
    # What has gone on for half of the first 20 rounds is what later ones are held against.
    assert first_told(11) is None


@pytest.mark.parametrize("alarm", ["reward_drop", "ratio_explosion"])
@pytest.mark.parametrize("seed", range(3))
def test_on_trial_a_sudden_drift_is_told_within_5_rounds(alarm: str, seed: int):
    events = trial_of(broken(DRIFTS[alarm], first=21, seed=seed))
    assert 21 < next(e.round for e in events if e.alarm == alarm) <= 25


@pytest.mark.parametrize(
    ("alarm", "change"),
    [
        ("ratio_explosion", {"ratio/am_gm_gap": 2.4}),
        ("sampler_mismatch", {"rollout/mismatch_mean": 0.5}),
        ("weights_disturbed", {"update/disturbed_weights": 1.0}),
        ("reward_missing", {"rollout/reward": None, "rollout/errors_total": 64.0}),
    ],
)
def test_a_bound_is_found_in_its_round_also_in_the_first(
    alarm: str, change: dict[str, float | None]
):
    event = events_of(broken(change, first=1))[0]
    assert (event.alarm, event.round, event.onset, event.test) == (alarm, 1, 1, "bound")


def spiked(rounds: Collection[int], norm: float, *, seed: int = 0) -> list[Metrics]:
    """A healthy run whose gradient norm is this in these rounds."""
    return [
        {**line, "update/gradient_norm": norm} if number in rounds else line
        for number, line in enumerate(healthy(seed), start=1)
    ]


@pytest.mark.parametrize("lasts", [1, 2, 5])
@pytest.mark.parametrize("first", [6, 19, 20, 21, 31, 55])
def test_a_spike_of_the_gradient_is_found_in_its_round_and_told_once(first: int, lasts: int):
    (event,) = events_of(spiked(range(first, first + lasts), 1e6))
    assert (event.alarm, event.round, event.onset) == ("gradient_spike", first, first)
    assert (event.metric, event.test) == ("update/gradient_norm", "bound")
    assert (event.action, event.severity) == ("warn", "warning")
    assert event.value == pytest.approx(1e6)
    assert event.baseline is not None and 0.5 < event.baseline < 2
    assert event.threshold is not None and 10 * event.baseline <= event.threshold < 40
    assert event.recommended_action == RESPONSES["gradient_spike"].recommended_action


@pytest.mark.parametrize("seed", range(20))
def test_thirty_times_the_largest_healthy_gradient_is_a_spike(seed: int):
    largest = max(line["update/gradient_norm"] or 0 for line in healthy(seed))
    (event,) = events_of(spiked([31], 30 * largest, seed=seed))
    assert (event.alarm, event.round) == ("gradient_spike", 31)


def test_each_spike_of_the_gradient_is_told():
    assert [event.round for event in events_of(spiked([31, 33], 1e6))] == [31, 33]


@pytest.mark.parametrize(
    ("norms", "threshold"),
    [
        # No scatter: ten times, more than exp(6 0.3) = 6.05.
        ([1.0, 1.0], 10.0),
        # Logarithms 1 apart: center 0, deviation 1.4826 0.5; exp(6 1.4826 0.5) = 85.4.
        ([math.exp(0.5), math.exp(-0.5)], 85.4),
    ],
)
@pytest.mark.parametrize("before", [6, 20])
def test_a_spike_of_the_gradient_has_a_hand_computed_threshold(
    norms: list[float], threshold: float, before: int
):
    usual: list[Metrics] = [{"update/gradient_norm": norms[place % 2]} for place in range(before)]
    (event,) = events_of([*usual, {"update/gradient_norm": 1.01 * threshold}])
    assert event.threshold == pytest.approx(threshold, rel=1e-3)
    assert event.baseline == pytest.approx(1)
    assert events_of([*usual, {"update/gradient_norm": 0.99 * threshold}]) == []


def test_a_gradient_is_compared_once_five_rounds_had_one():
    dead: Metrics = {"update/gradient_norm": 0.0}
    usual: Metrics = {"update/gradient_norm": 1.0}
    assert events_of([*[dead] * 9, *[usual] * 4, {"update/gradient_norm": 1e6}]) == []
    (event,) = events_of([*[dead] * 9, *[usual] * 5, {"update/gradient_norm": 1e6}])
    assert (event.alarm, event.round) == ("gradient_spike", 15)


def test_steps_left_out_are_no_spike_of_their_round():
    trace = spiked([31], 1e6)
    trace[30] = {**trace[30], "update/skipped_steps_total": 1.0}
    assert events_of(trace) == []


def test_a_gradient_that_stays_high_is_a_spike_first_and_then_a_drift():
    found = [(e.alarm, e.severity) for e in events_of(spiked(range(31, 61), 30.0))]
    assert found == [("gradient_spike", "warning"), ("gradient_growth", "critical")]


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
@pytest.mark.parametrize(
    "metric",
    ["update/loss", "update/gradient_norm", "ratio/am_gm_gap", "rollout/mismatch_mean"],
)
def test_a_figure_that_cannot_be_without_a_value_is_critical_once(metric: str, value: float | None):
    trace = [{"update/loss": 0.01, **line} for line in broken({metric: value}, first=5)]
    event = next(event for event in events_of(trace) if event.alarm == "non_finite")
    assert (event.round, event.onset, event.metric, event.test) == (5, 5, metric, "bound")
    assert (event.value, event.severity, event.action) == (None, "critical", "roll_back")
    assert [event.alarm for event in events_of(trace)].count("non_finite") == 1


@pytest.mark.parametrize(
    "change",
    [
        # No rollout has a reward, no token is the policy's, no gradient has a direction.
        {"rollout/reward": math.nan},
        {"rollout/entropy": math.nan},
        {"update/gradient_cosine_grpo": math.nan},
        # Steps that were left out moved nothing, and have events of their own.
        {"update/loss": None, "update/gradient_norm": None, "update/skipped_steps_total": 4.0},
    ],
)
def test_figures_that_may_be_without_a_value_raise_nothing(change: dict[str, float | None]):
    assert events_of(broken(change, first=5)) == []


def test_a_step_left_out_does_not_hide_what_the_others_broke():
    change = {"update/skipped_steps_total": 1.0, "ratio/am_gm_gap": math.nan}
    assert {event.alarm for event in events_of(broken(change, first=5))} == {"non_finite"}


def trial_of(trace: Sequence[Metrics], *, first: int = 21) -> list[GuardEvent]:
    """Events where the run is on trial from round `first` on."""
    state, found = GuardState(), []
    for number, metrics in enumerate(trace, start=1):
        events, state = decide(metrics, state, round_number=number, is_on_trial=number >= first)
        found += events
    return found


@pytest.mark.parametrize(
    ("alarm", "metric", "change"),
    [
        # Two deviations lower; six times the ratios' spread, far below the bound of 0.1.
        ("reward_drop", "rollout/reward", lambda value: value - 0.17),
        ("ratio_explosion", "ratio/am_gm_gap", lambda value: 6 * value),
    ],
)
@pytest.mark.parametrize("seed", [0, 3, 4])
def test_on_trial_smaller_drifts_count(
    alarm: str, metric: str, change: Callable[[float], float], seed: int
):
    trace = [
        {**line, metric: change(line[metric])} if number > 25 else line
        for number, line in enumerate(steady(seed), start=1)
    ]
    assert alarm not in {event.alarm for event in events_of(trace)}
    found = next(event for event in trial_of(trace) if event.alarm == alarm)
    assert 25 < found.round <= 60
    assert found.severity == "critical"


def test_a_steady_run_on_trial_raises_few_alarms():
    alarmed = sum(bool(trial_of(steady(seed))) for seed in range(100, 160))
    assert alarmed <= 6


def test_ten_rounds_of_dead_groups_are_told_unless_the_task_is_learned():
    (event,) = events_of(broken({"rollout/dead_groups": 8.0, "rollout/reward": 0.0}, first=1)[:12])
    assert (event.alarm, event.round, event.onset) == ("dead_groups", 10, 1)
    learned = broken({"rollout/dead_groups": 8.0, "rollout/reward": 1.0}, first=41)
    assert events_of(learned) == []


def test_an_alarm_is_told_once_while_its_cause_goes_on_and_again_after_it_ended():
    trace = healthy(rounds=9)
    for place in (2, 3, 4, 7):
        trace[place] = {**trace[place], "ratio/am_gm_gap": 2.0}
    assert [event.round for event in events_of(trace)] == [3, 8]


def test_the_baseline_does_not_follow_a_reward_that_falls_slowly():
    trace = healthy(rounds=90)
    for number in range(40, 90):
        trace[number] = {**trace[number], "rollout/reward": max(0.0, 0.5 - 0.02 * (number - 40))}
    assert "reward_drop" in {event.alarm for event in events_of(trace)}


def test_a_state_that_went_through_json_decides_as_the_state_itself():
    trace = broken(DRIFTS["reward_drop"])
    state, again = GuardState(), GuardState()
    for number, metrics in enumerate(trace, start=1):
        events, state = decide(metrics, state, round_number=number)
        same, again = decide(metrics, again, round_number=number)
        record: dict[str, Any] = json.loads(json.dumps(asdict(again)))
        again = GuardState.from_record(record)
        assert same == events and again == state


def test_deciding_changes_nothing_it_was_given():
    metrics, state = healthy(rounds=1)[0], GuardState()
    before = (dict(metrics), asdict(state))
    decide(metrics, state, round_number=1)
    assert (metrics, asdict(state)) == before


def evaluated(round_number: int, accuracy: float, items: int = 100) -> Measured:
    return Measured(round=round_number, accuracy=accuracy, items=items)


def test_a_held_out_drop_has_a_hand_computed_threshold():
    state = GuardState(best=evaluated(10, 0.8))
    # Mean 0.645 at 0.49: 4.5 sqrt(2 * 0.645 * 0.355 / 100) = 0.3045, less than 0.31.
    (event,), after = judge_evaluation(evaluated(20, 0.49), state)
    assert event.threshold == pytest.approx(0.8 - 0.3045, abs=1e-4)
    assert (event.alarm, event.action, event.severity) == ("held_out_drop", "roll_back", "critical")
    assert (event.round, event.onset, event.baseline, event.value) == (20, 12, 0.8, 0.49)
    # It is told once; from then on the lower accuracy counts.
    assert judge_evaluation(evaluated(30, 0.48), after) == ((), after)
    # Mean 0.65 at 0.5: 0.3035, more than 0.3.
    assert judge_evaluation(evaluated(20, 0.5), state) == ((), state)


def test_a_better_evaluation_is_what_the_next_is_held_against():
    _, first = judge_evaluation(evaluated(10, 0.4), GuardState())
    assert first.best == evaluated(10, 0.4)
    _, second = judge_evaluation(evaluated(20, 0.9), first)
    assert second.best == evaluated(20, 0.9)
    assert judge_evaluation(evaluated(30, 0.8), second) == ((), second)


def test_evaluations_of_a_steady_policy_raise_few_alarms():
    """Fifty evaluations each of 200 policies that stay at 0.7, on items drawn anew each time."""
    rng = np.random.default_rng(0)
    alarmed = 0
    for _ in range(200):
        state, found = GuardState(), 0
        for number in range(50):
            events, state = judge_evaluation(
                evaluated(10 * number, rng.binomial(100, 0.7) / 100), state
            )
            found += len(events)
        alarmed += found > 0
    assert alarmed <= 4


def test_the_best_evaluation_survives_json():
    state = GuardState(best=evaluated(10, 0.8))
    assert GuardState.from_record(json.loads(json.dumps(asdict(state)))) == state
