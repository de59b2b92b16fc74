"""Figures of training for Prometheus: names, labels, and the weights they belong to."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path
from typing import Any

import httpx2
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from tests.models import save_tiny

from gmpo.model_files import weights_version
from gmpo.monitoring.training_metrics import BY_NAME, TrainingMetrics, exposed_name
from gmpo.trackers import TrackedRun, Trackers
from gmpo.trackers.prometheus import PrometheusFile
from gmpo.tracking import METRIC_FAMILIES, METRICS
from gmpo.tracking_config import TrackingConfig

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


def row(number: int, **metrics: float | None) -> dict[str, Any]:
    return {"kind": "round", "round": number, "step": 4 * number, **metrics}


def samples(text: str) -> dict[tuple[str, ...], float]:
    """Value by name and label values, those in order of their labels' names."""
    return {
        (one.name, *(value for _, value in sorted(one.labels.items()))): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
    }


def test_every_metric_has_a_name_of_its_own():
    names = [exposed_name(metric)[0] for metric in METRICS]
    names += [exposed_name(f"{family}x")[0] for family in METRIC_FAMILIES]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"gmpo_training_[a-z0-9_]+", name) for name in names)
    assert not [name for name in names if name.endswith(("_total", "_count", "_sum", "_bucket"))]
    assert set(BY_NAME) == set(METRIC_FAMILIES)
    assert exposed_name("kl_ref/k3") == ("gmpo_training_kl_ref_k3", None)
    assert exposed_name("rollout/reward/my-own") == (
        "gmpo_training_rollout_reward_by_name",
        "my-own",
    )


def test_the_newest_round_and_evaluation_are_exposed():
    registry = CollectorRegistry()
    metrics = TrainingMetrics(registry, run="mine")
    metrics.logged(row(1, **{"rollout/reward": 0.25, "ratio/max": 1.5}))
    metrics.logged({"kind": "step", "round": 2, "step": 5, "ratio/max": 99.0})
    metrics.logged({"kind": "evaluation", "round": 2, "step": 8, "evaluation/accuracy": 0.75})
    metrics.logged(row(3, **{"rollout/reward": 0.5, "ratio/max": None, "rollout/reward/a": 0.125}))
    metrics.weights("ab12")
    by = {"run": "mine", "model_version": "ab12"}
    value = registry.get_sample_value
    assert value("gmpo_training_rollout_reward", by) == 0.5
    assert value("gmpo_training_ratio_max", by) is None
    assert value("gmpo_training_evaluation_accuracy", by) == 0.75
    assert value("gmpo_training_rollout_reward_by_name", {**by, "name": "a"}) == 0.125
    assert (value("gmpo_training_round", by), value("gmpo_training_step", by)) == (3, 12)


def test_every_figure_that_the_dashboard_names_is_exposed():
    dashboard = json.loads((DEPLOY / "grafana" / "training.json").read_text())
    named = {target["expr"] for panel in dashboard["panels"] for target in panel["targets"]}
    assert len(named) >= 8
    assert named <= {exposed_name(metric)[0] for metric in METRICS} | {"gmpo_training_round"}


def tracked(folder: Path, **parameters: Any) -> TrackedRun:
    return TrackedRun(id="1", name="mine", project="tests", folder=folder, parameters=parameters)


def checkpoint(folder: Path, number: int, seed: int) -> str:
    """A checkpoint with a tiny model; its version."""
    whole = folder / "checkpoints" / f"round-{number:06d}"
    save_tiny(whole / "model", seed=seed)
    (whole / "state.json").write_text("{}")
    return weights_version(whole / "model")


def test_the_file_shows_the_weights_that_a_round_has_come_to(tmp_path: Path):
    said: list[str] = []
    older, newer = checkpoint(tmp_path, 2, seed=1), checkpoint(tmp_path, 4, seed=2)
    shown = tmp_path / "metrics.prom"
    trackers = Trackers(["prometheus"], tracked(tmp_path), warn=said.append)
    # The last row of a run comes before its last checkpoint.
    trackers.send(row(3, **{"rollout/reward": 0.5}))
    trackers.close()
    assert samples(shown.read_text())["gmpo_training_rollout_reward", newer, "mine"] == 0.5
    tool = PrometheusFile(tracked(tmp_path))
    for number, version in ((1, "none"), (3, older), (4, newer)):
        tool.write(row(number, **{"rollout/reward": number / 8}))
        expected = {("gmpo_training_rollout_reward", version, "mine"): number / 8}
        assert expected.items() <= samples(shown.read_text()).items()
        assert len(samples(shown.read_text())) == 3
    tool.close()
    assert said == []


def test_a_port_can_be_scraped_and_one_that_is_taken_stops_nothing(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
        said: list[str] = []
        run = tracked(tmp_path, **{"tracking.prometheus_port": port})
        trackers = Trackers(["prometheus"], run, warn=said.append)
        trackers.send(row(1, **{"rollout/reward": 0.5}))
        trackers.close()
        assert said[0].startswith("tracker 'prometheus' failed (OSError: ")
    tool = PrometheusFile(run)
    tool.write(row(1, **{"rollout/reward": 0.5}))
    scraped = httpx2.get(f"http://127.0.0.1:{port}/metrics").text
    assert samples(scraped)["gmpo_training_rollout_reward", "none", "mine"] == 0.5
    tool.close()
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"http://127.0.0.1:{port}/metrics")


def test_a_port_without_its_tool_is_refused():
    with pytest.raises(
        ValueError, match=r"prometheus_port = 9101 works with to = \['prometheus'\]"
    ):
        TrackingConfig(prometheus_port=9101)
    with pytest.raises(ValueError, match="less than or equal to 65535"):
        TrackingConfig(to=("prometheus",), prometheus_port=70000)
