"""The guard's judgement: each alarm on a trace that must raise it, none on healthy ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from gmpo.guard import RESPONSES, GuardEvent, GuardState, decide

Metrics = dict[str, float | None]


def healthy(seed: int = 0, *, rounds: int = 60) -> list[Metrics]:
    """A run that learns: reward rises, entropy falls, and all scatters as in small runs."""
    chance = np.random.default_rng(seed)
    trace: list[Metrics] = []
    for number in range(rounds):
        done = number / rounds
        trace.append(
            {
                "rollout/reward": float(np.clip(0.2 + 0.7 * done + chance.normal(0, 0.08), 0, 1)),
                "rollout/entropy": float(np.exp(-1.5 * done + chance.normal(0, 0.15))),
                "rollout/completion_tokens": float(5 + chance.normal(0, 0.2)),
                "rollout/tokens": 320.0,
                "rollout/groups": 8.0,
                "rollout/dead_groups": float(chance.integers(0, 5)),
                "rollout/errors_total": 0.0,
                "rollout/mismatch_mean": float(np.exp(chance.normal(-15, 0.6))),
                "update/gradient_norm": float(np.exp(chance.normal(0, 0.4))),
                "ratio/am_gm_gap": float(np.exp(chance.normal(-6, 1.2))),
            }
        )
    return trace


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


@pytest.mark.parametrize(
    ("alarm", "change"),
    [
        ("ratio_explosion", {"ratio/am_gm_gap": 2.4}),
        ("sampler_mismatch", {"rollout/mismatch_mean": 0.5}),
        ("reward_missing", {"rollout/reward": None, "rollout/errors_total": 64.0}),
    ],
)
def test_a_bound_is_found_in_its_round_also_in_the_first(
    alarm: str, change: dict[str, float | None]
):
    event = events_of(broken(change, first=1))[0]
    assert (event.alarm, event.round, event.onset, event.test) == (alarm, 1, 1, "bound")


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
