"""What Prometheus is told about training, by the version of the weights that it has come to."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

__all__ = ["BY_NAME", "TrainingMetrics", "exposed_name"]

BY_NAME = (
    "rollout/reward/",
    "rollout/reward_deviation/",
    "rollout/reward_absent_fraction/",
    "rollout/reward_errors_total/",
    "reward_metric/",
)
"""Beginnings of metrics that end in a name of the recipe's, which becomes a label."""

_LABELS = ("run", "model_version")


def exposed_name(metric: str) -> tuple[str, str | None]:
    """Prometheus' name of a metric, and the `name` label where the metric ends in one.

    `rollout/reward` is `gmpo_training_rollout_reward`, and `rollout/reward/correct` is
    `gmpo_training_rollout_reward_by_name` with name "correct". `_total` is for what only grows,
    which a round's number of errors is not, and is left out.
    """
    for beginning in BY_NAME:
        if metric.startswith(beginning):
            stem, name = f"{beginning.rstrip('/')}", metric.removeprefix(beginning)
            return f"{_plain(stem)}_by_name", name
    return _plain(metric), None


class TrainingMetrics(Collector):
    """The newest figures of one run as gauges: its last round's, and its last evaluation's.

    Labels are `run` and `model_version`, the digest by which gateways call the same weights, so
    that what they see can be traced to the round that made them.

    Args:
        registry: where they are exposed.
        run: name of the run.
    """

    def __init__(self, registry: CollectorRegistry, *, run: str) -> None:
        self._run = run
        self._version = "none"
        self._rows: dict[str, Mapping[str, Any]] = {}
        registry.register(self)

    def logged(self, row: Mapping[str, Any]) -> None:
        """Take a row of `metrics.jsonl`; rows of single steps are left to the round's means."""
        if row["kind"] != "step":
            self._rows = {**self._rows, row["kind"]: row}

    def weights(self, version: str | None) -> None:
        """Say which weights the figures have come to; None where they have no version yet.

        Args:
            version: digest of the weights, the label of all figures.
        """
        self._version = version or "none"

    def collect(self) -> Iterator[Metric]:
        """Gauges of every figure that is there; one that was not finite is absent."""
        rows, labels = self._rows, (self._run, self._version)
        families: dict[str, GaugeMetricFamily] = {}
        for row in rows.values():
            for metric, value in row.items():
                if metric in ("kind", "round", "step") or value is None:
                    continue
                name, last = exposed_name(metric)
                if name not in families:
                    by_name = () if last is None else ("name",)
                    text = f"{metric.removesuffix(last or '')} in docs/metrics.md"
                    families[name] = GaugeMetricFamily(name, text, labels=(*_LABELS, *by_name))
                families[name].add_metric((*labels, *(() if last is None else (last,))), value)
        for counted in ("round", "step"):
            numbers = [row[counted] for row in rows.values() if counted in row]
            if numbers:
                family = GaugeMetricFamily(
                    f"gmpo_training_{counted}", f"Last {counted} that is over", labels=_LABELS
                )
                family.add_metric(labels, max(numbers))
                families[counted] = family
        yield from families.values()


def _plain(metric: str) -> str:
    return f"gmpo_training_{re.sub(r'[^a-zA-Z0-9]', '_', metric.removesuffix('_total'))}"
