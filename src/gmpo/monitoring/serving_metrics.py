"""What Prometheus is told about answers, by the version of the model that gave them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector

__all__ = ["ServingMetrics"]

_BY_MODEL = ("model_version", "variant")
_CLIENT_GONE = 499
_FINISH_REASONS = ("stop", "length")
_LATENCY_SECONDS = (0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300, 600)
_FIRST_TOKEN_SECONDS = (0.02, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60)
_SHARES = tuple(tenth / 10 for tenth in range(1, 11))


class ServingMetrics:
    """Counts and distributions of answers, and the process's memory.

    Labels are few and have few values, so that neither users nor texts can make a new series:
    `model_version`, `variant`, `route`, and `finish_reason`, which is "stop", "length", "error" (a
    status of 500 or more), "refused" (one of 400 to 498: what was asked is not allowed, or too
    much), "client_gone" (499) or "other".

    Args:
        registry: where they are exposed; a registry holds one of these.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._answers = Counter(
            "gmpo_answers",
            "Answers that are over, however they ended",
            (*_BY_MODEL, "route", "finish_reason"),
            registry=registry,
        )
        self._fallbacks = Counter(
            "gmpo_fallbacks",
            "Answers given by another model or engine than the one asked first",
            _BY_MODEL,
            registry=registry,
        )
        self._tokens = Counter(
            "gmpo_completion_tokens", "Tokens of completions", _BY_MODEL, registry=registry
        )
        self._latency = Histogram(
            "gmpo_answer_latency_seconds",
            "From the request to the end of a whole answer",
            _BY_MODEL,
            buckets=_LATENCY_SECONDS,
            registry=registry,
        )
        self._first_token = Histogram(
            "gmpo_first_token_seconds",
            "From the request to the first text of a stream",
            _BY_MODEL,
            buckets=_FIRST_TOKEN_SECONDS,
            registry=registry,
        )
        self._quality = Histogram(
            "gmpo_answer_quality",
            "Quality score of whole answers, where they have one",
            _BY_MODEL,
            buckets=_SHARES,
            registry=registry,
        )
        self._token_probability = Histogram(
            "gmpo_answer_token_probability",
            "Geometric mean of the probabilities of a whole answer's tokens",
            _BY_MODEL,
            buckets=_SHARES,
            registry=registry,
        )
        # Linux alone tells these; elsewhere there is nothing to expose.
        ProcessCollector(namespace="gmpo", registry=registry)

    def answered(self, payload: Mapping[str, Any], *, model_version: str | None) -> None:
        """Count an answer that is over.

        Args:
            payload: of its "answer" event (docs/store.md).
            model_version: that answered; None, where none was reached, is exposed as "none".
        """
        labels = {
            "model_version": model_version or "none",
            "variant": payload["served_variant"] or "none",
        }
        self._answers.labels(
            **labels, route=payload["route"], finish_reason=_finish_reason(payload)
        ).inc()
        if payload["fell_back"]:
            self._fallbacks.labels(**labels).inc()
        if payload["completion_tokens"] is not None:
            self._tokens.labels(**labels).inc(payload["completion_tokens"])
        if payload["first_token_s"] is not None:
            self._first_token.labels(**labels).observe(payload["first_token_s"])
        # Refusals are fast and cuts are slow: only whole answers say how fast answers are.
        if payload["status"] >= 400:
            return
        self._latency.labels(**labels).observe(payload["latency_s"])
        if payload["quality"] is not None:
            self._quality.labels(**labels).observe(payload["quality"])
        if payload["mean_logprob"] is not None:
            self._token_probability.labels(**labels).observe(math.exp(payload["mean_logprob"]))


def _finish_reason(payload: Mapping[str, Any]) -> str:
    if payload["status"] == _CLIENT_GONE:
        return "client_gone"
    if payload["status"] >= 500:
        return "error"
    # Apart from failures: one client's mistakes shall wake nobody.
    if payload["status"] >= 400:
        return "refused"
    reason: str | None = payload["finish_reason"]
    return reason if reason in _FINISH_REASONS else "other"
