"""What is wrong now, read from the store: anomalies that gateways told, damaged champions."""

from __future__ import annotations

from gmpo.errors import StoreError
from gmpo.monitoring.alerts import Condition
from gmpo.store import AlertRow, Event, Store

__all__ = ["CHAMPION_DAMAGED", "store_conditions", "unusable_store"]

CHAMPION_DAMAGED = "ChampionDamaged"
"""Alert that the registry itself begins and ends in the store."""

_FRESH_SECONDS = 300.0
"""Gateways tell what lasts again each minute: what is older was left by one that ended."""


def store_conditions(store: Store, *, now: float) -> list[Condition]:
    """Anomalies that last, of every gateway that writes to the store, and damaged champions.

    Args:
        store: open.
        now: unix seconds, of a clock not far from the gateways'.

    Raises:
        StoreError: it cannot be read.
    """
    newest: dict[tuple[str | None, ...], Event] = {}
    for event in store.events(kinds=["anomaly"], since=now - _FRESH_SECONDS):
        told_by = event.payload.get("gateway")
        if told_by is not None:  # those of training runs are told by the runs themselves
            newest[told_by, event.model_version, event.payload["variant"]] = event
    anomalies = [event for event in newest.values() if event.payload["level"] != "ok"]
    damaged = [
        row
        for row in store.alerts(status="firing")
        if row.payload["labels"]["alertname"] == CHAMPION_DAMAGED
    ]
    return [*map(_condition, anomalies), *map(_damage, damaged)]


def unusable_store(where: str, error: StoreError) -> Condition:
    """The condition of a store that can no longer be read or written."""
    return Condition(
        labels={"alertname": "GmpoStoreUnusable", "store": where},
        severity="critical",
        annotations={
            "summary": str(error),
            "action": "see whether the store is locked, full or gone",
        },
    )


def _condition(event: Event) -> Condition:
    payload = event.payload
    return Condition(
        labels={
            "alertname": "GmpoServingAnomaly",
            "model_version": event.model_version or "none",
            "variant": payload["variant"] or "none",
        },
        severity=payload["level"],
        annotations={
            "summary": "; ".join(_sentences(event)) or "the level is about to be left",
            "action": "; ".join(payload["recommended_actions"]) or "wait for the next blocks",
        },
    )


def _damage(row: AlertRow) -> Condition:
    annotations = row.payload["annotations"]
    return Condition(
        labels=row.payload["labels"],
        severity="critical",
        annotations={
            "summary": f"{annotations['summary']}; serving: {annotations['serving']}",
            "action": "; ".join(row.payload["recommended_actions"]),
        },
    )


def _sentences(event: Event) -> list[str]:
    said = []
    for name, signal in event.payload["signals"].items():
        if signal["score"] > 0:
            usual = "" if signal["baseline"] is None else f", usually {signal['baseline']:.3g}"
            said.append(f"{name}: {signal['value']:.3g}{usual}")
    return said
