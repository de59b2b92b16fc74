"""The store's tables; rows become records and records rows here.

JSON is kept as ASCII text, so that SQLite and PostgreSQL hold the same and any string survives.
Names begin with `gmpo_`, because trackers that may share a PostgreSQL database have tables called
`experiments` and `model_versions` too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Row,
    Table,
    Text,
)
from sqlalchemy.dialects import postgresql, sqlite

from gmpo.errors import DataError
from gmpo.store.records import (
    AlertRow,
    Champion,
    Cycle,
    Event,
    Experiment,
    Lease,
    ModelVersion,
)

__all__ = [
    "ALERTS",
    "CHAMPIONS",
    "CYCLES",
    "EVENTS",
    "EXPERIMENTS",
    "LEASES",
    "MODEL_VERSIONS",
    "SCHEMA",
    "SCHEMA_VERSION",
    "TABLES",
    "insert_into",
    "row_of",
    "to_alert",
    "to_champion",
    "to_cycle",
    "to_event",
    "to_experiment",
    "to_model_version",
]

SCHEMA_VERSION = 2
"""Of the tables below; a newer store is refused, an older one gets the tables that it lacks."""

TABLES = MetaData()

SCHEMA = Table(
    "gmpo_schema",
    TABLES,
    Column("version", Integer, primary_key=True, autoincrement=False),
)

EVENTS = Table(
    "gmpo_events",
    TABLES,
    # SQLite numbers rows by itself only if the key's type is INTEGER.
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("kind", Text, nullable=False),
    Column("time", Double, nullable=False),
    Column("model_version", Text),
    Column("experiment", Text),
    Column("unit", Text),
    Column("request_id", Text),
    Column("payload", Text, nullable=False),
)
Index("gmpo_events_by_kind", EVENTS.c.kind, EVENTS.c.time)
Index("gmpo_events_by_time", EVENTS.c.time)
for _column in (EVENTS.c.model_version, EVENTS.c.experiment, EVENTS.c.request_id):
    # Most events lack some of these; rows without one need no place in its index.
    Index(
        f"gmpo_events_by_{_column.name}",
        _column,
        sqlite_where=_column.is_not(None),
        postgresql_where=_column.is_not(None),
    )

MODEL_VERSIONS = Table(
    "gmpo_model_versions",
    TABLES,
    Column("version", Text, primary_key=True),
    Column("created", Double, nullable=False),
    Column("name", Text, nullable=False, index=True),
    Column("path", Text, nullable=False),
    Column("parent", Text),
    Column("lineage", Text, nullable=False),
    Column("metrics", Text, nullable=False),
)

# One row a change, the champion being the newest: the key lets one writer win each revision.
CHAMPIONS = Table(
    "gmpo_champions",
    TABLES,
    Column("name", Text, primary_key=True),
    Column("revision", Integer, primary_key=True, autoincrement=False),
    Column("version", Text, ForeignKey(MODEL_VERSIONS.c.version), nullable=False),
    Column("previous", Text, ForeignKey(MODEL_VERSIONS.c.version)),
    Column("since", Double, nullable=False),
    Column("reason", Text, nullable=False),
)

EXPERIMENTS = Table(
    "gmpo_experiments",
    TABLES,
    Column("name", Text, primary_key=True),
    Column("created", Double, nullable=False),
    Column("status", Text, nullable=False),
    Column("config", Text, nullable=False),
    Column("decision", Text),
)

ALERTS = Table(
    "gmpo_alerts",
    TABLES,
    Column("fingerprint", Text, primary_key=True),
    Column("status", Text, nullable=False, index=True),
    Column("severity", Text, nullable=False),
    Column("starts_at", Double, nullable=False),
    Column("ends_at", Double),
    Column("payload", Text, nullable=False),
)

CYCLES = Table(
    "gmpo_cycles",
    TABLES,
    Column("name", Text, primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("state", Text, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("created", Double, nullable=False),
    Column("changed", Double, nullable=False),
    Column("ended", Double),
    Column("payload", Text, nullable=False),
)

LEASES = Table(
    "gmpo_leases",
    TABLES,
    Column("name", Text, primary_key=True),
    Column("holder", Text, nullable=False),
    Column("until", Double, nullable=False),
)


def insert_into(connection: Connection, table: Table) -> sqlite.Insert | postgresql.Insert:
    """An INSERT that knows ON CONFLICT, which each dialect has for itself."""
    if connection.dialect.name == "sqlite":
        return sqlite.insert(table)
    return postgresql.insert(table)


def row_of(
    record: Event | ModelVersion | Champion | Experiment | AlertRow | Cycle | Lease,
) -> dict[str, Any]:
    """A record's columns by name; an event's `id` is left to the database.

    Raises:
        DataError: a field that a database cannot hold; the field is named.
    """
    # Not `dataclasses.asdict`, which would copy payloads deeply for nothing.
    fields = {name: value for name, value in vars(record).items() if name != "id"}
    what = type(record).__name__
    return {name: _stored(value, f"{what}.{name}") for name, value in fields.items()}


def _stored(value: object, field: str) -> object:
    if isinstance(value, dict):
        return _json(value, field)
    if isinstance(value, str):
        return _text(value, field)
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{field} is {value}; it must be a finite number of unix seconds")
    return value


def _text(value: str, field: str) -> str:
    """PostgreSQL holds no NUL, and neither database a lone surrogate."""
    if "\0" in value:
        raise DataError(f"{field} is {value!r}, which holds a NUL character; leave it out")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{field} is {value!r}, which is no valid Unicode text") from None
    return value


def _json(value: Mapping[str, Any], field: str) -> str:
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(
            f"{field} is not JSON: {error}; it may hold None, booleans, finite numbers, strings, "
            "lists and dictionaries of these"
        ) from None


def to_event(row: Row[Any]) -> Event:
    """The event that a row of `EVENTS` holds."""
    named = row._mapping
    return Event(**{**named, "payload": json.loads(named["payload"])})


def to_model_version(row: Row[Any]) -> ModelVersion:
    """The version that a row of `MODEL_VERSIONS` holds."""
    named = row._mapping
    return ModelVersion(
        **{
            **named,
            "lineage": json.loads(named["lineage"]),
            "metrics": json.loads(named["metrics"]),
        }
    )


def to_champion(row: Row[Any]) -> Champion:
    """The champion that a row of `CHAMPIONS` holds."""
    named = row._mapping
    return Champion(**{**named, "reason": json.loads(named["reason"])})


def to_experiment(row: Row[Any]) -> Experiment:
    """The experiment that a row of `EXPERIMENTS` holds."""
    named = row._mapping
    decision = named["decision"]
    return Experiment(
        **{
            **named,
            "config": json.loads(named["config"]),
            "decision": None if decision is None else json.loads(decision),
        }
    )


def to_alert(row: Row[Any]) -> AlertRow:
    """The alert that a row of `ALERTS` holds."""
    named = row._mapping
    return AlertRow(**{**named, "payload": json.loads(named["payload"])})


def to_cycle(row: Row[Any]) -> Cycle:
    """The cycle that a row of `CYCLES` holds."""
    named = row._mapping
    return Cycle(**{**named, "payload": json.loads(named["payload"])})
