"""Trackers: rows read back from the real tools, and what a tool that fails or blocks may not do."""

from __future__ import annotations

import importlib.util
import math
import shutil
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.disks import fill, small_disk
from tests.trackers import (
    Point,
    expected_points,
    mlflow_points,
    tensorboard_points,
    trackio_points,
    wandb_points,
)

from gmpo.errors import ConfigError
from gmpo.trackers import TrackedRun, Trackers, feed, require_packages
from gmpo.trackers.tools import OPENERS, Row, figures

# The tools warn of their own dependencies' plans; a warning must not be a failure of theirs.
pytestmark = pytest.mark.filterwarnings("default")

TOOLS = ("trackio", "mlflow", "tensorboard", "wandb")
PARAMETERS = {"model.name": "tiny", "training.rounds": 2, "sampling.stop_strings": ["\n"]}


def rows(first: int, last: int) -> list[dict[str, Any]]:
    """Two steps a round, with the rows in the order of a run."""
    written: list[dict[str, Any]] = []
    for number in range(first, last + 1):
        for step in (2 * number - 1, 2 * number):
            written.append({"kind": "step", "round": number, "step": step, "update/loss": step / 3})
        whole = {"round": number, "step": 2 * number}
        written.append({"kind": "round", **whole, "rollout/reward": 1 / 7, "ratio/max": None})
        written.append({"kind": "evaluation", **whole, "evaluation/accuracy": 0.5})
    return written


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tool is imported when it is first used, which takes a busy machine long."""
    monkeypatch.setattr(feed, "_CLOSING_SECONDS", 300.0)


@pytest.fixture
def run(tmp_path: Path) -> TrackedRun:
    folder = tmp_path / "runs" / "first"
    folder.mkdir(parents=True)
    return TrackedRun(
        id=uuid.uuid4().hex,
        name="first",
        project="tests",
        folder=folder,
        parameters=PARAMETERS,
    )


@pytest.fixture
def with_store(run: TrackedRun, mlflow_store: Path) -> None:
    shutil.copy(mlflow_store, run.folder.parent / "mlflow.db")


def track(tool: str, run: TrackedRun, new: list[Row], *, earlier: list[Row] | None = None) -> None:
    """One process's share of a run; nothing may fail."""
    said: list[str] = []
    trackers = Trackers([tool], run, earlier=earlier or (), warn=said.append)
    for row in new:
        trackers.send(row)
    trackers.close()
    assert said == []
    assert set(trackers.new_counts().values()) == {0.0}


def mlflow_run(run: TrackedRun) -> tuple[str, Any]:
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{run.folder.parent / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(run.project)
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id], f"tags.gmpo_run = '{run.id}'")
    return uri, found


def points(tool: str, run: TrackedRun) -> Counter[Point]:
    if tool == "trackio":
        return trackio_points(run.project, run.id)
    if tool == "mlflow":
        uri, found = mlflow_run(run)
        return mlflow_points(uri, found.info.run_id)
    if tool == "tensorboard":
        return tensorboard_points(run.folder / "tensorboard")
    return wandb_points(run.folder / "wandb")


# The real tools


@pytest.mark.usefixtures("with_store")
@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_holds_every_figure_of_every_row_once(tool: str, run: TrackedRun):
    track(tool, run, rows(1, 2))
    assert points(tool, run) == expected_points(rows(1, 2))


@pytest.mark.usefixtures("with_store")
@pytest.mark.parametrize("tool", TOOLS)
def test_a_resumed_run_goes_on_in_the_same_place_without_a_row_twice(tool: str, run: TrackedRun):
    track(tool, run, rows(1, 2))
    time.sleep(1)  # W&B names a process's folder by the second
    # Round 2 was not in a checkpoint: it comes again.
    track(tool, run, rows(2, 3), earlier=rows(1, 1))
    assert points(tool, run) == expected_points(rows(1, 3))


@pytest.mark.usefixtures("with_store")
@pytest.mark.parametrize("tool", TOOLS)
def test_rows_that_never_arrived_are_sent_when_the_run_is_resumed(tool: str, run: TrackedRun):
    track(tool, run, rows(3, 3), earlier=rows(1, 2))
    assert points(tool, run) == expected_points(rows(1, 3))


@pytest.mark.usefixtures("offline_trackers")
def test_trackio_has_the_recipe_and_the_name(run: TrackedRun):
    from trackio.sqlite_storage import SQLiteStorage

    track("trackio", run, rows(1, 1))
    recipe = SQLiteStorage.get_run_config(run.project, run_id=run.id)
    assert recipe is not None and PARAMETERS.items() <= recipe.items()
    records = SQLiteStorage.get_run_records(run.project)
    assert [record["name"] for record in records if record["id"] == run.id] == ["first"]


@pytest.mark.usefixtures("with_store")
def test_mlflow_has_the_recipe_the_name_and_an_end(run: TrackedRun):
    track("mlflow", run, rows(1, 1))
    _, found = mlflow_run(run)
    assert found.data.params == {key: str(value) for key, value in PARAMETERS.items()}
    assert (found.info.run_name, found.info.status) == ("first", "FINISHED")


def test_mlflow_writes_where_its_variable_says(
    run: TrackedRun, mlflow_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.copy(mlflow_store, tmp_path / "elsewhere.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'elsewhere.db'}")
    track("mlflow", run, rows(1, 1))
    assert b"update/loss" in (tmp_path / "elsewhere.db").read_bytes()
    assert not (run.folder.parent / "mlflow.db").exists()


@pytest.mark.usefixtures("offline_trackers")
def test_runs_beside_each_other_share_one_mlflow_store(run: TrackedRun):
    other = replace(run, id=uuid.uuid4().hex, folder=run.folder.parent / "second")
    other.folder.mkdir()
    both = [
        threading.Thread(target=track, args=("mlflow", one, rows(1, 1))) for one in (run, other)
    ]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert sorted(path.name for path in run.folder.parent.iterdir()) == [
        "first",
        "mlflow.db",
        "second",
    ]
    for one in (run, other):
        assert points("mlflow", one) == expected_points(rows(1, 1))


@pytest.mark.usefixtures("offline_trackers")
def test_tensorboard_has_the_recipe_and_survives_a_torn_event(run: TrackedRun):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track("tensorboard", run, rows(1, 2))
    folder = run.folder / "tensorboard"
    (file,) = folder.iterdir()
    file.write_bytes(file.read_bytes()[:-5])  # the last row was being written
    track("tensorboard", run, [], earlier=rows(1, 2))
    assert points("tensorboard", run) == expected_points(rows(1, 2))
    (recipe,) = EventAccumulator(str(folder)).Reload().Tensors("recipe")
    assert b"training.rounds = 2" in recipe.tensor_proto.string_val[0]


@pytest.mark.usefixtures("offline_trackers")
def test_wandb_is_offline_unless_its_variable_says_otherwise(
    run: TrackedRun, monkeypatch: pytest.MonkeyPatch
):
    track("wandb", run, rows(1, 1))
    assert len(list((run.folder / "wandb").glob("offline-run-*"))) == 1
    monkeypatch.setenv("WANDB_MODE", "disabled")
    track("wandb", run, rows(2, 2))
    assert len(list((run.folder / "wandb").glob("offline-run-*"))) == 1


def test_a_row_is_named_by_its_kind_and_null_is_not_a_number():
    named = figures({"kind": "round", "round": 3, "step": 12, "ratio/max": None, "a/b": 1.5})
    assert math.isnan(named.pop("round/ratio/max"))
    assert named == {"round/a/b": 1.5, "round/round": 3}
    assert "evaluation/accuracy" in figures(
        {"kind": "evaluation", "round": 1, "step": 4, "evaluation/accuracy": 1.0}
    )


def test_a_tool_that_is_not_installed_is_refused_with_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "trackio" else find(name)
    )
    require_packages(["mlflow", "tensorboard", "wandb"])
    with pytest.raises(ConfigError) as caught:
        require_packages(TOOLS)
    assert str(caught.value) == (
        "tracker 'trackio' needs trackio; pip install 'gmpo[track]', or leave it out of tracking.to"
    )


# Tools that fail or block


class Tool:
    """Keeps what it is given; `fail` is asked before each call."""

    def __init__(self, fail: Callable[[str], None] = lambda _: None) -> None:
        self.fail = fail
        self.calls: list[str] = []
        self.rows: list[Row] = []

    def open(self, _: TrackedRun) -> Tool:
        self.call("open")
        return self

    def call(self, what: str) -> None:
        self.calls.append(what)
        self.fail(what)

    def holds(self, _: Row) -> bool:
        return False

    def write(self, row: Row) -> None:
        self.call("write")
        self.rows.append(row)

    def close(self) -> None:
        self.call("close")


def failing(*calls: bool) -> Callable[[str], None]:
    """Raises at the calls that are True, and never after the last."""
    plan = iter(calls)

    def fail(what: str) -> None:
        if next(plan, False):
            raise RuntimeError(f"{what} failed\nwith details")

    return fail


def blocking(until: threading.Event, where: str) -> Callable[[str], None]:
    def block(what: str) -> None:
        if what == where:
            until.wait()

    return block


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tool], None]:
    return lambda tool: monkeypatch.setitem(OPENERS, "tensorboard", tool.open)  # type: ignore[arg-type]


def eventually(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline, "it never came to be so"
        time.sleep(0.001)


def test_a_failed_call_is_counted_said_once_and_made_again_with_the_next_row(
    run: TrackedRun, use: Callable[[Tool], None]
):
    tool = Tool(failing(True, False, True))
    use(tool)
    said: list[str] = []
    trackers = Trackers(["tensorboard"], run, warn=said.append)
    eventually(lambda: tool.calls == ["open"])
    first, *others = rows(1, 1)
    trackers.send(first)
    eventually(lambda: tool.calls == ["open", "open", "write"])
    for row in others:
        trackers.send(row)
    trackers.close()
    counts = trackers.new_counts()
    assert tool.rows == rows(1, 1)
    assert tool.calls[-1] == "close"
    assert counts["tracking/errors_total"] == 2
    assert counts["tracking/dropped_total"] == 0
    assert said == [
        "tracker 'tensorboard' failed (RuntimeError: open failed); training goes on, metrics.jsonl "
        "has every row, and it is tried again with the next one"
    ]


def test_a_tool_that_always_fails_is_switched_off_and_what_it_misses_is_counted(
    run: TrackedRun, use: Callable[[Tool], None]
):
    tool = Tool(failing(False, *[True] * 5))
    use(tool)
    said: list[str] = []
    trackers = Trackers(["tensorboard"], run, warn=said.append)
    eventually(lambda: tool.calls == ["open"])
    for number in range(5):
        trackers.send(rows(1, 1)[0])
        eventually(lambda n=number: tool.calls.count("write") > n)  # type: ignore[misc]
    eventually(lambda: len(said) == 2)
    assert trackers.new_counts() == {"tracking/errors_total": 5.0, "tracking/dropped_total": 5.0}
    trackers.send(rows(1, 1)[0])
    assert trackers.new_counts() == {"tracking/errors_total": 0.0, "tracking/dropped_total": 1.0}
    trackers.close()
    assert tool.rows == []
    assert said[1] == (
        "tracker 'tensorboard' is off after 5 failures in a row (the last: RuntimeError: write "
        "failed); a resumed run sends it what it lacks"
    )


def test_a_tool_that_blocks_holds_up_nobody_and_rows_beyond_a_bound_are_dropped(
    run: TrackedRun, use: Callable[[Tool], None], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(feed, "_MOST_WAITING_ROWS", 3)
    monkeypatch.setattr(feed, "_CLOSING_SECONDS", 0.05)
    released = threading.Event()
    tool = Tool(blocking(released, "write"))
    use(tool)
    said: list[str] = []
    trackers = Trackers(["tensorboard"], run, warn=said.append)
    started = time.monotonic()
    for row in rows(1, 2):  # eight rows: one in hand, counted as waiting, two more, five dropped
        trackers.send(row)
    trackers.close()
    assert time.monotonic() - started < 10
    assert trackers.new_counts() == {"tracking/errors_total": 0.0, "tracking/dropped_total": 5.0}
    assert said == [
        "tracker 'tensorboard' is 3 rows behind; further ones are dropped until it goes on, "
        "metrics.jsonl has them all and a resumed run sends them",
        "tracker 'tensorboard' has not ended after 0.05 s, with 3 rows not written; metrics.jsonl "
        "has them all, and a resumed run sends them",
    ]
    released.set()
    eventually(lambda: tool.calls[-1] == "close")
    assert len(tool.rows) <= 1  # the call that was under way; nothing after training has ended


def test_one_tool_that_blocks_does_not_keep_another_from_its_rows(
    run: TrackedRun, use: Callable[[Tool], None], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(feed, "_CLOSING_SECONDS", 0.05)
    released = threading.Event()
    use(Tool(blocking(released, "open")))
    other = Tool()
    monkeypatch.setitem(OPENERS, "wandb", other.open)  # type: ignore[arg-type]
    trackers = Trackers(["tensorboard", "wandb"], run, warn=lambda _: None)
    for row in rows(1, 2):
        trackers.send(row)
    eventually(lambda: other.rows == rows(1, 2))
    trackers.close()
    released.set()


def test_without_trackers_there_is_nothing_to_count(run: TrackedRun):
    trackers = Trackers([], run, warn=lambda _: None)
    trackers.send(rows(1, 1)[0])
    trackers.close()
    assert trackers.new_counts() == {}


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", kilobytes=64) as disk:
        fill(disk)
        yield disk


@pytest.mark.usefixtures("offline_trackers")
def test_a_full_disk_is_a_failure_like_any_other(
    run: TrackedRun, full_disk: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{full_disk / 'mlflow.db'}")
    said: list[str] = []
    trackers = Trackers(["mlflow"], run, warn=said.append)
    trackers.send(rows(1, 1)[0])
    trackers.close()
    assert trackers.new_counts()["tracking/errors_total"] >= 1
    assert said[0].startswith("tracker 'mlflow' failed (")
    assert said[1] == (
        "tracker 'mlflow' ended with 1 rows not written; metrics.jsonl has them all, and a "
        "resumed run sends them"
    )
