"""Which alarms of a run go on, from folders written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.commands import jsonl

from gmpo.errors import ConfigError
from gmpo.guard_events import RESPONSES
from gmpo.run_conditions import run_conditions, unreadable_run


def round_line(number: int, **metrics: float) -> dict[str, Any]:
    return {"kind": "round", "round": number, "rollout/reward": 0.5} | metrics


def event(alarm: str, number: int, *, taken: str = "warn") -> dict[str, Any]:
    return {
        "alarm": alarm,
        "round": number,
        "onset": number,
        "metric": "update/loss",
        "value": None,
        "threshold": None,
        "taken": taken,
    }


def run_folder(path: Path, lines: list[dict[str, Any]], events: list[dict[str, Any]]) -> Path:
    path.mkdir(exist_ok=True)
    (path / "recipe.toml").touch()
    jsonl(path / "metrics.jsonl", lines)
    jsonl(path / "events.jsonl", events)
    return path


def names(folder: Path) -> list[str]:
    return [one.labels["alertname"] for one in run_conditions(folder)]


def test_an_alarm_lasts_as_long_as_its_cause(tmp_path: Path):
    healthy = [round_line(1, **{"rollout/mismatch_mean": 0.001})]
    broken = [round_line(n, **{"rollout/mismatch_mean": 9.0}) for n in (2, 3)]
    run = tmp_path / "run"
    assert names(run_folder(run, healthy, [])) == []
    # The guard writes its alarm in round 2 alone; in round 3 the cause goes on.
    told = [event("sampler_mismatch", 2)]
    (found,) = run_conditions(run_folder(run, [*healthy, *broken], told))
    assert found.labels == {"alertname": "GmpoSamplerMismatch", "run": str(run)}
    assert found.severity == "critical"
    assert found.annotations["summary"].startswith("rollout/mismatch_mean is 9, beyond ")
    assert found.annotations["summary"].endswith("since about round 2")
    assert found.annotations["action"] == RESPONSES["sampler_mismatch"].recommended_action
    mended = [*healthy, *broken, round_line(4, **{"rollout/mismatch_mean": 0.001})]
    assert names(run_folder(run, mended, told)) == []


@pytest.mark.parametrize(
    ("events", "last_round", "expected"),
    [
        ([event("non_finite", 4, taken="stop")], 3, ["GmpoNonFinite"]),
        # Resumed, the run has come past that round.
        ([event("non_finite", 4, taken="stop")], 4, []),
        ([event("non_finite", 4, taken="roll_back")], 2, []),
        ([event("gradient_spike", 3, taken="skip_step")], 3, []),
        ([{"kind": "another", "round": 3}], 3, []),
    ],
)
def test_a_value_that_is_not_finite_lasts_until_its_round_is_there(
    tmp_path: Path, events: list[dict[str, Any]], last_round: int, expected: list[str]
):
    lines = [round_line(number) for number in range(1, last_round + 1)]
    assert names(run_folder(tmp_path / "run", lines, events)) == expected


def test_a_drop_of_held_out_accuracy_lasts_until_the_next_evaluation(tmp_path: Path):
    dropped = [round_line(1), {"kind": "evaluation", "round": 1}]
    told = [event("held_out_drop", 1)]
    assert names(run_folder(tmp_path / "run", dropped, told)) == ["GmpoHeldOutDrop"]
    later = [*dropped, round_line(2), {"kind": "evaluation", "round": 2}]
    assert names(run_folder(tmp_path / "run", later, told)) == []


def test_what_is_no_run_folder_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"holds no recipe\.toml") as refused:
        run_conditions(tmp_path)
    lost = unreadable_run(tmp_path, refused.value)
    assert (lost.labels["alertname"], lost.severity) == ("GmpoRunUnreadable", "critical")
    assert "no run folder" in lost.annotations["summary"]
