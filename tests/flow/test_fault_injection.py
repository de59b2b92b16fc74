"""The study of faults put in on purpose: each is really in the run, and the table is right."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from scripts import fault_injection
from scripts.fault_injection import Injection, broken_run, markdown, measured, recipe, table
from scripts.tiny_policy import warm_policy
from tests.tiny_runs import metric_lines

ANSWERS = ["3", "12"]
COMPLETIONS = [[{"role": "assistant", "content": text}] for text in (" 3", "11")]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return warm_policy(tmp_path_factory.mktemp("policy") / "little", steps=60)


def run(policy: str, folder: Path, injection: Injection, *, guard: str, rounds: int) -> str:
    return broken_run(recipe(policy, guard=guard, seed=0, rounds=rounds), folder, injection)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [("none", [1, 0]), ("reward_sign", [-1, 0]), ("nan_reward", [math.nan, math.nan])],
)
def test_a_reward_is_wrong_only_while_the_fault_lasts(fault: str, expected: list[float]):
    injection = Injection(fault, seed=0, first_round=2)
    for number in range(1, 15):
        injection.rounds_sampled = number
        is_broken = 2 <= number < 2 + fault_injection.FAULTS[fault]
        wanted = expected if is_broken else [1, 0]
        assert injection.reward(COMPLETIONS, ANSWERS) == pytest.approx(wanted, nan_ok=True)


def test_each_fault_is_in_the_round_it_is_meant_for(policy: str, tmp_path: Path):
    faults = ("none", "learning_rate", "weights", "mismatch")
    for fault in faults:
        injection = Injection(fault, seed=0, first_round=2)
        assert run(policy, tmp_path / fault, injection, guard="warn", rounds=2) == "finished"
    first, second = zip(*(metric_lines(tmp_path / fault, "round") for fault in faults), strict=True)
    assert len({line["rollout/entropy"] for line in first}) == 1
    rates = [line["update/learning_rate"] for line in second]
    assert rates == pytest.approx([1e-4, 3e-3, 1e-4, 1e-4])
    mismatches = [line["rollout/mismatch_mean"] for line in second]
    # Corrupted weights are the trainer's and the sampler's; only the last fault is between them.
    assert max(mismatches[:3]) < 1e-4
    assert mismatches[3] > 0.05
    assert second[2]["rollout/entropy"] != second[0]["rollout/entropy"]


class Loud(Injection):
    """Noise that passes the bound of a single round, which needs no baseline, and live groups."""

    def reward(self, completions: list[list[dict[str, str]]], **_: Any) -> list[float]:
        return [float(len(set(turns[0]["content"])) % 2) for turns in completions]


@pytest.fixture
def loud(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fault_injection, "NOISE", 2.0)


@pytest.mark.usefixtures("loud")
def test_a_fault_that_passes_is_found_and_mended(policy: str, tmp_path: Path):
    injection = Loud("mismatch", seed=0, first_round=2)
    assert run(policy, tmp_path, injection, guard="mend", rounds=4) == "finished"
    outcome = measured(tmp_path, "finished", first_round=2)
    assert (outcome["first_alarm"], outcome["rounds_to_alarm"]) == ("sampler_mismatch", 1)
    assert outcome["events_before_fault"] == []
    # The fault lasts two rounds, so the first attempt from the beginning meets it again.
    assert outcome["went_back_to"] == [0, 0]
    rounds = metric_lines(tmp_path, "round")
    assert [line["round"] for line in rounds] == [1, 2, 3, 4]
    assert all(line["rollout/mismatch_mean"] < 1e-4 for line in rounds)


def test_corrupted_weights_are_found_in_their_round_and_mended(policy: str, tmp_path: Path):
    # Noise too small to show in rewards or entropy of a round.
    injection = Loud("weights", seed=0, first_round=3)
    assert run(policy, tmp_path, injection, guard="mend", rounds=5) == "finished"
    outcome = measured(tmp_path, "finished", first_round=3)
    assert (outcome["first_alarm"], outcome["rounds_to_alarm"]) == ("weights_disturbed", 1)
    assert outcome["events_before_fault"] == []
    assert outcome["went_back_to"] == [0]
    rounds = metric_lines(tmp_path, "round")
    assert [line["round"] for line in rounds] == [1, 2, 3, 4, 5]
    # The roll-back's own change of weights is none that the guard tells.
    assert [line["update/disturbed_weights"] for line in rounds] == [0.0] * 5


@pytest.mark.usefixtures("loud")
def test_a_fault_that_stays_ends_the_run(policy: str, tmp_path: Path):
    injection = Loud("mismatch_lasting", seed=0, first_round=2)
    ended = run(policy, tmp_path, injection, guard="mend", rounds=4)
    assert ended == "stopped by the guard"
    assert measured(tmp_path, ended, first_round=2)["rollbacks"] == 3


def outcome(fault: str, seed: int, *, final: float | None, **changes: Any) -> dict[str, Any]:
    return {
        "seed": seed,
        "fault": fault,
        "guard": "mend",
        "ended": "finished",
        "first_alarm": None,
        "rounds_to_alarm": None,
        "rollbacks": 0,
        "skipped_steps": 0,
        "final_reward": final,
    } | changes


def test_the_table_counts_what_was_found_and_what_recovered():
    late = {"first_alarm": "reward_drop", "rounds_to_alarm": 31, "rollbacks": 1}
    soon = late | {"rounds_to_alarm": 5}
    healthy, broken = table(
        [
            outcome("none", 0, final=0.5),
            outcome("none", 1, final=0.7),
            outcome("weights", 0, final=0.5, **soon),
            outcome("weights", 1, final=0.4, **late),
            outcome("weights", 2, final=0.9, ended="stopped by the guard", **soon),
            outcome("weights", 3, final=None, ended="not finite"),
        ]
    )
    assert (healthy["found"], healthy["recovered"], healthy["rounds_to_alarm"]) == (0, 2, None)
    assert (broken["runs"], broken["found"], broken["recovered"]) == (4, 2, 1)
    assert broken["rounds_to_alarm"] == [5, 5, 31]
    assert broken["first_alarms"] == {"reward_drop": 3}
    # Two of them have a healthy run of the same seed: 0.5 - 0.5 and 0.7 - 0.4.
    assert broken["behind_healthy_same_seed"] == pytest.approx(0.15)
    assert broken["final_reward"] == pytest.approx([0.4, 0.6, 0.9])
    assert "| weights | mend | 2 of 4 | 5 (5 to 31) | reward_drop 3 | 1, 1, 1, 0 |" in markdown(
        [healthy, broken]
    )


def test_an_outcome_is_read_again_unless_the_settings_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fault_injection, "broken_run", lambda *_: pytest.fail("run again"))
    stored = {"settings": fault_injection.settings(), "final_reward": 0.25}
    (tmp_path / "outcome.json").write_text(json.dumps(stored))

    def read() -> dict[str, Any]:
        return fault_injection.outcome_of(tmp_path, "policy", fault="none", guard="warn", seed=0)

    assert read() == stored
    (tmp_path / "outcome.json").write_text(json.dumps(stored | {"settings": {}}))
    with pytest.raises(pytest.fail.Exception, match="run again"):
        read()
