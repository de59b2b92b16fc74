"""Cycles and leases: one cycle of a model at a time, moved by whoever holds its lease."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select, update

from gmpo.errors import ConfigError, CycleMoved, LeaseHeld
from gmpo.store.records import Cycle, Lease
from gmpo.store.tables import CYCLES, LEASES, row_of, to_cycle

__all__ = [
    "begin_cycle",
    "cycles_of",
    "drop_lease",
    "lease_by_name",
    "move_cycle",
    "take_lease",
]

_LEASE_LOCK = 0x676D706F + 2
"""Key of the PostgreSQL lock under which leases and cycles change: two writers that each read
before they write could otherwise both find a lease free."""


def begin_cycle(
    connection: Connection, name: str, *, state: str, payload: dict[str, Any], lease: Lease | None
) -> Cycle:
    """Insert the model's next cycle; the arguments and errors of `Store.begin_cycle`."""
    _alone(connection)
    _require(connection, lease)
    going_on = cycles_of(connection, name, open_only=True)
    if going_on:
        raise CycleMoved(
            f"cycle {going_on[0].number} of {name!r} goes on at {going_on[0].state!r}; bring it to "
            "its end before another begins"
        )
    newest = select(func.max(CYCLES.c.number)).where(CYCLES.c.name == name)
    now = time.time()
    cycle = Cycle(
        name=name,
        number=(connection.execute(newest).scalar() or 0) + 1,
        state=state,
        revision=1,
        created=now,
        changed=now,
        ended=None,
        payload=payload,
    )
    connection.execute(insert(CYCLES), row_of(cycle))
    return cycle


def move_cycle(connection: Connection, cycle: Cycle, *, ends: bool, lease: Lease | None) -> Cycle:
    """Write a cycle's new state over the revision it was read at; see `Store.move_cycle`."""
    _alone(connection)
    _require(connection, lease)
    now = time.time()
    moved = replace(cycle, revision=cycle.revision + 1, changed=now, ended=now if ends else None)
    unmoved = update(CYCLES).where(
        CYCLES.c.name == cycle.name,
        CYCLES.c.number == cycle.number,
        CYCLES.c.revision == cycle.revision,
        CYCLES.c.ended.is_(None),
    )
    if connection.execute(unmoved.values(row_of(moved))).rowcount != 1:
        raise CycleMoved(
            f"cycle {cycle.number} of {cycle.name!r} is no longer as it was read (revision "
            f"{cycle.revision}); another process moved it; read it again"
        )
    return moved


def cycles_of(connection: Connection, name: str | None, *, open_only: bool = False) -> list[Cycle]:
    """All cycles, or those of one model, or only those that go on, by name and number."""
    query = select(CYCLES).order_by(CYCLES.c.name, CYCLES.c.number)
    if name is not None:
        query = query.where(CYCLES.c.name == name)
    if open_only:
        query = query.where(CYCLES.c.ended.is_(None))
    return [to_cycle(row) for row in connection.execute(query)]


def take_lease(connection: Connection, name: str, *, holder: str, seconds: float) -> Lease:
    """Insert or renew a lease; the arguments and errors of `Store.take_lease`."""
    if not seconds > 0:
        raise ConfigError(f"a lease of {seconds} seconds was asked for; it must be above 0")
    _alone(connection)
    found = lease_by_name(connection, name)
    now = time.time()
    if found is not None and found.holder != holder and found.until > now:
        raise LeaseHeld(name, holder=found.holder, until=found.until)
    taken = Lease(name=name, holder=holder, until=now + seconds)
    if found is None:
        connection.execute(insert(LEASES), row_of(taken))
    else:
        connection.execute(update(LEASES).where(LEASES.c.name == name).values(row_of(taken)))
    return taken


def drop_lease(connection: Connection, lease: Lease) -> None:
    """Remove the lease where its holder still has it."""
    _alone(connection)
    mine = (LEASES.c.name == lease.name, LEASES.c.holder == lease.holder)
    connection.execute(delete(LEASES).where(*mine))


def lease_by_name(connection: Connection, name: str) -> Lease | None:
    """The lease of that name, or None."""
    row = connection.execute(select(LEASES).where(LEASES.c.name == name)).one_or_none()
    return None if row is None else Lease(**row._mapping)


def _require(connection: Connection, lease: Lease | None) -> None:
    """Refuse whoever lost the lease, even if it has not noticed."""
    if lease is None:
        return
    found = lease_by_name(connection, lease.name)
    if found is None or found.holder != lease.holder:
        raise LeaseHeld(
            lease.name,
            holder=found.holder if found else None,
            until=found.until if found else None,
        )


def _alone(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(_LEASE_LOCK)))
