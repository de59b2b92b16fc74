"""A run's files: lines written and read, half lines, figures that do not exist, full disks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from tests.disks import as_another_user, fill, small_disk

from gmpo.errors import DataError, RunFolderError
from gmpo.tracking import METRICS, RunFolder, builds_of, provenance, read_lines


def rounds(run: RunFolder) -> list[int]:
    return [line["round"] for line in read_lines(run.path, "metrics.jsonl")]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "deep" / "run")


def test_the_folder_is_made_with_its_parents_and_left_empty(run: RunFolder):
    assert run.path.is_dir()
    assert list(run.path.iterdir()) == []
    assert run.checkpoints == run.path / "checkpoints"


def test_metrics_are_one_object_a_line_with_their_kind_and_position(run: RunFolder):
    run.log_metrics("step", {"update/loss": 0.5}, round=1, step=1)
    run.log_metrics("round", {"rollout/reward": 0.25}, round=1, step=4)
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"kind": "step", "round": 1, "step": 1, "update/loss": 0.5},
        {"kind": "round", "round": 1, "step": 4, "rollout/reward": 0.25},
    ]
    assert list(read_lines(run.path, "metrics.jsonl")) == [json.loads(line) for line in lines]


def test_numbers_are_read_back_exactly(run: RunFolder):
    value = 0.1 + 0.2
    run.log_metrics("step", {"update/loss": value}, round=1, step=1)
    (line,) = read_lines(run.path, "metrics.jsonl")
    assert line["update/loss"] == value


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_figure_that_does_not_exist_is_null(value: float, run: RunFolder):
    run.log_metrics("round", {"rollout/reward": value}, round=1, step=1)
    assert '"rollout/reward": null' in (run.path / "metrics.jsonl").read_text()


def test_a_metric_without_documentation_is_our_own_mistake(run: RunFolder):
    with pytest.raises(AssertionError, match=r"\['rollout/rewrd'\] are not documented"):
        run.log_metrics("round", {"rollout/rewrd": 1.0}, round=1, step=1)
    assert not (run.path / "metrics.jsonl").exists()


def test_components_of_the_reward_are_metrics(run: RunFolder):
    run.log_metrics("round", {"rollout/reward/format": 1.0}, round=1, step=1)
    assert rounds(run) == [1]


def test_every_metric_has_a_stage_and_a_meaning():
    assert all(name.count("/") == 1 and METRICS[name] for name in METRICS)


def test_a_file_that_is_not_there_has_no_lines(run: RunFolder):
    assert list(read_lines(run.path, "rollouts.jsonl")) == []


def test_half_a_last_line_is_ignored(run: RunFolder):
    run.log_metrics("round", {"rollout/reward": 0.5}, round=1, step=4)
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "round", "round": 2, "st')
    assert rounds(run) == [1]


def test_a_damaged_line_in_the_middle_is_named(run: RunFolder):
    (run.path / "metrics.jsonl").write_text('{"round": 1}\n{"rou\n{"round": 3}\n')
    with pytest.raises(DataError, match=r"line 2 of .*metrics\.jsonl is damaged"):
        rounds(run)


def test_a_text_with_any_character_is_read_back(run: RunFolder):
    text = "line\nfeed \u2028 nul \x00 half a pair \ud800 \U0001f600"
    run.log_record("rollouts.jsonl", {"round": 1, "text": text})
    (line,) = read_lines(run.path, "rollouts.jsonl")
    assert line["text"] == text


def test_lines_of_later_rounds_and_half_lines_are_forgotten(run: RunFolder):
    for number in (1, 2, 3):
        run.log_metrics("round", {"rollout/reward": 0.5}, round=number, step=4 * number)
        run.log_record("rollouts.jsonl", {"round": number, "group": 0})
        run.log_record("evaluations.jsonl", {"round": number, "stage": "during"})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "rou')
    run.forget_after(2)
    for name in ("metrics.jsonl", "rollouts.jsonl", "evaluations.jsonl"):
        text = (run.path / name).read_text()
        assert [json.loads(line)["round"] for line in text.splitlines()] == [1, 2], name
    run.log_metrics("round", {"rollout/reward": 0.5}, round=3, step=12)
    assert rounds(run) == [1, 2, 3]


def test_forgetting_makes_no_file_that_was_not_there(run: RunFolder):
    run.forget_after(2)
    assert list(run.path.iterdir()) == []


def test_a_folder_of_another_user_is_refused_with_path_and_cause(tmp_path: Path):
    (tmp_path / "theirs").mkdir(mode=0o555)
    with as_another_user(), pytest.raises(RunFolderError) as caught:
        RunFolder(tmp_path / "theirs" / "run")
    assert str(caught.value) == (
        f"run folder {tmp_path / 'theirs' / 'run'} cannot be written: Permission denied; "
        "choose another with --run, or free space and permissions"
    )


def test_a_file_in_the_way_is_refused(tmp_path: Path):
    (tmp_path / "run").write_text("")
    with pytest.raises(RunFolderError, match=r"run cannot be written: File exists"):
        RunFolder(tmp_path / "run")


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path: Path):
    with small_disk(tmp_path / "disk", kilobytes=64) as disk:
        fill(disk)
        with pytest.raises(RunFolderError, match="cannot be written: No space left on device"):
            RunFolder(disk / "run")


def test_a_disk_that_fills_up_keeps_the_lines_before(tmp_path: Path):
    with small_disk(tmp_path / "disk", kilobytes=64) as disk:
        run = RunFolder(disk / "run")
        run.log_record("rollouts.jsonl", {"round": 1})
        fill(disk)
        with pytest.raises(RunFolderError) as caught:
            run.log_record("rollouts.jsonl", {"round": 2, "text": "x" * 10_000})
        assert "No space left on device; free space, then continue with --resume" in str(
            caught.value
        )
        assert [line["round"] for line in read_lines(run.path, "rollouts.jsonl")] == [1]


def test_forgetting_on_a_full_disk_loses_nothing(tmp_path: Path):
    with small_disk(tmp_path / "disk", kilobytes=64) as disk:
        run = RunFolder(disk / "run")
        for number in (1, 2, 3):
            run.log_record("rollouts.jsonl", {"round": number, "text": "x" * 5_000})
        fill(disk)
        with pytest.raises(RunFolderError, match="No space left on device"):
            run.forget_after(2)
        kept = [line["round"] for line in read_lines(run.path, "rollouts.jsonl")]
        assert kept == [1, 2, 3]


def test_the_versions_behind_a_result_are_known():
    found = provenance()
    assert {"gmpo", "torch", "transformers", "numpy", "python", "machine", "commit"} <= set(found)
    assert all(found[name] for name in found if name != "commit")


def test_the_builds_of_runs_are_each_told_once(tmp_path: Path):
    made = [("0.1.0", "abc"), ("0.1.0", None), ("0.1.0", "abc"), ("0.2.0", "abc")]
    runs = [tmp_path / str(number) for number in range(len(made) + 1)]
    for run, (version, commit) in zip(runs[1:], made, strict=True):
        run.mkdir()
        made_with = {"gmpo": version, "torch": "2", "commit": commit}
        (run / "run.json").write_text(json.dumps(made_with))
    assert builds_of(runs) == (  # the first folder is not there: nothing was trained in it
        {"gmpo": "0.1.0", "commit": "abc"},
        {"gmpo": "0.1.0", "commit": None},
        {"gmpo": "0.2.0", "commit": "abc"},
    )
    (runs[1] / "run.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"run\.json cannot be read"):
        builds_of(runs)


def test_a_second_user_of_the_folder_is_refused(run: RunFolder):
    with run.locked():
        with pytest.raises(RunFolderError) as caught, RunFolder(run.path).locked():
            pass
        assert str(caught.value) == (
            f"run folder {run.path} is being trained in by another process; wait for it, stop it, "
            "or choose another folder with --run"
        )
    with RunFolder(run.path).locked():
        pass


def test_an_error_before_anything_was_written_takes_away_the_folders_that_were_made(
    run: RunFolder, tmp_path: Path
):
    with pytest.raises(ValueError, match="refused"), run.locked():
        raise ValueError("refused")
    assert list(tmp_path.iterdir()) == []
    there = tmp_path / "mine"
    there.mkdir()
    with pytest.raises(ValueError, match="refused"), RunFolder(there / "run").locked():
        raise ValueError("refused")
    with pytest.raises(ValueError, match="refused"), RunFolder(there).locked():
        raise ValueError("refused")
    assert list(tmp_path.rglob("*")) == [there]
    begun = RunFolder(there / "run")
    with pytest.raises(ValueError, match="refused"), begun.locked():
        begun.write_text("recipe.toml", "")
        raise ValueError("refused")
    assert (there / "run" / "recipe.toml").exists()


def test_a_lock_leaves_nothing_where_nothing_was_written(run: RunFolder):
    with run.locked():
        assert [path.name for path in run.path.iterdir()] == [".lock"]
    assert list(run.path.iterdir()) == []
    with run.locked():
        run.write_text("recipe.toml", "")
    assert {path.name for path in run.path.iterdir()} == {"recipe.toml", ".lock"}
