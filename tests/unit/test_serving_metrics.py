"""What Prometheus is told about answers; every figure below is counted by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from gmpo.monitoring.serving_metrics import ServingMetrics


def payload(**changes: Any) -> dict[str, Any]:
    return {
        "route": "chat",
        "served_variant": "candidate",
        "fell_back": False,
        "status": 200,
        "finish_reason": "stop",
        "completion_tokens": 7,
        "latency_s": 1.5,
        "first_token_s": None,
        "quality": None,
        "mean_logprob": None,
    } | changes


def figures(*payloads: dict[str, Any], version: str | None = "ab12") -> CollectorRegistry:
    registry = CollectorRegistry()
    metrics = ServingMetrics(registry)
    for one in payloads:
        metrics.answered(one, model_version=version)
    return registry


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(
        name, {"model_version": "ab12", "variant": "candidate", **labels}
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "stop"),
        ({"finish_reason": "length"}, "length"),
        ({"finish_reason": "made up by an upstream"}, "other"),
        ({"status": 499, "finish_reason": None}, "client_gone"),
        ({"status": 400, "finish_reason": None}, "refused"),
        ({"status": 429, "finish_reason": None}, "refused"),
        ({"status": 500, "finish_reason": None}, "error"),
        ({"status": 502, "finish_reason": "stop"}, "error"),
    ],
)
def test_an_answer_is_counted_by_how_it_ended(changes: dict[str, Any], reason: str):
    registry = figures(payload(**changes))
    assert value(registry, "gmpo_answers_total", route="chat", finish_reason=reason) == 1


def test_only_whole_answers_say_how_fast_and_how_good_answers_are():
    whole = payload(quality=0.84, mean_logprob=math.log(0.25), first_token_s=0.3)
    cut = payload(status=502, latency_s=600.0, quality=0.1, mean_logprob=-9.0)
    registry = figures(whole, cut)
    assert value(registry, "gmpo_answer_latency_seconds_count") == 1
    assert value(registry, "gmpo_answer_latency_seconds_sum") == 1.5
    assert value(registry, "gmpo_answer_latency_seconds_bucket", le="1.0") == 0
    assert value(registry, "gmpo_answer_latency_seconds_bucket", le="2.0") == 1
    assert value(registry, "gmpo_first_token_seconds_sum") == 0.3
    assert value(registry, "gmpo_answer_quality_sum") == 0.84
    assert value(registry, "gmpo_answer_token_probability_sum") == pytest.approx(0.25)
    # What a cut answer cost was spent all the same.
    assert value(registry, "gmpo_completion_tokens_total") == 14


def test_fallbacks_are_counted_and_unknown_models_have_a_name():
    registry = figures(
        payload(fell_back=True),
        payload(served_variant=None, completion_tokens=None, status=503),
        version=None,
    )
    by = {"model_version": "none", "variant": "candidate"}
    assert registry.get_sample_value("gmpo_fallbacks_total", by) == 1
    failed = {"model_version": "none", "variant": "none", "route": "chat", "finish_reason": "error"}
    assert registry.get_sample_value("gmpo_answers_total", failed) == 1
    assert registry.get_sample_value("gmpo_process_resident_memory_bytes") > 1e6
