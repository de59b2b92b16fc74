"""What the store holds, as plain records; times are unix seconds, payloads are JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = [
    "AlertRow",
    "Champion",
    "Cycle",
    "Event",
    "Experiment",
    "ExperimentStatus",
    "Lease",
    "ModelVersion",
]

ExperimentStatus = Literal["running", "stopped"]


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened; it is written once and never changed.

    Attributes:
        kind: "answer", "exposure", "outcome" ...: what the payload means (docs/store.md).
        time: when, in unix seconds.
        payload: JSON values by name; NaN and infinity are not JSON, use None.
        model_version: of the model concerned.
        experiment: name of the experiment concerned.
        unit: whom the experiment assigned: a user, a session, a request.
        request_id: of the request concerned.
        id: set when read; later writes have larger ones. Not part of equality.
    """

    kind: str
    time: float
    payload: dict[str, Any]
    model_version: str | None = None
    experiment: str | None = None
    unit: str | None = None
    request_id: str | None = None
    id: int | None = field(default=None, compare=False)


@dataclass(frozen=True, kw_only=True)
class ModelVersion:
    """A model's weights under their digest; a version never changes once it is registered.

    Attributes:
        version: digest of the weights.
        created: unix seconds.
        name: the model that this is a version of, e.g. "support-bot".
        path: folder of the weights.
        parent: version that it was trained from, which need not be registered; None if unknown.
        lineage: where it comes from: run, recipe, data.
        metrics: figures measured before it was registered.
    """

    version: str
    created: float
    name: str
    path: str
    parent: str | None
    lineage: dict[str, Any]
    metrics: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Champion:
    """The version of a model that serves, or served from `since` until the next revision.

    Attributes:
        name: of the model.
        version: that serves.
        previous: version that served before; None for the first champion.
        revision: 1 for the first champion, then one more at each change.
        since: unix seconds.
        reason: why it was made champion: evidence of the gate or of the experiment.
    """

    name: str
    version: str
    previous: str | None
    revision: int
    since: float
    reason: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A comparison of variants under real traffic.

    Attributes:
        name: tells experiments apart.
        created: unix seconds.
        status: "running" or "stopped".
        config: variants, weights, metrics, limits.
        decision: with its evidence, once there is one.
    """

    name: str
    created: float
    status: ExperimentStatus
    config: dict[str, Any]
    decision: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class AlertRow:
    """An alert as it stands now; its changes are events of kind "alert".

    Attributes:
        fingerprint: tells alerts apart; the same trouble has the same one each time.
        status: "firing", "resolved" or what else the alert manager knows.
        severity: "warning" or "critical".
        starts_at: unix seconds.
        ends_at: unix seconds; None while it lasts.
        payload: labels, annotations, recommended actions.
    """

    fingerprint: str
    status: str
    severity: str
    starts_at: float
    ends_at: float | None
    payload: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Cycle:
    """One pass of continual learning over new data, as far as it has come.

    Attributes:
        name: of the model.
        number: of the cycle among those of the model, from 1.
        state: the step that comes next, or what became of the cycle.
        revision: changes of state so far.
        created: unix seconds.
        changed: unix seconds of the newest change.
        ended: unix seconds; None while it goes on.
        payload: what it was asked to do, what its steps reported, its result.
    """

    name: str
    number: int
    state: str
    revision: int
    created: float
    changed: float
    ended: float | None
    payload: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Lease:
    """The right to be the only one that does something, until a time.

    Attributes:
        name: what the holder alone may do.
        holder: who has it.
        until: unix seconds at which it ends unless it is renewed.
    """

    name: str
    holder: str
    until: float
