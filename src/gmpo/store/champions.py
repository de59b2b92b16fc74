"""Champions: one row a change, the newest serves."""

from __future__ import annotations

from sqlalchemy import Connection, select

from gmpo.errors import DataError
from gmpo.store.records import Champion, Event
from gmpo.store.tables import CHAMPIONS, MODEL_VERSIONS, to_champion

__all__ = ["champion_event", "champion_of", "champions_of", "refuse_other_models"]


def champion_event(champion: Champion, *, kind: str) -> Event:
    """An event that tells of a new champion."""
    payload = {
        "name": champion.name,
        "previous": champion.previous,
        "revision": champion.revision,
        "reason": champion.reason,
    }
    return Event(kind=kind, time=champion.since, payload=payload, model_version=champion.version)


def champion_of(connection: Connection, name: str) -> Champion | None:
    """The version of that model that serves now, or None."""
    newest = (
        select(CHAMPIONS)
        .where(CHAMPIONS.c.name == name)
        .order_by(CHAMPIONS.c.revision.desc())
        .limit(1)
    )
    row = connection.execute(newest).one_or_none()
    return None if row is None else to_champion(row)


def champions_of(connection: Connection, name: str, *, since_revision: int) -> list[Champion]:
    """The model's champions from a revision on, oldest first."""
    query = select(CHAMPIONS).where(
        CHAMPIONS.c.name == name, CHAMPIONS.c.revision >= since_revision
    )
    return [to_champion(row) for row in connection.execute(query.order_by(CHAMPIONS.c.revision))]


def refuse_other_models(connection: Connection, name: str, version: str) -> None:
    """Refuse a version that is not registered under that name, with a `DataError`."""
    query = select(MODEL_VERSIONS.c.name).where(MODEL_VERSIONS.c.version == version)
    registered = connection.execute(query).scalar_one_or_none()
    if registered is None:
        raise DataError(f"model version {version} is not registered; put it into the store first")
    if registered != name:
        raise DataError(
            f"model version {version} is one of {registered!r}, so it cannot be the champion "
            f"of {name!r}"
        )
