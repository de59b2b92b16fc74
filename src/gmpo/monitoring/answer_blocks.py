"""Answers gathered into blocks, and a block's figures as the detectors read them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

import numpy as np

from gmpo.monitoring.anomalies import Figure

__all__ = ["BLOCK_ANSWERS", "BLOCK_SECONDS", "AnswerBlock"]

BLOCK_SECONDS = 60.0
"""Shortest time that a block takes."""
BLOCK_ANSWERS = 20
"""Fewest answers of a block."""
_SMALLEST_SECONDS = 1e-6
"""Taken for a latency of 0, which coarse clocks give and which has no logarithm."""


class AnswerBlock:
    """Answers of one model version and variant, from one moment on.

    What clients did wrong (a status of 400 to 499) says nothing about answers and is left out, 408
    apart, which is an answer that took too long.

    Args:
        began: monotonic seconds.
    """

    def __init__(self, began: float) -> None:
        self.began = began
        self._successes: list[bool] = []
        self._cut: list[bool] = []
        self._log_latencies: list[float] = []
        self._qualities: list[float] = []
        self._mean_logprobs: list[float] = []

    def add(self, payload: Mapping[str, Any]) -> None:
        """Note an answer by the payload of its "answer" event."""
        status: int = payload["status"]
        if 400 <= status < 500 and status != 408:
            return
        self._successes.append(status < 400)
        if status >= 400:
            return
        self._cut.append(payload["finish_reason"] == "length")
        self._log_latencies.append(math.log(max(payload["latency_s"], _SMALLEST_SECONDS)))
        if payload["quality"] is not None:
            self._qualities.append(payload["quality"])
        if payload["mean_logprob"] is not None:
            self._mean_logprobs.append(payload["mean_logprob"])

    def is_full(self, now: float) -> bool:
        """Whether it has lasted long enough, in monotonic seconds, and holds enough answers."""
        return now - self.began >= BLOCK_SECONDS and len(self._successes) >= BLOCK_ANSWERS

    def figures(self) -> dict[str, Figure]:
        """Medians and means by signal; signals that no answer has are absent."""
        figures = {}
        for signal, values, summary in (
            ("success", self._successes, fmean),
            ("cut_share", self._cut, fmean),
            # Medians: one endless answer is no slow model.
            ("log_latency", self._log_latencies, median),
            ("log_latency_p95", self._log_latencies, _p95),
            ("quality", self._qualities, fmean),
            ("mean_logprob", self._mean_logprobs, median),
        ):
            if values:
                figures[signal] = Figure(value=summary(values), count=len(values))
        return figures


def _p95(values: Sequence[float]) -> float:
    return float(np.quantile(values, 0.95))
