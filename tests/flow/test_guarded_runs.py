"""Runs that the guard watches: what it finds is written, told, counted and, if asked, acted on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.commands import process
from tests.killed_runs import Death, run_in_process
from tests.tiny_runs import metric_lines, same_weights, tiny_recipe, write_recipe

from gmpo.checkpoint import latest_checkpoint
from gmpo.config import RunConfig
from gmpo.errors import GuardStopped
from gmpo.inspection import summarize_run
from gmpo.tracking import read_lines
from gmpo.training import train


def dead(model: str, **changes: Any) -> RunConfig:
    """No completion earns anything: an alarm in round 10, and no weight ever moves."""
    table = {"reward__format_pattern": "never", "training__rounds": 12}
    return tiny_recipe(model, **{**table, "checkpoint": {"every_rounds": 4}, **changes})


def exploding(model: str, **changes: Any) -> RunConfig:
    """Steps so large that token ratios leave each other within a round."""
    table = {"training__rounds": 4, "training__learning_rate": 0.3}
    return tiny_recipe(model, **{**table, **changes})


def events(folder: Path) -> list[dict[str, Any]]:
    return list(read_lines(folder, "events.jsonl"))


def test_an_alarm_is_written_told_and_counted(model: str, tmp_path: Path):
    told: list[str] = []
    train(dead(model), folder=tmp_path, warn=told.append)
    (event,) = events(tmp_path)
    groups = {"metric": "rollout/dead_groups", "value": 8.0, "baseline": None, "threshold": 0.9}
    where = {"alarm": "dead_groups", "severity": "warning", "round": 10, "onset": 1}
    assert where.items() | groups.items() <= event.items()
    assert "sampling.group_size" in event["recommended_action"]
    (said,) = [sentence for sentence in told if sentence.startswith("guard: ")]
    assert said.startswith("guard: dead_groups in round 10, since about round 1 (rollout/dead_")
    assert summarize_run(tmp_path).alarms == {"dead_groups": 1}
    shown = process("inspect", tmp_path)
    assert shown.returncode == 0
    assert "alarms of the guard" in shown.stdout
    assert "1 (dead_groups 1)" in shown.stdout


def test_off_judges_nothing(model: str, tmp_path: Path):
    train(dead(model, guard={"mode": "off"}), folder=tmp_path, warn=lambda _: None)
    assert events(tmp_path) == []
    assert summarize_run(tmp_path).alarms == {}


def test_a_killed_run_has_the_events_of_one_that_was_not(model: str, tmp_path: Path):
    """The alarm needs what the guard remembers from before the checkpoint of round 8."""
    config = dead(model)
    whole = run_in_process(config, tmp_path / "whole")
    assert whole.exit_code == 0
    expected = events(tmp_path / "whole")
    assert [event["round"] for event in expected] == [10]
    for share in (0.7, 0.9):
        folder = tmp_path / f"killed-{share}"
        killed = run_in_process(config, folder, Death(touches=int(whole.touches * share)))
        assert killed.exit_code != 0
        assert run_in_process(config, folder).exit_code == 0
        assert events(folder) == expected


def test_stop_saves_the_round_and_says_how_to_go_on(model: str, tmp_path: Path):
    warned, stopped = tmp_path / "warned", tmp_path / "stopped"
    train(exploding(model), folder=warned, warn=lambda _: None)
    first = events(warned)[0]
    assert first["severity"] == "critical"
    assert first["round"] < 4
    config = exploding(model, guard={"mode": "stop"})
    with pytest.raises(GuardStopped) as caught:
        train(config, folder=stopped, warn=lambda _: None)
    said = str(caught.value)
    assert f"after round {first['round']} of 4, which is saved: {first['alarm']} in" in said
    assert said.endswith(f"to go on as it is: gmpo train --run {stopped} --resume")
    assert latest_checkpoint(stopped / "checkpoints").name == f"round-{first['round']:06d}"
    assert len(metric_lines(stopped, "round")) == first["round"]
    assert events(stopped)[0]["taken"] == "stop"
    # The mode decides no weight, so it may be changed when the run goes on.
    train(exploding(model), folder=stopped, resume=True, warn=lambda _: None)
    assert [event | {"taken": "warn"} for event in events(stopped)] == events(warned)
    assert same_weights(*(latest_checkpoint(each / "checkpoints") for each in (stopped, warned)))


def test_stop_lets_a_run_with_a_mere_warning_finish(model: str, tmp_path: Path):
    train(dead(model, guard={"mode": "stop"}), folder=tmp_path, warn=lambda _: None)
    assert [event["severity"] for event in events(tmp_path)] == ["warning"]
    assert len(metric_lines(tmp_path, "round")) == 12


def test_the_command_ends_with_the_alarm_in_one_line(model: str, tmp_path: Path):
    recipe = write_recipe(tmp_path / "recipe.toml", exploding(model, guard={"mode": "stop"}))
    ended = process("train", recipe, "--run", tmp_path / "run")
    assert ended.returncode == 3
    assert "the guard stopped the run after round" in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr
