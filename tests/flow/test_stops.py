"""Runs that are asked to stop, share a folder, or find the disk full: nothing is lost."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.commands import gmpo, process, refusal
from tests.disks import fill, resize, small_disk
from tests.forks import ForkedProcess, forked_gmpo
from tests.tiny_runs import metric_lines, same_weights

from gmpo import training
from gmpo.checkpoint import latest_checkpoint
from gmpo.config import RunConfig
from gmpo.errors import RunFolderError, RunStopped
from gmpo.recipe import load_recipe
from gmpo.sampler.local import LocalSampler
from gmpo.sampler.requests import Completion, SampledToken
from gmpo.terminal import asked_to_stop
from gmpo.tracking import RunFolder
from gmpo.training import Report, train

ROUNDS = ("--set", "training.rounds=40", "--set", "checkpoint.every_rounds=30")


@contextmanager
def started(recipe: str, model: str, folder: Path) -> Iterator[ForkedProcess]:
    """A run of 40 rounds in a process of its own, once its second round is done."""
    arguments = ["train", recipe, "--run", str(folder), "--set", f"model.name={model}", *ROUNDS]
    running = forked_gmpo(*arguments)
    try:
        deadline = time.monotonic() + 60
        while rounds_done(folder) < 2:
            assert running.poll() is None, running.communicate()
            assert time.monotonic() < deadline, "no second round within 60 seconds"
            time.sleep(0.01)
        yield running
    finally:
        running.kill()  # does nothing where it has ended
        running.communicate()


def rounds_done(folder: Path) -> int:
    return len(metric_lines(folder, "round"))


@pytest.fixture(scope="module")
def whole(model: str, recipe: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 40 rounds that nobody stopped."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    done = process("train", recipe, "--run", folder, "--set", f"model.name={model}", *ROUNDS)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_interrupted_saves_and_says_how_to_go_on(
    number: signal.Signals, model: str, recipe: str, whole: Path, tmp_path: Path
):
    folder = tmp_path / "run"
    with started(recipe, model, folder) as running:
        running.send_signal(number)
        _, said = running.communicate(timeout=60)
    assert running.returncode == 130
    done = rounds_done(folder)
    assert 2 <= done < 40
    assert latest_checkpoint(folder / "checkpoints").name == f"round-{done:06d}"
    assert said.splitlines()[-2:] == [
        "note: finishing what is under way (at most a round or an evaluation), then saving; once "
        "more to stop at once, which --resume mends too",
        f"stopped: stopped after round {done} of 40, which is saved; go on with: gmpo train --run "
        f"{folder} --resume",
    ]
    assert process("train", "--run", folder, "--resume").returncode == 0
    ends = [latest_checkpoint(each / "checkpoints") for each in (folder, whole)]
    assert same_weights(*ends)


def test_the_second_ctrl_c_stops_at_once(capsys: pytest.CaptureFixture[str]):
    said: list[str] = []
    handler = signal.getsignal(signal.SIGINT)
    with asked_to_stop(said.append) as should_stop:
        assert not should_stop()
        signal.raise_signal(signal.SIGINT)
        assert should_stop()
        assert len(said) == 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is handler


def test_what_is_said_of_a_run_that_ends_at_once_depends_on_whether_it_had_begun(
    model: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(config: RunConfig, *, folder: Path, **_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", interrupted)
    command = ("train", recipe, "--run", tmp_path / "run", "--set", f"model.name={model}")
    done = gmpo(*command)
    assert done.exit_code == 130
    assert "stopped: stopped before the run began; nothing of it is kept" in done.stderr
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.toml").write_text("")
    assert f"gmpo train --run {tmp_path / 'run'} --resume" in " ".join(
        gmpo(*command).stderr.split()
    )


def test_two_processes_do_not_train_in_one_folder(model: str, recipe: str, tmp_path: Path):
    folder = tmp_path / "run"
    with started(recipe, model, folder) as running:
        said = refusal("train", "--run", folder, "--resume")
        assert said == (
            f"run folder {folder} is being trained in by another process; wait for it, stop it, "
            "or choose another folder with --run"
        )
        assert running.poll() is None
        running.send_signal(signal.SIGINT)
        running.communicate(timeout=60)
    assert running.returncode == 130  # the first was not disturbed


def test_a_stop_before_the_first_round_is_saved_too(model: str, recipe: str, tmp_path: Path):
    config = load_recipe(recipe, [f"model.name={model}"])
    with pytest.raises(RunStopped, match="after round 0 of 2"):
        train(config, folder=tmp_path / "run", should_stop=lambda: True, warn=print)
    assert latest_checkpoint(tmp_path / "run" / "checkpoints").name == "round-000000"
    again = train(config, folder=tmp_path / "run", resume=True, warn=print)
    whole = train(config, folder=tmp_path / "whole", warn=print)
    assert same_weights(again.checkpoint, whole.checkpoint)


def test_a_stop_in_the_trial_before_the_first_round_ends_it_and_asks_no_item(
    model: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = load_recipe(recipe, [f"model.name={model}"])
    timings = [0]
    step = LocalSampler.step

    def stepped(sampler: LocalSampler) -> list[SampledToken | Completion]:
        timings[0] += 1
        return step(sampler)

    monkeypatch.setattr(LocalSampler, "step", stepped)
    reports: list[Report] = []
    with pytest.raises(RunStopped, match="after round 0 of 2"):
        train(
            config,
            folder=tmp_path / "run",
            should_stop=lambda: timings[0] >= 2,
            report=reports.append,
            warn=print,
        )
    assert timings == [3]  # two were timed, and one dropped what was running
    assert reports == []
    assert latest_checkpoint(tmp_path / "run" / "checkpoints").name == "round-000000"
    monkeypatch.undo()
    again = train(config, folder=tmp_path / "run", resume=True, warn=print)
    assert len(again.before) == 1


def test_a_disk_that_fills_up_stops_the_run_and_loses_nothing(
    model: str, recipe: str, tmp_path: Path
):
    config = load_recipe(recipe, [f"model.name={model}", "checkpoint.every_rounds=1"])
    whole = train(config, folder=tmp_path / "whole", warn=print)
    with small_disk(tmp_path / "disk", kilobytes=8_000) as disk:
        folder = disk / "run"

        def fill_after_round_1(report: Report) -> None:
            if report.stage == "round" and report.round == 1:
                fill(disk, leave=100_000)

        with pytest.raises(RunFolderError, match="No space left on device"):
            train(config, folder=folder, report=fill_after_round_1, warn=print)
        resize(disk, kilobytes=16_000)
        again = train(config, folder=folder, resume=True, warn=print)
        assert same_weights(again.checkpoint, whole.checkpoint)


def test_damaged_saved_rollouts_are_named_and_kept(model: str, recipe: str, tmp_path: Path):
    config = load_recipe(recipe, [f"model.name={model}"])
    folder = tmp_path / "run"
    with pytest.raises(RunStopped):
        train(config, folder=folder, should_stop=lambda: True, warn=print)
    path = RunFolder(folder).rounds / "round-000001.npz"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"half")
    result = gmpo("train", "--run", folder, "--resume")
    assert result.exit_code == 2
    assert f"saved rollouts {path} are damaged" in result.stderr
    assert path.read_bytes() == b"half"
    path.unlink()
    assert gmpo("train", "--run", folder, "--resume").exit_code == 0


def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew(
    model: str, recipe: str, tmp_path: Path
):
    config = load_recipe(recipe, [f"model.name={model}", "checkpoint.every_rounds=1"])
    folder = tmp_path / "run"
    train(config, folder=folder, warn=print)
    shutil.move(folder / "checkpoints", tmp_path / "elsewhere")
    before = (folder / "metrics.jsonl").read_bytes()
    assert refusal("train", "--run", folder, "--resume") == (
        f"run folder {folder} has trained 2 rounds, and {folder / 'checkpoints'} holds no "
        "checkpoint to go on from; bring one back, or choose another run folder"
    )
    assert (folder / "metrics.jsonl").read_bytes() == before
    shutil.move(tmp_path / "elsewhere", folder / "checkpoints")
    assert gmpo("train", "--run", folder, "--resume").exit_code == 0
