"""What an experiment leaves behind: exposures, outcomes, shadow answers, read from events."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

__all__ = [
    "EVENT_KINDS",
    "JUDGES",
    "PRESUMED",
    "Exposure",
    "Outcome",
    "Recorded",
    "Records",
    "ShadowPair",
    "read_records",
]

EVENT_KINDS = ("exposure", "outcome", "shadow", "answer")
"""Of the events that an experiment is read from; answers serve only as the partners of shadows."""

PRESUMED = "presumed"
"""Nobody judged an answer that was served whole and is not of low quality."""
JUDGES = ("verifier", "feedback", "quality", "fault", PRESUMED)
"""What an outcome's success may come from: a verdict, what a user said, a quality score below the
threshold, an answer that could not be served, or nothing of these."""


class Recorded(Protocol):
    """An event as the store has it."""

    @property
    def kind(self) -> str:
        """One of `EVENT_KINDS`."""

    @property
    def time(self) -> float:
        """Unix seconds."""

    @property
    def payload(self) -> Mapping[str, Any]:
        """JSON values by name."""

    @property
    def unit(self) -> str | None:
        """Who was assigned."""

    @property
    def request_id(self) -> str | None:
        """The request concerned."""

    @property
    def model_version(self) -> str | None:
        """Of the weights that answered."""


@dataclass(frozen=True, kw_only=True)
class Exposure:
    """A unit was assigned a variant.

    Attributes:
        time: unix seconds.
        unit: who was assigned.
        variant: that it was assigned.
        weight: share of that variant when it was.
        covariate: a figure about the unit from before it was assigned; None if unknown.
    """

    time: float
    unit: str
    variant: str
    weight: float
    covariate: float | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one request.

    Attributes:
        time: unix seconds.
        unit: who asked.
        success: 1 or 0; None if nobody judged it. A request that was not served is a 0.
        quality: between 0 and 1; None if unknown.
        latency_seconds: until the whole answer; None where no answer came.
        session: the conversation that it belongs to; None if unknown.
        request_id: None if unknown.
        judged_by: one of `JUDGES`, from which `success` comes; None if it is not on record.
        served_variant: whose answer it was; another one than the unit's after a fallback. None if
            it is not on record.
        model_version: of the weights that answered; None if unknown.
    """

    time: float
    unit: str
    success: int | None
    quality: float | None
    latency_seconds: float | None
    session: str | None = None
    request_id: str | None = None
    judged_by: str | None = None
    served_variant: str | None = None
    model_version: str | None = None


@dataclass(frozen=True, kw_only=True)
class ShadowPair:
    """The served answer and the shadow's to the same request; each figure None if unknown.

    Attributes:
        unit: who asked; pairs of one unit are evidence together.
        served_quality: between 0 and 1.
        shadow_quality: between 0 and 1.
        served_seconds: latency.
        shadow_seconds: latency.
    """

    unit: str
    served_quality: float | None
    shadow_quality: float | None
    served_seconds: float | None
    shadow_seconds: float | None


@dataclass(frozen=True, kw_only=True)
class Records:
    """What was read, in order of time.

    Attributes:
        exposures: assignments.
        outcomes: one a request: what is known of it at last, at the time of its first outcome.
        shadow_pairs: shadow answers whose served answer is known.
        counts: what was not taken as it came: `malformed_events`, `merged_outcomes`,
            `unpaired_shadows`.
    """

    exposures: list[Exposure]
    outcomes: list[Outcome]
    shadow_pairs: list[ShadowPair] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


def read_records(events: Iterable[Recorded]) -> Records:
    """The records of one experiment's events; an event that cannot be read is counted.

    Outcomes of one request are merged: what a later one knows (feedback, say) replaces what an
    earlier one said, and a repeated one is not counted twice. A shadow answer is paired with the
    outcome of its request, or with the answer where there is no outcome.
    """
    exposures: list[Exposure] = []
    outcomes: list[Outcome] = []
    answers: dict[str, Outcome] = {}
    shadows: list[Outcome] = []
    malformed = 0
    for event in sorted(events, key=lambda event: event.time):
        try:
            if event.kind == "exposure":
                exposures.append(_exposure(event))
            elif event.kind == "outcome":
                outcomes.append(_outcome(event))
            elif event.kind == "shadow":
                shadows.append(_figures(event))
            elif event.kind == "answer" and event.request_id is not None:
                answers[event.request_id] = _figures(event)
        except _MalformedEvent:
            malformed += 1
    merged = _merged(outcomes)
    served = answers | {one.request_id: one for one in merged if one.request_id is not None}
    pairs = [
        _pair(served[shadow.request_id], shadow)
        for shadow in shadows
        if shadow.request_id in served
    ]
    return Records(
        exposures=exposures,
        outcomes=merged,
        shadow_pairs=pairs,
        counts={
            "malformed_events": malformed,
            "merged_outcomes": len(outcomes) - len(merged),
            "unpaired_shadows": len(shadows) - len(pairs),
        },
    )


class _MalformedEvent(ValueError):
    """A payload lacks what its kind must have, or has something else in its place."""


def _exposure(event: Recorded) -> Exposure:
    weight = _number(event, "weight", high=1.0)
    if weight is None:
        raise _MalformedEvent
    return Exposure(
        time=event.time,
        unit=_unit(event),
        variant=_text(event, "variant"),
        weight=weight,
        covariate=_number(event, "covariate", low=-math.inf),
    )


def _outcome(event: Recorded) -> Outcome:
    success = _number(event, "success", high=1.0)
    judged_by = event.payload.get("judged_by")
    served = event.payload.get("served_variant")
    if success not in (None, 0, 1) or judged_by not in (None, *JUDGES):
        raise _MalformedEvent
    return replace(
        _figures(event),
        unit=_unit(event),
        success=None if success is None else int(success),
        judged_by=None if success is None else judged_by,
        served_variant=None if served is None else str(served),
        model_version=event.model_version,
    )


def _figures(event: Recorded) -> Outcome:
    session = event.payload.get("session")
    return Outcome(
        time=event.time,
        unit=str(event.unit or session or event.request_id),
        success=None,
        quality=_number(event, "quality", high=1.0),
        latency_seconds=_number(event, "latency_s"),
        session=None if session is None else str(session),
        request_id=event.request_id,
    )


def _unit(event: Recorded) -> str:
    if not event.unit:
        raise _MalformedEvent
    return event.unit


def _text(event: Recorded, name: str) -> str:
    value = event.payload.get(name)
    if not isinstance(value, str) or not value:
        raise _MalformedEvent
    return value


def _number(
    event: Recorded, name: str, *, low: float = 0.0, high: float = math.inf
) -> float | None:
    value = event.payload.get(name)
    if value is None:
        return None
    if not isinstance(value, int | float) or not math.isfinite(value) or not low <= value <= high:
        raise _MalformedEvent
    return float(value)


def _merged(outcomes: list[Outcome]) -> list[Outcome]:
    found: dict[object, Outcome] = {}
    for place, one in enumerate(outcomes):
        key = (one.unit, one.request_id) if one.request_id is not None else place
        before = found.get(key)
        found[key] = one if before is None else _updated(before, one)
    return list(found.values())


def _updated(before: Outcome, after: Outcome) -> Outcome:
    return replace(
        before,
        success=before.success if after.success is None else after.success,
        judged_by=before.judged_by if after.success is None else after.judged_by,
        quality=before.quality if after.quality is None else after.quality,
        latency_seconds=(
            before.latency_seconds if after.latency_seconds is None else after.latency_seconds
        ),
        session=before.session or after.session,
        served_variant=before.served_variant or after.served_variant,
        model_version=before.model_version or after.model_version,
    )


def _pair(served: Outcome, shadow: Outcome) -> ShadowPair:
    return ShadowPair(
        unit=served.unit,
        served_quality=served.quality,
        shadow_quality=shadow.quality,
        served_seconds=served.latency_seconds,
        shadow_seconds=shadow.latency_seconds,
    )
