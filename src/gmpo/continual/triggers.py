"""When a cycle is due: enough new rows, enough time, or anomalies of what serves."""

from __future__ import annotations

from dataclasses import dataclass

from gmpo.errors import ConfigError
from gmpo.store import Cycle, Store

__all__ = ["Triggers", "due"]

_DRIFT_LEVELS = ("warning", "critical")


@dataclass(frozen=True, kw_only=True)
class Triggers:
    """What begins a cycle; any of them does, and without any a cycle is always due.

    Attributes:
        min_rows: so many rows that no cycle had yet; None does not look at them.
        every_seconds: so long after the newest cycle began; None does not look at the time.
        on_drift: an anomaly of level "warning" or "critical", of the version that serves, since the
            newest cycle began.
    """

    min_rows: int | None = None
    every_seconds: float | None = None
    on_drift: bool = False

    def __post_init__(self) -> None:
        for name, value in (("min_rows", self.min_rows), ("every_seconds", self.every_seconds)):
            if value is not None and not value > 0:
                raise ConfigError(f"the trigger {name} is {value}; it must be above 0")

    @property
    def any_is_set(self) -> bool:
        """Whether there is one."""
        return self.on_drift or self.min_rows is not None or self.every_seconds is not None


def due(
    store: Store, name: str, triggers: Triggers, *, num_new: int, data_digest: str, now: float
) -> str | None:
    """Why a cycle is due now, in a sentence; None if none is.

    With triggers, no new row begins none, nor does a batch that began a cycle already.

    Args:
        store: of cycles, champions and anomalies.
        name: of the model.
        triggers: that are set.
        num_new: rows that no earlier cycle had, of the data there are.
        data_digest: of all rows of the data.
        now: unix seconds.
    """
    if not triggers.any_is_set:
        return "asked for"
    if not num_new:
        return None
    cycles = store.cycles(name)
    if any(cycle.payload["request"].get("data_digest") == data_digest for cycle in cycles):
        return None
    newest = cycles[-1] if cycles else None
    if triggers.min_rows is not None and num_new >= triggers.min_rows:
        return f"{num_new} new rows, at least {triggers.min_rows} wanted"
    if triggers.every_seconds is not None:
        waited = None if newest is None else now - newest.created
        if waited is None:
            return "no cycle has been run yet"
        if waited >= triggers.every_seconds:
            return f"{waited:.0f} seconds since cycle {cycles[-1].number}"
    if triggers.on_drift:
        return _drift(store, name, newest)
    return None


def _drift(store: Store, name: str, newest: Cycle | None) -> str | None:
    """An anomaly of the model's champion, in a sentence.

    Anomalies without a version are those of training runs, of a gateway's memory, and of requests
    that reached no model: new weights are no remedy for them. A version that serves no more left
    with what was wrong with it; what lasts is soon told of its successor.
    """
    champion = store.champion(name)
    if champion is None:
        return None
    events = store.events(
        kinds=["anomaly"],
        since=None if newest is None else newest.created,
        model_version=champion.version,
        newest_first=True,
    )
    for event in events:
        if event.payload["level"] in _DRIFT_LEVELS:
            return f"an anomaly of level {event.payload['level']} of version {champion.version}"
    return None
