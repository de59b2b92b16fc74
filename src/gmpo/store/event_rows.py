"""Events as rows: appended under rising ids, and deleted where they hold what people wrote."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, delete, func, insert, select

from gmpo.store.records import Event
from gmpo.store.tables import EVENTS, row_of

__all__ = ["EVENT_LOCK", "append_events", "purge_events"]

EVENT_LOCK = 0x676D706F
"""Key of the PostgreSQL lock under which events are numbered ("gmpo" in ASCII)."""


def append_events(connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert rows of events so that readers see them in the order of their ids."""
    if connection.dialect.name == "postgresql":
        # It numbers rows when they are inserted and shows them when they are committed;
        # without the lock a reader could pass a smaller id that is not yet there.
        connection.execute(select(func.pg_advisory_xact_lock(EVENT_LOCK)))
    connection.execute(insert(EVENTS), rows)


def purge_events(
    connection: Connection,
    conditions: Sequence[ColumnElement[bool]],
    *,
    until: float | None,
    request_id: str | None,
) -> int:
    """Delete the rows that meet all conditions, tell it in a "purge" event, and count them.

    Args:
        connection: within a transaction that writes.
        conditions: on `gmpo_events`.
        until: for the event: before when they were, in unix seconds.
        request_id: for the event: of which request.
    """
    newest = connection.execute(select(func.max(EVENTS.c.id))).scalar() or 0
    deleted = connection.execute(delete(EVENTS).where(*conditions)).rowcount
    if deleted:
        payload = {"deleted": deleted, "until": until}
        row = row_of(Event(kind="purge", time=time.time(), payload=payload, request_id=request_id))
        if connection.dialect.name == "sqlite":
            # It gives the id of a deleted row again where that was the newest.
            row["id"] = newest + 1
        append_events(connection, [row])
    return deleted
