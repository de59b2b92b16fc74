"""Runs whose settings follow them: what they train with, log and tell, and none lost by a kill."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tests.commands import gmpo
from tests.killed_runs import Death, digest, run_in_process
from tests.tiny_runs import COMMON_START, metric_lines, tiny_recipe, write_recipe

from gmpo.checkpoint import latest_checkpoint
from gmpo.config import RunConfig
from gmpo.errors import RunStopped
from gmpo.inspection import summarize_run
from gmpo.tracking import read_lines
from gmpo.training import Report, train

ROUNDS = 9
MOVING = ("adaptive/clip_low", "adaptive/clip_high", "adaptive/reward_floor")


def adaptive(model: str, **changes: Any) -> RunConfig:
    """Steps so large that a clip of 0.1 cuts more than it should from the first round on."""
    table = {
        "training__rounds": ROUNDS,
        "training__learning_rate": 3e-3,
        "objective": {"clip_low": 0.1, "clip_high": 0.1},
        "reward": {
            "weights": {"format": 1.0},
            "format_pattern": COMMON_START,
            "combine": "geometric",
            "floor": 0.1,
        },
        "checkpoint": {"every_rounds": 4},
        "adaptive": {
            "clip": True,
            "clip_average_rounds": 3,
            "learning_rate": True,
            "warm_up_rounds": 5,
            "reward_floor_end": 0.001,
        },
    }
    return tiny_recipe(model, **{**table, **changes})


def events(folder: Path) -> list[dict[str, Any]]:
    lines = read_lines(folder, "events.jsonl")
    return [line for line in lines if line.get("kind") == "adaptation"]


def settings(folder: Path) -> list[dict[str, float]]:
    return [
        {name: line[name] for name in line if name.startswith("adaptive/")}
        for line in metric_lines(folder, "round")
    ]


@pytest.fixture(scope="module")
def straight(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adaptive") / "run"
    ended = run_in_process(adaptive(model), folder)
    assert ended.exit_code == 0
    (folder.parent / "touches").write_text(str(ended.touches))
    return folder


def test_each_round_logs_what_it_ran_with_and_each_change_is_an_event(straight: Path):
    rounds = settings(straight)
    assert len(rounds) == ROUNDS
    assert rounds[0]["adaptive/clip_low"] == 0.1
    assert rounds[-1]["adaptive/clip_low"] > 0.1
    told = {(event["setting"], event["round"]): event for event in events(straight)}
    for number in range(1, ROUNDS):
        for name in (*MOVING, "adaptive/learning_rate_factor"):
            before, after = rounds[number - 1][name], rounds[number][name]
            change = told.pop((name, number), None)
            assert (change is not None) == (before != after)
            if change is not None:
                assert (change["before"], change["after"]) == (before, after)
    assert not told
    counted = summarize_run(straight).adaptations
    assert sum(counted.values()) == len(events(straight))
    assert counted["adaptive/reward_floor"] == ROUNDS - 1


def test_a_change_of_the_clip_has_its_evidence(straight: Path):
    (first, *_) = [each for each in events(straight) if each["setting"] == "adaptive/clip_high"]
    assert first["metric"] == "clip/high_fraction"
    assert (first["low"], first["high"]) == (0.005, 0.02)
    assert first["value"] > 0.02
    assert first["round"] == 6  # five measured rounds of warm-up come first


def test_the_floor_falls_to_its_end_and_the_reward_at_the_first_floor_is_logged(straight: Path):
    floors = [line["adaptive/reward_floor"] for line in settings(straight)]
    assert floors == pytest.approx([0.1 * 0.01 ** (k / (ROUNDS - 1)) for k in range(ROUNDS)])
    for line in metric_lines(straight, "round"):
        # One component of 0 and 1 is its floor or 1, by any floor; so one mean gives the other.
        share = (line["adaptive/reward_at_first_floor"] - 0.1) / 0.9
        floor = line["adaptive/reward_floor"]
        assert line["rollout/reward"] == pytest.approx(floor + (1 - floor) * share)


def test_the_step_size_of_every_step_is_the_schedules_times_the_factor(straight: Path):
    factors = [line["adaptive/learning_rate_factor"] for line in settings(straight)]
    for line in metric_lines(straight, "step"):
        assert line["update/learning_rate"] == pytest.approx(3e-3 * factors[line["round"] - 1])


def same_run(left: Path, right: Path) -> bool:
    ends = [latest_checkpoint(folder / "checkpoints") for folder in (left, right)]
    return (
        digest(ends[0]) == digest(ends[1])
        and settings(left) == settings(right)
        and events(left) == events(right)
    )


def test_a_run_that_was_stopped_and_resumed_is_the_one_that_was_not(
    model: str, straight: Path, tmp_path: Path
):
    done: list[int] = []

    def note(report: Report) -> None:
        done.append(report.round)

    with pytest.raises(RunStopped):
        train(
            adaptive(model),
            folder=tmp_path,
            report=note,
            warn=lambda _: None,
            should_stop=lambda: bool(done) and done[-1] == 7,
        )
    train(adaptive(model), folder=tmp_path, resume=True, warn=lambda _: None)
    assert same_run(tmp_path, straight)


def test_a_run_that_was_killed_between_checkpoints_is_the_one_that_was_not(
    model: str, straight: Path, tmp_path: Path
):
    touches = int((straight.parent / "touches").read_text())
    assert run_in_process(adaptive(model), tmp_path, Death(touches=touches * 3 // 4)).exit_code
    assert run_in_process(adaptive(model), tmp_path).exit_code == 0
    assert same_run(tmp_path, straight)


def test_a_clip_in_reach_changes_what_is_trained(model: str, straight: Path, tmp_path: Path):
    table = {"learning_rate": True, "warm_up_rounds": 5, "reward_floor_end": 0.001}
    train(adaptive(model, adaptive=table), folder=tmp_path, warn=lambda _: None)
    ends = [latest_checkpoint(folder / "checkpoints") for folder in (tmp_path, straight)]
    assert digest(ends[0]) != digest(ends[1])
    assert "adaptive/clip_low" not in settings(tmp_path)[0]


def test_the_dry_run_shows_what_would_adapt(model: str, tmp_path: Path):
    recipe = write_recipe(tmp_path / "adaptive.toml", adaptive(model))
    shown = gmpo("train", recipe, "--dry-run", "--run", str(tmp_path / "run"))
    assert shown.exit_code == 0, shown.stderr
    assert "[adaptive]" in shown.stdout
    assert "# adaptive: clip_low from 0.1 and clip_high from 0.1" in shown.stdout
    assert "# adaptive: reward.floor from 0.1 down to 0.001" in shown.stdout


def test_the_summary_is_json_and_names_the_changes(straight: Path):
    summary = json.loads(json.dumps(summarize_run(straight).as_dict()))
    assert summary["adaptations"]["adaptive/clip_low"] >= 1
    assert math.isfinite(sum(summary["adaptations"].values()))
