"""Runs with trackers: killed, resumed, with a tool that blocks, and with tracking changed."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.commands import refusal
from tests.killed_runs import Death, run_in_process
from tests.tiny_runs import kept_in, metric_lines, same_weights, tiny_recipe
from tests.trackers import (
    Point,
    expected_points,
    mlflow_points,
    tensorboard_points,
    trackio_points,
    wandb_points,
)

from gmpo.checkpoint import checkpoint_model
from gmpo.errors import CheckpointError
from gmpo.inspection import summarize_run
from gmpo.policy.load import load_policy, model_version
from gmpo.recipe import load_recipe
from gmpo.trackers import feed
from gmpo.training import train

pytestmark = pytest.mark.filterwarnings("default")


def same_for_every_process(points: Counter[Point]) -> Counter[Point]:
    """Without what is measured anew each time: seconds, memory, trackers' failures."""
    changing = ("round/time/", "round/memory/", "round/tracking/")
    return Counter(
        {point: count for point, count in points.items() if not point[0].startswith(changing)}
    )


def test_a_killed_and_resumed_run_is_in_every_tool_once(
    model: str, tmp_path: Path, mlflow_store: Path
):
    from mlflow.tracking import MlflowClient

    tools = ["trackio", "mlflow", "tensorboard", "wandb"]
    config = tiny_recipe(
        model,
        tracking={"to": tools, "project": "killed"},
        training__rounds=4,
        checkpoint={"every_rounds": 2},
    )
    folder = tmp_path / "runs" / "mine"
    folder.parent.mkdir()
    shutil.copy(mlflow_store, folder.parent / "mlflow.db")
    whole = run_in_process(tiny_recipe(model, training__rounds=4), tmp_path / "untracked")
    killed = run_in_process(config, folder, Death(touches=int(whole.touches * 0.7)))
    assert killed.exit_code == -9
    assert run_in_process(config, folder).exit_code == 0
    # As if it had been killed again, after its last rows and before its last checkpoint.
    for name in ("evaluations.jsonl", "checkpoints/round-000004/state.json"):
        (folder / name).unlink()
    assert run_in_process(config, folder).exit_code == 0
    expected = same_for_every_process(expected_points(metric_lines(folder)))
    run_id = json.loads((folder / "tracking.json").read_text())["id"]
    uri = f"sqlite:///{folder.parent / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("killed")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    held = {
        "trackio": trackio_points("killed", run_id),
        "mlflow": mlflow_points(uri, found.info.run_id),
        "tensorboard": tensorboard_points(folder / "tensorboard"),
        "wandb": wandb_points(folder / "wandb"),
    }
    given = same_for_every_process(held.pop("wandb"))
    # W&B gets a row at most once: those of the step at which the kill came may be missing.
    assert not given - expected
    assert len({step for _, step, _ in expected - given}) <= 1
    for tool, points in held.items():
        assert same_for_every_process(points) == expected, tool
    assert same_weights(
        folder / "checkpoints" / "round-000004", tmp_path / "untracked/checkpoints/round-000004"
    )


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.usefixtures("offline_trackers")
def test_a_server_that_never_answers_stops_nothing(
    model: str, tmp_path: Path, silent_server: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", silent_server)
    monkeypatch.setattr(feed, "_CLOSING_SECONDS", 0.2)
    monkeypatch.setattr(feed, "_MOST_WAITING_ROWS", 5)
    said: list[str] = []
    started = time.monotonic()
    config = tiny_recipe(model, tracking={"to": ["mlflow"]}, training__rounds=3)
    result = train(config, folder=tmp_path / "run", warn=kept_in(said))
    assert time.monotonic() - started < 60
    untracked = train(tiny_recipe(model, training__rounds=3), folder=tmp_path / "untracked")
    assert same_weights(result.checkpoint, untracked.checkpoint)
    assert len(metric_lines(tmp_path / "run", "round")) == 3
    assert said[0].startswith("tracker 'mlflow' is 5 rows behind; further ones are dropped")
    assert said[-1].startswith("tracker 'mlflow' has not ended after 0.2 s, with 5 rows")
    # 15 rows, of which 5 wait; what is dropped after the last round's row was made is in no row.
    dropped = summarize_run(tmp_path / "run").tracker_dropped_total
    assert dropped is not None and 0 < dropped <= 10


def test_what_is_tracked_may_change_when_a_run_is_resumed_but_nothing_else(
    model: str, tmp_path: Path
):
    config = tiny_recipe(model, tracking={"to": ["tensorboard"]})
    train(config, folder=tmp_path / "run")
    changed = tiny_recipe(model, tracking={"to": [], "name": "other"})
    train(changed, folder=tmp_path / "run", resume=True)
    assert load_recipe(tmp_path / "run" / "recipe.toml").tracking.name == "other"
    with pytest.raises(CheckpointError, match="made with another recipe"):
        train(tiny_recipe(model, training__seed=1), folder=tmp_path / "run", resume=True)


def test_a_run_without_trackers_has_no_figures_of_them(model: str, tmp_path: Path):
    train(tiny_recipe(model), folder=tmp_path / "run")
    assert not any("tracking/" in name for line in metric_lines(tmp_path / "run") for name in line)
    assert summarize_run(tmp_path / "run").tracker_errors_total is None
    assert not (tmp_path / "run" / "tracking.json").exists()


def test_a_tracker_named_twice_is_refused(model: str, recipe: str, tmp_path: Path):
    said = refusal(
        *("train", recipe, "--run", tmp_path / "run", "--set", f"model.name={model}"),
        *("--set", 'tracking.to=["wandb", "wandb"]'),
    )
    assert "tracking: to = ['wandb', 'wandb'] names a tracker twice; name each once" in said


def test_prometheus_shows_a_run_by_the_version_of_its_last_weights(model: str, tmp_path: Path):
    folder = tmp_path / "mine"
    config = tiny_recipe(model, tracking={"to": ["prometheus"]}, training__rounds=3)
    result = train(config, folder=folder)
    version = model_version(
        load_policy(str(checkpoint_model(result.checkpoint)), dtype="fp32").model
    )
    (last,) = metric_lines(folder, "round")[-1:]
    shown = (folder / "metrics.prom").read_text()
    labels = f'{{model_version="{version}",run="mine"}}'
    assert f"gmpo_training_round{labels} 3.0" in shown
    assert f"gmpo_training_rollout_reward{labels} {last['rollout/reward']}" in shown
    assert 'gmpo_training_rollout_reward_by_name{model_version="' in shown
