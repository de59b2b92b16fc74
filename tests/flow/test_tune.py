"""`gmpo tune` on a tiny model: real trials and deaths, and a comparison on items none has seen."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from tests.commands import gmpo, process, refusal
from tests.forks import ForkedProcess, forked_gmpo
from tests.tiny_runs import metric_lines, tiny_recipe, write_recipe

from gmpo.errors import RunStopped, StillHeld
from gmpo.locks import take_lock
from gmpo.recipe import load_recipe
from gmpo.tracking import read_lines
from gmpo.tuning.plan import TuningOptions, make_tuning_plan, open_tuning
from gmpo.tuning.report import build_tuning_report
from gmpo.tuning.score import Score
from gmpo.tuning.search import Search
from gmpo.tuning.trials import candidates, judge, run_trials

pytestmark = pytest.mark.usefixtures("forked")

SPACE = """
replace = true
[training.learning_rate]
low = 1e-4
high = 1e-2
log = true
[objective.clip_low]
low = 0.1
high = 0.8
"""
OPTIONS = ("--trials", "2", "--seeds", "5,6", "--top", "1", "--no-prune")


@pytest.fixture(scope="module")
def small(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned")
    recipe = tiny_recipe(
        model,
        training__rounds=4,
        task__held_out_items=8,
        checkpoint={"every_rounds": 1},
        evaluation__every_rounds=2,
    )
    write_recipe(folder / "small.toml", recipe)
    (folder / "space.toml").write_text(SPACE)
    return folder


def tune(small: Path, study: Path, *more: str) -> Result:
    return gmpo(
        "tune",
        small / "small.toml",
        "--space",
        small / "space.toml",
        "--study",
        study,
        *OPTIONS,
        *more,
    )


@pytest.fixture(scope="module")
def whole(small: Path, forked: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that nothing disturbed."""
    study = tmp_path_factory.mktemp("studies") / "whole"
    done = tune(small, study)
    assert done.exit_code == 0, done.stderr
    assert "winner.toml" in done.stdout
    return study


def report_in(study: Path) -> dict[str, Any]:
    return json.loads((study / "report.json").read_text())


def test_trials_choose_and_other_items_judge(whole: Path):
    report = report_in(whole)
    assert [trial["outcome"] for trial in report["trials"]] == ["scored"] * 2
    assert report["own"] == 0  # the recipe itself is the first trial
    made_with = json.loads((whole / "tuning.json").read_text())["made_with"]
    assert report["made_with"] == [{key: made_with[key] for key in ("gmpo", "commit")}]
    trials, judged = whole / "trials", whole / "judged" / "runs"
    chosen_on, judged_on = asked_in(trials), asked_in(judged)
    assert len(chosen_on) == len(judged_on) == 4
    assert not chosen_on & judged_on
    assert [arm["number"] for arm in report["judged"]] == [None, 1]
    assert [arm["runs"] for arm in report["judged"]] == [2, 2]
    recipes = [load_recipe(str(run / "recipe.toml"), []) for run in judged.iterdir()]
    assert sorted(recipe.training.seed for recipe in recipes) == [5, 5, 6, 6]


def asked_in(runs: Path) -> set[str]:
    """Names of the held-out items that runs were asked."""
    return {
        name
        for run in runs.iterdir()
        for record in read_lines(run, "evaluations.jsonl")
        for result in record["results"]
        for name in result["outcomes"]
    }


def test_the_winning_recipe_is_one_and_says_why(whole: Path, small: Path):
    report = report_in(whole)
    text = (whole / "winner.toml").read_text()
    assert text.startswith(f"# {report['verdict']}")
    own = load_recipe(str(small / "small.toml"), [])
    made = load_recipe(str(whole / "winner.toml"), [])
    # A random model answers no sum, so that nothing can be better at it.
    assert report["winner"] is None
    assert "No trial beat the recipe" in report["verdict"]
    assert made.training == own.training
    for picture in ("history.png", "importance.png", "front.png"):
        assert (whole / "plots" / picture).read_bytes().startswith(b"\x89PNG")


def test_a_finished_study_is_told_again_without_a_run(whole: Path, tmp_path: Path):
    study = tmp_path / "again"
    shutil.copytree(whole, study)
    told = gmpo("tune", "--study", study, "--json")
    assert told.exit_code == 0, told.stderr
    assert json.loads(told.stdout) == report_in(whole)
    assert (study / "attempts.jsonl").read_text() == (whole / "attempts.jsonl").read_text()


@pytest.mark.verify
def test_the_same_study_again_gives_the_same_numbers(whole: Path, small: Path, tmp_path: Path):
    again = tmp_path / "again"
    assert tune(small, again).exit_code == 0
    assert report_in(whole) == report_in(again)


def test_a_killed_trial_is_tried_again_and_nothing_is_lost(
    whole: Path, small: Path, tmp_path: Path
):
    search = begun(small, tmp_path / "killed")
    said: list[str] = []
    killer = threading.Thread(target=kill_the_trainer_of, args=(search.folder / "trials" / "0001",))
    killer.start()
    assert run_trials(search, trials=2, say=said.append) == []
    killer.join()
    assert "trial 1's process died (SIGKILL), 1 of at most 3 times" in "\n".join(said)
    outcomes = [(a["cell"], a["outcome"]) for a in read_lines(search.folder, "attempts.jsonl")]
    assert outcomes == [("0000", "finished"), ("0001", "died"), ("0001", "finished")]
    undisturbed = report_in(whole)["trials"]
    assert build_tuning_report(search).as_dict()["trials"] == undisturbed


def test_what_a_killed_call_was_running_is_taken_over_by_another_and_nothing_is_lost(
    whole: Path, small: Path, tmp_path: Path
):
    search = begun(small, tmp_path / "shared")
    runs = [search.folder / "trials" / name for name in ("0000", "0001")]
    words = ["tune", "--study", str(search.folder), "--processes", "2"]
    other = forked_gmpo(*words, forks_too=True)
    try:
        for run in runs:
            wait_for(run / "metrics.jsonl", other)
        other.send_signal(signal.SIGSTOP)  # so that it cannot tell how its trials ended
        for trainer in filter(None, map(trainer_of, runs)):
            os.kill(trainer, signal.SIGKILL)
        said: list[str] = []

        def say(sentence: str) -> None:
            said.append(sentence)
            if "waiting for other calls" in sentence:
                other.kill()

        assert run_trials(search, trials=2, say=say) == []
    finally:
        other.kill()
        other.communicate()
    holder = f"process {other.pid} on {socket.gethostname()} since 20"
    assert said[0].startswith(f"waiting for other calls: trial 0 ({holder}")
    assert f", trial 1 ({holder}" in said[0]
    outcomes = [(a["cell"], a["outcome"]) for a in read_lines(search.folder, "attempts.jsonl")]
    # In whichever order: the dead call's locks do not all come free in one moment.
    assert sorted(outcomes) == [("0000", "finished"), ("0001", "finished")]
    assert build_tuning_report(search).as_dict()["trials"] == report_in(whole)["trials"]


def wait_for(file: Path, process: ForkedProcess) -> None:
    deadline = time.monotonic() + 300
    while not file.exists():
        assert process.poll() is None, "the study ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_call_waits_for_the_last_comparison_of_another(whole: Path, tmp_path: Path):
    study = tmp_path / "judged twice"
    shutil.copytree(whole, study)
    plan, _ = open_tuning(study, None, trials=None, warn=print)
    search = Search(study, plan)
    lock = (study / "claims" / "judge.lock").open("a")
    assert take_lock(lock)
    with pytest.raises(RunStopped, match="the last comparison was stopped"):
        judge(search, candidates(search), should_stop=lambda: True)
    given_up = f"the last comparison \\(process {os.getpid()} on .*\\); nothing has come of that"
    with pytest.raises(StillHeld, match=given_up):
        judge(search, candidates(search), wait_minutes=0)
    said: list[str] = []

    def say(sentence: str) -> None:
        said.append(sentence)
        lock.close()

    assert judge(search, candidates(search), say=say) == []
    holder = f"the last comparison (process {os.getpid()} on {socket.gethostname()} since 20"
    assert said[0].startswith(f"waiting for other calls: {holder}")
    assert said[1:] == ["4 of 4 runs are done already"]


def test_a_call_that_hangs_is_not_waited_for_without_end_and_nothing_is_lost(
    whole: Path, small: Path, tmp_path: Path
):
    study = begun(small, tmp_path / "hung").folder
    words = ["tune", "--study", str(study)]
    hung = forked_gmpo(*words, forks_too=True)
    run = study / "trials" / "0000"
    stopped: list[int] = []
    try:
        wait_for(run / "metrics.jsonl", hung)
        trainer = trainer_of(run)
        assert trainer is not None
        stopped = [trainer]
        for process_id in (hung.pid, trainer):
            os.kill(process_id, signal.SIGSTOP)
        holder = f"trial 0 (process {hung.pid} on {socket.gethostname()} since 20"
        # The other trial is nobody's, so that a second call has something to do before it waits.
        given_up = process("tune", "--study", study, "--wait", "0.02", forks_too=True)
        assert given_up.returncode == 4, given_up.stderr
        assert "trial 1 scores" in given_up.stdout
        assert f"waiting for other calls: {holder}" in given_up.stdout
        assert given_up.stderr.startswith(f"gave up waiting: not over in other calls: {holder}")
        assert f"go on with: gmpo tune --study {study}" in given_up.stderr
        assert given_up.stderr.count("\n") == 1
        assert "waiting" not in process("tune", "--study", study, "--wait", "0").stdout
        assert interrupted(words, once_it_says=holder) == 130
        for process_id in (trainer, hung.pid):
            os.kill(process_id, signal.SIGCONT)
        stopped.clear()
        assert hung.communicate(timeout=300)[1] == ""
        assert hung.returncode == 0
    finally:
        for process_id in stopped:
            os.kill(process_id, signal.SIGKILL)
        hung.kill()
        hung.communicate()
    assert report_in(study)["trials"] == report_in(whole)["trials"]


def interrupted(words: list[str], *, once_it_says: str) -> int:
    """Exit code of a command that Ctrl-C comes to."""
    command = forked_gmpo(*words)
    try:
        for line in command.stdout:
            if once_it_says in line:
                command.send_signal(signal.SIGINT)
                break
        command.communicate()
    finally:
        command.kill()
    return command.wait()


def test_a_call_that_keeps_the_search_to_itself_is_not_waited_for_without_end(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    search = begun(small, tmp_path / "kept")
    monkeypatch.setattr("gmpo.tuning.search._LONGEST_ASKING_SECONDS", 0.05)
    with (search.folder / "claims" / "ask.lock").open("a") as file:
        assert take_lock(file)
        with pytest.raises(StillHeld, match=f"ask.lock is held by process {os.getpid()} on"):
            search.claim_next(trials=1)
    trial = search.claim_next(trials=1)
    assert trial is not None
    trial.release()


def begun(small: Path, study: Path, **changes: Any) -> Search:
    """A new study in this process, as the command begins it."""
    settings = {"space": small / "space.toml", "seeds": (5, 6), "top": 1, "prunes": False}
    options = TuningOptions(**{**settings, **changes})
    plan = make_tuning_plan(str(small / "small.toml"), options)
    plan, _ = open_tuning(study, plan, trials=2, warn=print)
    return Search(study, plan)


def kill_the_trainer_of(run: Path) -> None:
    """Kill the process that trains a run once it has a round behind it."""
    for _ in range(1200):
        rounds = metric_lines(run, "round") if (run / "metrics.jsonl").exists() else []
        found = trainer_of(run)
        if rounds and found is not None:
            os.kill(found, signal.SIGKILL)
            return
        time.sleep(0.02)


def trainer_of(run: Path) -> int | None:
    """The process that holds the run's folder, where that is another one than this."""
    lock = run / ".lock"
    if not lock.exists():
        return None
    inode = str(lock.stat().st_ino)
    for line in Path("/proc/locks").read_text().splitlines():
        # Number, kind, whether it binds, how, process, device and inode, first and last byte.
        _, kind, _, _, process, place, *_ = line.split()
        if kind == "FLOCK" and place.split(":")[-1] == inode and int(process) != os.getpid():
            return int(process)
    return None


def test_two_calls_share_one_study_and_two_objectives(small: Path, tmp_path: Path):
    one = begun(small, tmp_path / "shared", is_pareto=True)
    other = Search(one.folder, one.plan)
    claimed = [search.claim_next(trials=3) for search in (one, other, one)]
    assert [trial.number for trial in claimed if trial is not None] == [0, 1, 2]
    assert other.claim_next(trials=3) is None
    for number, trial in enumerate(claimed):
        assert trial is not None
        if number == 2:
            trial.release()
        else:
            trial.scored(Score(accuracy=0.1 * number, stability=1.0 - 0.5 * number))
    # What a call that ended had begun is taken over with its values.
    left = other.claim_next(trials=3)
    assert left is not None
    assert claimed[2] is not None
    assert (left.number, left.values) == (2, claimed[2].values)
    left.scored(Score(accuracy=0.05, stability=0.5))
    assert one.front() == [0, 1]
    assert [record.outcome for record in one.records()] == ["scored"] * 3


def test_a_trial_that_is_behind_is_told_to_end(small: Path, tmp_path: Path):
    search = begun(small, tmp_path / "pruned", prunes=None)
    good, bad = search.claim_next(trials=2), search.claim_next(trials=2)
    assert good is not None
    assert bad is not None
    assert not good.falls_behind(2, Score(accuracy=0.9, stability=0.9))
    assert bad.falls_behind(2, Score(accuracy=0.1, stability=0.9))
    bad.pruned()
    good.scored(Score(accuracy=0.9, stability=0.9))
    assert [record.outcome for record in search.records()] == ["scored", "pruned"]


def test_a_dry_run_shows_space_and_plan(small: Path, tmp_path: Path):
    shown = gmpo("tune", small / "small.toml", "--study", tmp_path / "none", "--dry-run")
    assert shown.exit_code == 0
    assert "50 trials of 4 rounds" in shown.stdout
    assert "training.learning_rate" in shown.stdout
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--trials", "0"), "--trials 0 must be at least 1"),
        (("--wait", "-1"), "--wait -1 must be minutes from 0 on"),
        (("--wait", "nan"), "--wait nan must be minutes from 0 on"),
        (("--pareto", "--prune"), "leave out one of the two"),
        (("--seeds", "0,1"), "the seed of all trials"),
        (("--seeds", "4"), "must name at least two"),
        (("--top", "0"), "--top 0 must be 1 to 10"),
        (("--set", "task.held_out_items=3"), "a study needs at least 2"),
        (("--set", "evaluation.measure=reward"), "set it to 'accuracy'"),
    ],
)
def test_what_cannot_be_tuned_is_refused(small: Path, tmp_path: Path, words, said: str):
    study = tmp_path / "none"
    assert said in refusal("tune", small / "small.toml", "--study", study, *words)
    assert not study.exists()


def test_another_recipe_or_space_is_refused_in_a_study_folder(whole: Path, small: Path):
    recipe, space = small / "small.toml", small / "space.toml"
    other = refusal(
        "tune",
        recipe,
        "--space",
        space,
        "--study",
        whole,
        *OPTIONS,
        "--set",
        "training.learning_rate=0.5",
    )
    assert "is of another study" in other
    assert "training.learning_rate: 0.001 there, 0.5 here" in other
    wider = refusal("tune", recipe, "--study", whole, *OPTIONS)
    assert "space: objective.clip_high: not set there" in wider
    assert "has its own plan" in refusal("tune", "--study", whole, "--top", "2")


def test_a_folder_without_a_study_is_refused(tmp_path: Path):
    assert "holds no tuning study" in refusal("tune", "--study", tmp_path)
    assert "name a recipe" in refusal("tune")
