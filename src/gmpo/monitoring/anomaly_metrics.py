"""What Prometheus is told about anomalies of answers."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Gauge

from gmpo.monitoring.serving_monitor import Judgement
from gmpo.monitoring.severity import LEVELS

__all__ = ["AnomalyMetrics"]


class AnomalyMetrics:
    """Severity, level and detectors' scores, by model version and variant.

    Args:
        registry: where they are exposed; a registry holds one of these.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        by_stream = ("model_version", "variant")
        self._severity = Gauge(
            "gmpo_anomaly_severity",
            "How far answers are out of the ordinary, 0 to 1",
            by_stream,
            registry=registry,
        )
        self._level = Gauge(
            "gmpo_anomaly_level",
            "0 nothing, 1 warning, 2 critical; with hysteresis",
            by_stream,
            registry=registry,
        )
        self._score = Gauge(
            "gmpo_anomaly_score",
            "What one detector says, 0 to 1",
            (*by_stream, "detector"),
            registry=registry,
        )

        self._exposed: dict[tuple[str, str], set[str]] = {}

    def judged(self, judgement: Judgement) -> None:
        """Tell what was found; of a stream that is over, nothing any more."""
        key, report = judgement.key, judgement.report
        labels = (key.model_version or "none", key.variant or "none")
        if judgement.is_over:
            self._forget(labels)
            return
        detectors = self._exposed.setdefault(labels, set())
        detectors.update(report.signals)
        self._severity.labels(*labels).set(report.severity)
        self._level.labels(*labels).set(LEVELS.index(report.level))
        for detector, signal in report.signals.items():
            self._score.labels(*labels, detector).set(signal["score"] or 0.0)

    def _forget(self, labels: tuple[str, str]) -> None:
        detectors = self._exposed.pop(labels, None)
        if detectors is None:
            return
        self._severity.remove(*labels)
        self._level.remove(*labels)
        for detector in detectors:
            self._score.remove(*labels, detector)
