"""The store's alert of a champion whose files are damaged: begun, kept, ended."""

from __future__ import annotations

import time
from collections.abc import Sequence

from gmpo.registry.advice import commands_for, way_out
from gmpo.registry.files import FileCheck
from gmpo.store import AlertRow, Event, Store

__all__ = ["end_damage", "tell_damage"]


def tell_damage(
    store: Store, name: str, checks: Sequence[FileCheck], *, instead: str | None
) -> None:
    """Begin or keep the alert, with an event where it changed.

    Args:
        store: that holds it.
        name: of the model.
        checks: of the damaged versions, the champion first.
        instead: whole version before them; None if there is none.
    """
    summary = "; ".join(check.sentence for check in checks)
    actions = [way_out(commands_for(store, name), instead=instead)]
    _put(store, name, summary, serving=instead or "nothing", actions=actions)


def end_damage(store: Store, name: str, *, serving: str, summary: str) -> None:
    """End the alert if it is there: the champion is whole.

    Args:
        store: that holds it.
        name: of the model.
        serving: version of the champion.
        summary: what ended it.
    """
    _put(store, name, summary, serving=serving, actions=[])


def _put(store: Store, name: str, summary: str, *, serving: str, actions: list[str]) -> None:
    fingerprint = f"registry/{name}"
    rows = {row.fingerprint: row for row in store.alerts(status="firing")}
    firing = rows.get(fingerprint)
    is_damaged = bool(actions)
    if not is_damaged and firing is None:
        return
    now = time.time()
    payload = {
        "labels": {"alertname": "ChampionDamaged", "model": name},
        "annotations": {"summary": summary, "serving": serving},
        "recommended_actions": actions,
    }
    if is_damaged and firing is not None and firing.payload == payload:
        return
    row = AlertRow(
        fingerprint=fingerprint,
        status="firing" if is_damaged else "resolved",
        severity="critical",
        starts_at=now if firing is None else firing.starts_at,
        ends_at=None if is_damaged else now,
        payload=payload,
    )
    store.put_alert(row)
    told = {"fingerprint": fingerprint, "status": row.status, **payload}
    store.add_events([Event(kind="alert", time=now, payload=told)])
