"""Studies by the command: the same numbers whatever happens on the way, and nothing run twice."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.commands import gmpo, process, refusal
from tests.forks import ForkedProcess, forked_gmpo
from tests.studies import outcomes
from tests.tiny_runs import metric_lines, tiny_recipe, write_recipe

from gmpo.study import open_study, run_study
from gmpo.study.report import build_report
from gmpo.tracking import read_lines

pytestmark = pytest.mark.usefixtures("forked")

CELLS = ["grpo-seed0", "gmpo-seed0", "grpo-seed1", "gmpo-seed1"]


@pytest.fixture(scope="module")
def small(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A recipe of 4 rounds with a checkpoint each, whose reward function can end its process."""
    recipe = tiny_recipe(
        model,
        training__rounds=4,
        checkpoint={"every_rounds": 1},
        reward={
            "weights": {"mine": 1.0},
            "functions": {"mine": "tests.studies:starts_with_a_digit_or_letter"},
        },
    )
    return write_recipe(tmp_path_factory.mktemp("small") / "small.toml", recipe)


@pytest.fixture(scope="module")
def whole(small: str, forked: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that nothing disturbed."""
    study = tmp_path_factory.mktemp("studies") / "whole"
    done = gmpo("compare", small, "--seeds", "0,1", "--study", study)
    assert done.exit_code == 0, done.stderr
    assert f"report.html  {study}" in done.stdout
    return study


@pytest.fixture
def unfinished(whole: Path, tmp_path: Path) -> Path:
    """The same study without its last run."""
    study = tmp_path / "unfinished"
    shutil.copytree(whole, study)
    lines = (study / "attempts.jsonl").read_text().splitlines(keepends=True)
    assert "gmpo-seed1" in lines[-1]
    (study / "attempts.jsonl").write_text("".join(lines[:-1]))
    shutil.rmtree(study / "runs" / "gmpo-seed1")
    return study


def deaths(folder: Path, *, cell: str, call: int, times: int) -> str:
    """The variable by which a cell's processes kill themselves so many times."""
    folder.mkdir()
    return json.dumps({"cell": cell, "call": call, "times": times, "folder": str(folder)})


def report_in(study: Path) -> dict[str, Any]:
    return json.loads((study / "report.json").read_text())


def test_every_cell_is_an_ordinary_run_of_its_own(whole: Path):
    assert outcomes(whole) == [(cell, "finished") for cell in CELLS]
    for cell in CELLS:
        shown = gmpo("inspect", whole / "runs" / cell, "--no-plots", "--json")
        summary = json.loads(shown.stdout)
        assert (summary["objective"], summary["rounds_done"]) == (cell[:4], 4)
        assert not (whole / "runs" / cell / "checkpoints").exists()
    report = report_in(whole)
    assert [arm["runs"] for arm in report["arms"]] == [2, 2]
    assert len(report["improvements"]) == 4
    made_with = json.loads((whole / "study.json").read_text())["made_with"]
    assert report["made_with"] == [{key: made_with[key] for key in ("gmpo", "commit")}]
    assert made_with["gmpo"] in (whole / "report.html").read_text()
    for picture in ("curves.png", "improvements.png"):
        assert (whole / "plots" / picture).read_bytes().startswith(b"\x89PNG")


def test_the_kl_to_the_start_is_measured_once_in_every_run(whole: Path):
    for run in report_in(whole)["runs"]:
        lines = metric_lines(whole / "runs" / f"{run['arm']}-seed{run['seed']}", "round")
        found = {line["round"]: line["kl_ref/k3"] for line in lines if "kl_ref/k3" in line}
        assert found == {4: run["figures"]["values"]["kl_to_start"]}
        assert found[4] > 1e-6
    assert "KL to the start was not measured" not in (whole / "report.html").read_text()


def test_runs_of_a_seed_ask_the_same_prompts_and_begin_alike(whole: Path):
    asked = {
        cell: [
            (group["round"], group["prompt_id"])
            for group in read_lines(whole / "runs" / cell, "rollouts.jsonl")
        ]
        for cell in CELLS
    }
    assert asked["grpo-seed0"] == asked["gmpo-seed0"] != asked["grpo-seed1"]
    assert len(asked["grpo-seed0"]) == 4 * 8
    first = {cell: metric_lines(whole / "runs" / cell, "round")[0] for cell in CELLS}
    assert first["grpo-seed0"]["rollout/entropy"] == first["gmpo-seed0"]["rollout/entropy"]
    report = report_in(whole)
    assert report["same_prompts"]
    assert report["same_start"]


def test_runs_that_are_no_pairs_are_noticed(unfinished: Path):
    plan = open_study(unfinished, None, warn=print)
    file = unfinished / "runs" / "gmpo-seed0" / "rollouts.jsonl"
    lines = file.read_text().splitlines()
    groups = [json.loads(line) for line in lines]
    groups[0]["rollouts"][0]["text"] = "something else"
    file.write_text("".join(json.dumps(group) + "\n" for group in groups))
    report = build_report(unfinished, plan)
    assert (report.same_prompts, report.same_start) == (True, False)
    groups[-1]["prompt_id"] = "another"
    file.write_text("".join(json.dumps(group) + "\n" for group in groups))
    assert build_report(unfinished, plan).same_prompts is False


def test_pairs_that_kept_no_rollouts_are_not_said_to_be_checked(unfinished: Path):
    plan = open_study(unfinished, None, warn=print)
    (unfinished / "runs" / "gmpo-seed0" / "rollouts.jsonl").unlink()
    report = build_report(unfinished, plan)
    assert (report.same_prompts, report.same_start) == (None, None)
    assert report.as_dict()["same_prompts"] is None


def test_whoever_asks_for_weights_that_the_study_dropped_is_told_how_to_keep_them(whole: Path):
    run = whole / "runs" / "gmpo-seed0"
    said = refusal("evaluate", str(run))
    assert f"run {run} has no weights any more: a study drops" in said
    assert "gmpo compare --keep-checkpoints" in said


def test_a_study_whose_worker_is_killed_and_which_is_stopped_gives_the_same_numbers(
    whole: Path, small: str, tmp_path: Path
):
    study = tmp_path / "disturbed"
    words = ["compare", small, "--seeds", "0,1", "--study", study, "--jobs", "2"]
    plan = deaths(tmp_path / "deaths", cell="gmpo-seed0", call=3, times=1)
    environment = {**os.environ, "GMPO_TEST_DEATHS": plan}
    first = forked_gmpo(*words, env=environment, forks_too=True)
    # Stopped in the midst of the second seed's runs.
    _wait_for(study / "runs" / "grpo-seed1" / "metrics.jsonl", first)
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=300)
    assert first.returncode == 130, said
    assert f"go on with: gmpo compare --study {study}" in " ".join(said.split())
    second = process(*words, env=environment, forks_too=True)
    assert second.returncode == 0, second.stderr
    ends = outcomes(study)
    assert ends.count(("gmpo-seed0", "died")) == 1
    assert sorted(cell for cell, outcome in ends if outcome == "finished") == sorted(CELLS)
    assert len(list((tmp_path / "deaths").iterdir())) == 1
    assert report_in(study) == report_in(whole)


def _wait_for(file: Path, process: ForkedProcess) -> None:
    deadline = time.monotonic() + 300
    while not file.exists():
        assert process.poll() is None, "the study ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_finished_run_is_never_run_again(whole: Path):
    before = {file: file.stat().st_mtime_ns for file in whole.glob("runs/*/metrics.jsonl")}
    attempts = (whole / "attempts.jsonl").read_bytes()
    report = (whole / "report.json").read_bytes()
    again = gmpo("compare", "--study", whole, "--json")
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout) == json.loads(report)
    assert "4 of 4 runs are done already" in again.stderr
    assert (whole / "attempts.jsonl").read_bytes() == attempts
    assert (whole / "report.json").read_bytes() == report
    after = {file: file.stat().st_mtime_ns for file in whole.glob("runs/*/metrics.jsonl")}
    assert (len(after), after) == (4, before)


def test_seeds_that_are_added_are_the_only_runs_that_are_made(
    whole: Path, unfinished: Path, small: str
):
    # As a call leaves it that is killed between the new plan and its first run.
    own = open_study(unfinished, None, warn=print)
    open_study(unfinished, replace(own, seeds=(0, 1, 7)), warn=print)
    before = {file: file.read_bytes() for file in unfinished.glob("runs/*/metrics.jsonl")}
    added = gmpo("compare", "--study", unfinished, "--seeds", "0,1,7")
    assert added.exit_code == 0, added.stderr
    assert "3 seeds each (2 at first)" in added.stdout
    assert "3 of 6 runs are done already" in added.stdout
    assert "Seeds were added after runs had begun: 2 at first, now 3." in squeezed(added.stdout)
    new = ["gmpo-seed1", "grpo-seed7", "gmpo-seed7"]
    assert [cell for cell, _ in outcomes(unfinished)[3:]] == new
    assert all(file.read_bytes() == text for file, text in before.items())
    report = report_in(unfinished)
    assert report["plan"]["num_seeds_before"] == [2]
    assert report["plan"]["seeds"] == [0, 1, 7]
    # But for rounds to a target that all runs decide, the first seeds' figures are what they were.
    for then, now in zip(report_in(whole)["runs"], report["runs"], strict=False):
        for run in (then, now):
            del run["figures"]["values"]["rounds_to_target"]
        assert now == then
    # A recipe that is named without seeds means those of the study.
    again = gmpo("compare", small, "--study", unfinished)
    assert again.exit_code == 0, again.stderr
    assert "6 of 6 runs are done already" in again.stdout


def squeezed(text: str) -> str:
    """Without line breaks and indents."""
    return " ".join(text.split())


def test_objectives_and_seeds_are_never_ignored(whole: Path, small: str):
    plan = (whole / "study.json").read_bytes()
    there = ("compare", "--study", whole)
    other = refusal(*there, "--objectives", "grpo,gspo")
    assert "objectives: ['grpo', 'gmpo'] there, ['grpo', 'gspo'] here" in other
    assert "['grpo', 'gmpo=gspo'] here" in refusal(*there, "--objectives", "grpo,gmpo=gspo")
    assert "seeds: [0, 1] there, [0, 2] here" in refusal(*there, "--seeds", "0,2")
    assert "seeds [0, 1, 1] name one twice" in refusal(*there, "--seeds", "0,1,1")
    fewer = refusal("compare", small, "--seeds", "1,2", "--study", whole)
    assert "seeds: [0, 1] there, [1, 2] here" in fewer
    with (whole / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "is being run by another process" in refusal(*there, "--seeds", "0,1,2")
    assert "holds no study" in refusal("compare", "--study", whole / "no", "--seeds", "0,1")
    assert (whole / "study.json").read_bytes() == plan
    own = gmpo(*there, "--objectives", "grpo, gmpo=gmpo", "--seeds", "0,1")
    assert own.exit_code == 0, own.stderr
    assert (whole / "study.json").read_bytes() == plan


def test_a_cell_that_dies_three_times_is_given_up_and_tried_again_by_the_next_call(
    whole: Path, unfinished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plan = deaths(tmp_path / "deaths", cell="gmpo-seed1", call=1, times=3)
    monkeypatch.setenv("GMPO_TEST_DEATHS", plan)
    first = gmpo("compare", "--study", unfinished)
    assert first.exit_code == 1, first.stderr
    assert "died (SIGKILL)" in first.stdout
    killed = [a for a in read_lines(unfinished, "attempts.jsonl") if a["outcome"] == "died"]
    assert all(a["message"].startswith("killed by SIGKILL; before that: ") for a in killed)
    assert "not run to an end: gmpo-seed1" in first.stderr
    assert outcomes(unfinished)[3:] == [("gmpo-seed1", "died")] * 3
    assert report_in(unfinished)["missing"] == ["gmpo, seed 1"]
    second = gmpo("compare", "--study", unfinished)
    assert second.exit_code == 0, second.stderr
    assert report_in(unfinished) == report_in(whole)


def test_a_run_that_an_earlier_call_left_is_waited_for(unfinished: Path):
    run = unfinished / "runs" / "gmpo-seed1"
    run.mkdir()
    lock = (run / ".lock").open("a")
    fcntl.flock(lock, fcntl.LOCK_EX)
    said: list[str] = []

    def say(sentence: str) -> None:
        said.append(sentence)
        if "still trained by an earlier call" in sentence:
            assert outcomes(unfinished)[3:] == []
            lock.close()

    plan = open_study(unfinished, None, warn=print)
    assert run_study(unfinished, plan, say=say) == []
    assert "gmpo-seed1 is still trained by an earlier call; waiting for it" in said
    assert outcomes(unfinished)[3:] == [("gmpo-seed1", "finished")]


def test_a_run_of_which_nothing_comes_is_not_waited_for_without_end(whole: Path, unfinished: Path):
    shutil.rmtree(unfinished / "runs" / "grpo-seed1")
    lines = (unfinished / "attempts.jsonl").read_text().splitlines(keepends=True)
    (unfinished / "attempts.jsonl").write_text("".join(lines[:2]))
    run = unfinished / "runs" / "gmpo-seed1"
    run.mkdir()
    with (run / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        given_up = gmpo("compare", "--study", unfinished, "--wait", "0.01")
    assert given_up.exit_code == 4, given_up.stderr
    # The run that nobody holds comes first.
    assert outcomes(unfinished)[2:] == [("grpo-seed1", "finished")]
    assert "waiting for other calls: run gmpo-seed1 (of a process that" in given_up.stdout
    assert given_up.stderr.startswith("gave up waiting: not over in other calls: run gmpo-seed1")
    assert f"go on with: gmpo compare --study {unfinished}" in given_up.stderr
    again = gmpo("compare", "--study", unfinished, "--wait", "0")
    assert again.exit_code == 0, again.stderr
    assert report_in(unfinished) == report_in(whole)


def test_a_run_that_diverges_is_a_result(small: str, tmp_path: Path):
    study = tmp_path / "study"
    done = gmpo(
        *("compare", small, "--seeds", "0,1", "--study", study, "--jobs", "2", "--json"),
        *("--set", "training.rounds=2", "--set-for", "gmpo:training.learning_rate=1e30"),
    )
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert [arm["crashes"] for arm in report["arms"]] == [0, 2]
    assert set(outcomes(study)) == {
        ("grpo-seed0", "finished"),
        ("grpo-seed1", "finished"),
        ("gmpo-seed0", "diverged"),
        ("gmpo-seed1", "diverged"),
    }
    crashes = next(c for c in report["comparisons"] if c["figure"] == "crashes")
    assert (crashes["effect"], crashes["p_value"]) == (1.0, 0.5)
    assert crashes["verdict"] == "no difference seen"  # two pairs cannot say more
    others = [c for c in report["comparisons"] if c["figure"] != "crashes"]
    assert {(c["pairs"], c["left_out"], c["verdict"]) for c in others} == {(0, 2, "not measured")}
    page = (study / "report.html").read_text()
    assert "2 runs crashed" in page


def test_a_run_that_refuses_to_train_ends_the_study_with_its_reason(small: str, tmp_path: Path):
    study = tmp_path / "study"
    told = refusal(
        *("compare", small, "--seeds", "0,1", "--study", study),
        *("--set", "model.name=/no/such/model", "--set", "model.dtype=fp32"),
    )
    assert "run grpo-seed0 cannot be trained" in told
    assert "/no/such/model" in told
    assert str(study / "logs" / "grpo-seed0.log") in told
    assert outcomes(study) == [("grpo-seed0", "refused")]


def test_a_study_that_another_process_runs_is_refused(whole: Path):
    with (whole / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "is being run by another process" in refusal("compare", "--study", whole)


def test_what_cannot_be_compared_is_refused_by_the_command(whole: Path, small: str):
    assert "needs 2 to 40 seeds, got 1" in refusal("compare", small, "--seeds", "0")
    assert "name a recipe" in refusal("compare")
    assert "--wait -1 must be minutes from 0 on" in refusal("compare", small, "--wait", "-1")
    assert "has its own plan" in refusal("compare", "--study", whole, "--quick")
    told = refusal(
        *("compare", small, "--seeds", "0,1", "--study", whole),
        *("--set", "training.learning_rate=0.1"),
    )
    assert "is of another study; grpo: training.learning_rate: 0.001 there, 0.1 here" in told
    assert "gmpo: training.learning_rate: 0.001 there, 0.1 here" in told
    in_the_way = refusal("compare", small, "--seeds", "0,1", "--study", small)
    assert in_the_way.startswith(f"study folder {small} cannot be written: File exists; choose")
    assert "with --study" in in_the_way
