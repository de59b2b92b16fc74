"""What the store's events say about traffic, as columns that grow while events come."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from gmpo.store import Event

__all__ = ["EVENT_KINDS", "Traffic", "TrafficLog"]

EVENT_KINDS = ("answer", "outcome", "verdict", "feedback")
"""Kinds of events that traffic is read from."""

_FIGURES = (
    "status",
    "latency_s",
    "first_token_s",
    "completion_tokens",
    "quality",
    "mean_logprob",
    "fell_back",
)
_WHOLE = 200
_JUDGED_BY = (None, "verifier", "feedback")
"""None is of outcomes that do not say it."""
_THUMBS = {"up": 1.0, "down": 0.0}


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """N answers and M judgements; a figure that is not known is NaN.

    Attributes:
        time: when each request came, unix seconds.
        status: of HTTP; 200 is a whole answer.
        latency: seconds from the request to its end.
        first_token: seconds to the first text of a stream.
        tokens: completion tokens.
        quality: score between 0 and 1.
        mean_logprob: of the answer's tokens, nats.
        fell_back: 1 where another model or engine than the one asked first answered.
        version: place in `versions` of the model that answered; -1 where none was reached.
        versions: in the order in which they were first seen.
        judged_at: when each judged request was judged first, unix seconds.
        judgements: 1 for a success, 0 for a failure, between them as users scored.
        num_malformed: events that could not be read as what their kind says.
    """

    time: Float[np.ndarray, " N"]
    status: Float[np.ndarray, " N"]
    latency: Float[np.ndarray, " N"]
    first_token: Float[np.ndarray, " N"]
    tokens: Float[np.ndarray, " N"]
    quality: Float[np.ndarray, " N"]
    mean_logprob: Float[np.ndarray, " N"]
    fell_back: Float[np.ndarray, " N"]
    version: Int[np.ndarray, " N"]
    versions: tuple[str, ...]
    judged_at: Float[np.ndarray, " M"]
    judgements: Float[np.ndarray, " M"]
    num_malformed: int

    @property
    def is_whole(self) -> Bool[np.ndarray, " N"]:
        """Where an answer reached its end."""
        whole: Bool[np.ndarray, " N"] = self.status == _WHOLE
        return whole

    @property
    def token_probability(self) -> Float[np.ndarray, " N"]:
        """Geometric mean of the probabilities of a whole answer's tokens, exp(mean log pi)."""
        return np.where(self.is_whole, np.exp(self.mean_logprob), math.nan)


class TrafficLog:
    """Takes events in the order of their ids, each once.

    A request is judged by its outcome's success where somebody judged it, else by a verifier's
    verdict, and else by feedback; a later judgement replaces an earlier one of the same kind. What
    an outcome only presumes, or takes from a quality score or a fault, is no judgement: answers of
    which nobody knows whether they are right are no part of an accuracy.
    """

    def __init__(self) -> None:
        self._table = np.empty((0, 2 + len(_FIGURES)))
        self._versions: dict[str, int] = {}
        self._outcomes: dict[str, tuple[float, float]] = {}
        self._verdicts: dict[str, tuple[float, float]] = {}
        self._feedback: dict[str, tuple[float, float]] = {}
        self._num_malformed = 0
        self._read: Traffic | None = None

    def add(self, events: Iterable[Event]) -> None:
        """Take what is new; events of other kinds than `EVENT_KINDS` are left alone."""
        rows: list[tuple[float, ...]] = []
        for event in events:
            try:
                if event.kind == "answer":
                    rows.append(self._answer(event))
                elif event.kind == "outcome":
                    success = _share_or_none(event.payload.get("success"))
                    if event.payload.get("judged_by") in _JUDGED_BY:
                        _judge(self._outcomes, event, success)
                elif event.kind == "verdict":
                    _judge(self._verdicts, event, _share_or_none(event.payload.get("is_correct")))
                elif event.kind == "feedback":
                    _judge(self._feedback, event, _score(event.payload))
            except _MalformedEvent:
                self._num_malformed += 1
        if rows:
            block = np.array(rows, dtype=float)
            self._table = np.concatenate([self._table, block])
        self._read = None

    def traffic(self) -> Traffic:
        """Everything taken so far."""
        if self._read is None:
            judged = {**self._feedback, **self._verdicts, **self._outcomes}
            times_and_values = np.array([*judged.values()], dtype=float).reshape(-1, 2)
            columns = self._table.T
            self._read = Traffic(
                time=columns[0],
                version=columns[1].astype(int),
                status=columns[2],
                latency=columns[3],
                first_token=columns[4],
                tokens=columns[5],
                quality=columns[6],
                mean_logprob=columns[7],
                fell_back=columns[8],
                versions=tuple(self._versions),
                judged_at=times_and_values[:, 0],
                judgements=times_and_values[:, 1],
                num_malformed=self._num_malformed,
            )
        return self._read

    def _answer(self, event: Event) -> tuple[float, ...]:
        figures = [_number(event.payload.get(name)) for name in _FIGURES]
        version = -1
        if event.model_version is not None:
            version = self._versions.setdefault(event.model_version, len(self._versions))
        return (event.time, version, *figures)


class _MalformedEvent(ValueError):
    """A payload has something else where a number must be."""


def _judge(judged: dict[str, tuple[float, float]], event: Event, value: float | None) -> None:
    if value is None:
        return
    # A request counts when it was first judged, so that a trend does not change behind its end.
    key = event.request_id if event.request_id is not None else f"event {event.id}"
    first, _ = judged.get(key, (event.time, value))
    judged[key] = (first, value)


def _share_or_none(value: object) -> float | None:
    return None if value is None else _share(value)


def _score(payload: Mapping[str, Any]) -> float | None:
    """A feedback's score, or its thumb."""
    if payload.get("score") is not None:
        return _share(payload["score"])
    thumbs = payload.get("thumbs")
    if thumbs is None:
        return None
    return _THUMBS[thumbs] if thumbs in _THUMBS else _share(thumbs)


def _share(value: object) -> float:
    number = _number(value)
    if not 0 <= number <= 1:
        raise _MalformedEvent
    return number


def _number(value: object) -> float:
    """NaN for what is not known."""
    if value is None:
        return math.nan
    if not isinstance(value, int | float):
        raise _MalformedEvent
    return float(value)
