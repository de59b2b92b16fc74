"""Answers as streams: whose an answer is, what is told again, and what ends."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from gmpo.monitoring.anomalies import WARM_UP_BLOCKS
from gmpo.monitoring.anomaly_metrics import AnomalyMetrics
from gmpo.monitoring.serving_monitor import PROCESS, Judgement, ServingMonitor, StreamKey

OLD = StreamKey(model_version="ab12", variant="control")
NEW = StreamKey(model_version="cd34", variant="candidate")
MEMORY = 10**9


def answer(status: int = 200, variant: str | None = "control", **changes: Any) -> dict[str, Any]:
    return {
        "served_variant": variant,
        "assigned_variant": variant,
        "status": status,
        "finish_reason": "stop",
        "latency_s": 1.5,
        "quality": 0.8,
        "mean_logprob": -0.5,
    } | changes


class Gateway:
    """Twenty answers a minute."""

    def __init__(self, monitor: ServingMonitor | None = None) -> None:
        self.monitor = monitor or ServingMonitor()
        self.now = 0.0

    def minute(self, version: str | None = "ab12", **changes: Any) -> Judgement | None:
        found = None
        for _ in range(20):
            self.now += 3.2
            judged = self.monitor.observe(answer(**changes), model_version=version, now=self.now)
            found = judged or found
        return found

    def minutes(
        self, count: int, *, version: str | None = "ab12", **changes: Any
    ) -> list[Judgement]:
        judged = [self.minute(version, **changes) for _ in range(count)]
        return [one for one in judged if one is not None]


def test_a_fault_is_news_once_and_told_again_by_each_look():
    gateway = Gateway()
    gateway.minutes(WARM_UP_BLOCKS)
    told = gateway.minutes(12, quality=0.5)
    assert [(one.report.level, one.is_news) for one in told][3:7] == [
        ("ok", False),
        ("warning", True),
        ("critical", True),
        ("critical", False),
    ]
    _, lasting = gateway.monitor.look(memory_bytes=MEMORY, now=gateway.now)
    assert (lasting.key, lasting.is_news) == (OLD, True)
    assert lasting.report == told[-1].report


def test_each_model_version_has_a_baseline_of_its_own():
    gateway = Gateway()
    learned = [one for one in gateway.minutes(WARM_UP_BLOCKS) if one.baselines is not None]
    (one,) = learned
    assert one.baselines is not None
    assert one.baselines["quality_drop"] == {"center": pytest.approx(0.8), "scale": 0.01}
    # The new version answers otherwise from its first answer on: nothing has dropped.
    calm = gateway.minutes(30, version="cd34", variant="candidate", quality=0.4)
    assert {judged.report.level for judged in calm} == {"ok"}
    assert {judged.key for judged in calm} == {NEW}
    # A gateway that starts anew knows what was learned.
    again = Gateway(ServingMonitor({OLD: one.baselines}))
    assert again.minutes(8, quality=0.5)[-1].report.level == "critical"


def test_an_answer_that_reached_no_model_belongs_to_the_variant_it_was_meant_for():
    gateway = Gateway()
    gateway.minutes(1)
    gateway.minutes(1, version="cd34", variant="candidate")
    told = gateway.minutes(2, version=None, status=503)
    assert [(one.key, one.report.level) for one in told] == [(OLD, "ok"), (OLD, "critical")]
    # Meant for nobody: it belongs to who answered last.
    told = gateway.minutes(2, version=None, variant=None, status=503)
    assert {one.key for one in told} == {OLD}
    lonely = Gateway().minutes(2, version=None, variant=None, status=503)
    assert [one.report.level for one in lonely] == ["ok", "critical"]
    assert lonely[0].key == StreamKey(model_version=None, variant=None)


def test_what_nobody_asks_any_more_is_over():
    gateway = Gateway()
    gateway.minutes(2, status=500)
    assert [one.key for one in gateway.monitor.look(memory_bytes=MEMORY, now=gateway.now)][1:] == [
        OLD
    ]
    process, over = gateway.monitor.look(memory_bytes=MEMORY, now=gateway.now + 1800)
    assert process.key == PROCESS
    assert (over.report.level, over.is_news, over.is_over) == ("ok", True, True)
    assert len(gateway.monitor.look(memory_bytes=MEMORY, now=gateway.now + 1860)) == 1


def test_a_warm_up_goes_on_after_a_pause():
    gateway = Gateway()
    gateway.minutes(WARM_UP_BLOCKS - 1)
    gateway.now += 3600
    gateway.monitor.look(memory_bytes=MEMORY, now=gateway.now)
    (learned,) = gateway.minutes(1)
    assert learned.baselines is not None
    gateway.now += 3600
    gateway.monitor.look(memory_bytes=MEMORY, now=gateway.now)
    assert gateway.minutes(8, quality=0.5)[-1].report.level == "critical"


def test_memory_that_doubles_is_a_warning_that_is_told_again():
    monitor = ServingMonitor()
    told = []
    for minute in range(WARM_UP_BLOCKS + 20):
        grown = MEMORY if minute < WARM_UP_BLOCKS else 2 * MEMORY
        (judged,) = monitor.look(memory_bytes=grown, now=60.0 * minute)
        told.append(judged)
    assert {one.key for one in told} == {PROCESS}
    assert (told[-1].report.level, told[-1].is_news) == ("warning", True)
    assert told[-1].report.families["statistical"] == {"memory_growth": 1.0}
    assert not any(one.is_news for one in told[:WARM_UP_BLOCKS])


def test_prometheus_is_told_by_stream_until_it_is_over():
    registry = CollectorRegistry()
    metrics = AnomalyMetrics(registry)
    gateway = Gateway()
    for judged in gateway.minutes(2, status=500):
        metrics.judged(judged)
    labels = {"model_version": "ab12", "variant": "control"}
    assert registry.get_sample_value("gmpo_anomaly_severity", labels) == pytest.approx(0.9)
    assert registry.get_sample_value("gmpo_anomaly_level", labels) == 2
    by_detector = {**labels, "detector": "success_drop"}
    assert registry.get_sample_value("gmpo_anomaly_score", by_detector) == 1
    for judged in gateway.monitor.look(memory_bytes=MEMORY, now=gateway.now + 1800):
        metrics.judged(judged)
    assert registry.get_sample_value("gmpo_anomaly_level", labels) is None
    assert registry.get_sample_value("gmpo_anomaly_score", by_detector) is None
    process = {"model_version": "none", "variant": "process"}
    assert registry.get_sample_value("gmpo_anomaly_level", process) == 0
