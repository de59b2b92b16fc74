"""Which alarms of a run go on, from folders written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.commands import jsonl

from gmpo.errors import ConfigError
from gmpo.guard_events import RESPONSES
from gmpo.run_conditions import run_health, unreadable_run


def round_line(number: int, **metrics: float) -> dict[str, Any]:
    return {"kind": "round", "round": number, "rollout/reward": 0.5} | metrics


def event(alarm: str, number: int, *, taken: str = "warn") -> dict[str, Any]:
    return {
        "alarm": alarm,
        "round": number,
        "onset": number,
        "metric": "update/loss",
        "value": None,
        "baseline": None,
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
    return [one.labels["alertname"] for one in run_health(folder).conditions]


def test_an_alarm_lasts_as_long_as_its_cause(tmp_path: Path):
    healthy = [round_line(1, **{"rollout/mismatch_mean": 0.001})]
    broken = [round_line(n, **{"rollout/mismatch_mean": 9.0}) for n in (2, 3)]
    run = tmp_path / "run"
    assert names(run_folder(run, healthy, [])) == []
    # The guard writes its alarm in round 2 alone; in round 3 the cause goes on.
    told = [event("sampler_mismatch", 2)]
    (found,) = run_health(run_folder(run, [*healthy, *broken], told)).conditions
    assert found.labels == {"alertname": "GmpoSamplerMismatch", "run": str(run)}
    assert found.severity == "critical"
    assert found.annotations["summary"].startswith("rollout/mismatch_mean is 9, beyond ")
    assert found.annotations["summary"].endswith("since about round 2")
    assert found.annotations["action"] == RESPONSES["sampler_mismatch"].recommended_action
    mended = [*healthy, *broken, round_line(4, **{"rollout/mismatch_mean": 0.001})]
    assert names(run_folder(run, mended, told)) == []


def test_a_falling_floor_is_no_alarm(tmp_path: Path):
    fallen = [round_line(n, **{"rollout/reward": 0.8 - 0.02 * n}) for n in range(1, 41)]
    same = [line | {"adaptive/reward_at_first_floor": 0.8} for line in fallen]
    assert names(run_folder(tmp_path / "fallen", fallen, [])) == ["GmpoRewardDrop"]
    assert names(run_folder(tmp_path / "same", same, [])) == []


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
        run_health(tmp_path)
    lost = unreadable_run(tmp_path, refused.value)
    assert (lost.labels["alertname"], lost.severity) == ("GmpoRunUnreadable", "critical")
    assert "no run folder" in lost.annotations["summary"]


def test_a_step_left_out_is_in_the_report_of_its_round_alone(tmp_path: Path):
    told = [event("gradient_spike", 3, taken="skip_step")]
    lines = [round_line(number) for number in (1, 2, 3)]
    report = run_health(run_folder(tmp_path / "run", lines, told)).report
    assert report.families["statistical"] == {"gradient_spike": 1.0}
    assert (report.severity, report.level) == (pytest.approx(0.3), "ok")
    later = run_folder(tmp_path / "run", [*lines, round_line(4)], told)
    assert run_health(later).report.severity == 0


def test_a_spike_whose_steps_were_taken_is_a_warning_of_its_round_alone(tmp_path: Path):
    usual = [round_line(n, **{"update/gradient_norm": 1.0}) for n in range(1, 7)]
    spike = round_line(7, **{"update/gradient_norm": 99.0})
    # Told in an attempt that was given up: no round of this one shows it.
    told = [event("gradient_spike", 9)]
    assert names(run_folder(tmp_path / "run", usual, told)) == []
    health = run_health(run_folder(tmp_path / "run", [*usual, spike], told))
    (found,) = health.conditions
    assert (found.labels["alertname"], found.severity) == ("GmpoGradientSpike", "warning")
    assert found.annotations["summary"].startswith("update/gradient_norm is 99, beyond 10, since")
    assert (health.report.severity, health.report.level) == (0.5, "warning")
    after = round_line(8, **{"update/gradient_norm": 1.0})
    assert names(run_folder(tmp_path / "run", [*usual, spike, after], told)) == []


def test_ratios_that_spread_are_a_warning(tmp_path: Path):
    # (0.8 - 0.56) / 0.3 = 0.8, times 0.6 is 0.48; at 0.65 it is 0.3 and not told.
    wide = [round_line(n, **{"ratio/effective_sample_fraction": 0.56}) for n in range(1, 6)]
    (found,) = run_health(run_folder(tmp_path / "run", wide, [])).conditions
    assert (found.labels["alertname"], found.severity) == ("GmpoRatioSpread", "warning")
    assert found.annotations["summary"] == "ratio/effective_sample_fraction is 0.56, beyond 0.8"
    less = [round_line(n, **{"ratio/effective_sample_fraction": 0.65}) for n in range(1, 6)]
    health = run_health(run_folder(tmp_path / "run", less, []))
    assert list(health.conditions) == []
    assert health.report.families["importance_ratio"] == {"ratio_spread": pytest.approx(0.5)}


def test_warnings_that_are_critical_together_are_told_as_one(tmp_path: Path):
    both = {"ratio/effective_sample_fraction": 0.5, "kl_old/k1": 0.5}
    lines = [round_line(n, **both) for n in range(1, 6)]
    health = run_health(run_folder(tmp_path / "run", lines, []))
    # 1 - 0.4 0.4
    assert health.report.severity == pytest.approx(0.84)
    assert [(one.labels["alertname"], one.severity) for one in health.conditions] == [
        ("GmpoRatioSpread", "warning"),
        ("GmpoPolicyJump", "warning"),
        ("GmpoAnomaly", "critical"),
    ]
    assert health.conditions[-1].annotations["summary"].startswith("severity 0.84 of ")


def effective(*fractions: float) -> list[dict[str, Any]]:
    """Rounds of these fractions, each five times, so that the median is theirs at the end."""
    rounds = [fraction for fraction in fractions for _ in range(5)]
    return [
        round_line(number, **{"ratio/effective_sample_fraction": fraction})
        for number, fraction in enumerate(rounds, start=1)
    ]


# 0.6 (0.8 - fraction) / 0.3: 0.38 at 0.61, 0.42 at 0.59, 0.32 at 0.64, 0.28 at 0.66
@pytest.mark.parametrize(
    ("fractions", "told"),
    [
        ((0.61,), False),
        ((0.59,), True),
        # A level that was entered is left below 0.3 alone, and entered again from 0.4.
        ((0.59, 0.61, 0.59, 0.61), True),
        ((0.59, 0.64), True),
        ((0.59, 0.66), False),
        ((0.59, 0.66, 0.61), False),
    ],
)
def test_a_run_near_a_bound_keeps_the_level_that_holds(
    tmp_path: Path, fractions: tuple[float, ...], told: bool
):
    health = run_health(run_folder(tmp_path / "run", effective(*fractions), []))
    assert health.report.level == ("warning" if told else "ok")
    found = [one.labels["alertname"] for one in health.conditions]
    assert found == (["GmpoRatioSpread"] if told else [])


def test_a_level_that_was_critical_is_left_below_its_own_bound(tmp_path: Path):
    # Two alike, 1 - (1 - 0.6 score)^2: 0.75 at 5/6, 0.64 at 2/3, 0.51 at 1/2.
    def lines(*scores: float) -> list[dict[str, Any]]:
        found = []
        for score in scores:
            fraction, divergence = 0.8 - 0.3 * score, 0.1 + 0.4 * score
            figures = {"ratio/effective_sample_fraction": fraction, "kl_old/k1": divergence}
            found.extend(round_line(len(found) + n, **figures) for n in range(1, 6))
        return found

    def level(*scores: float) -> str:
        return run_health(run_folder(tmp_path / "run", lines(*scores), [])).report.level

    assert level(2 / 3) == "warning"
    assert level(5 / 6) == "critical"
    assert level(5 / 6, 2 / 3) == "critical"
    assert level(5 / 6, 2 / 3, 1 / 2) == "warning"


def test_an_alarm_written_in_events_is_in_the_level_of_its_rounds(tmp_path: Path):
    # 0.38 by themselves; with the step left out of round 6, 1 - 0.62 0.7 = 0.57.
    lines = effective(0.61, 0.61)
    told = [event("gradient_spike", 6, taken="skip_step")]
    assert run_health(run_folder(tmp_path / "run", lines[:6], told)).report.level == "warning"
    assert run_health(run_folder(tmp_path / "run", lines, told)).report.level == "warning"
    assert run_health(run_folder(tmp_path / "run", lines, [])).report.level == "ok"
