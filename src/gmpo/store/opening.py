"""Opening a store by path or URL; its tables are made the first time."""

from __future__ import annotations

import importlib.util
import sqlite3
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import (
    URL,
    Connection,
    Engine,
    create_engine,
    event,
    func,
    insert,
    inspect,
    select,
    update,
)
from sqlalchemy import make_url as parse_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.pool import QueuePool

from gmpo.errors import ConfigError, DependencyError, StoreError
from gmpo.store.database import Store
from gmpo.store.event_rows import EVENT_LOCK
from gmpo.store.faults import faults_named
from gmpo.store.tables import SCHEMA, SCHEMA_VERSION, TABLES
from gmpo.store.write_ahead_log import use_write_ahead_log

__all__ = ["open_store"]

_CREATION_LOCK = EVENT_LOCK + 1

_STATEMENT_SECONDS = 600
"""A statement on PostgreSQL may take so long: a report that reads, or a purge that deletes, many
millions of events needs minutes, and what takes longer hangs."""


def open_store(url: str, *, read_only: bool = False, timeout_seconds: float = 10.0) -> Store:
    """The store at a path or URL; a new one is made unless it is only to be read.

    Args:
        url: a path or `sqlite:///PATH` for SQLite, `postgresql://USER:PASSWORD@HOST/DATABASE` for
            PostgreSQL (extra `postgres`).
        read_only: refuse every write, and make nothing.
        timeout_seconds: how long a call waits for other processes, above 0.

    Raises:
        ConfigError: the URL is of another database, or names no file.
        DependencyError: PostgreSQL was asked for and its driver is missing.
        StoreError: there is no store to read, it cannot be opened or reached, or it was made by a
            newer version of gmpo.
        StoreLocked: another process held the store for longer than the time-out.
    """
    if not timeout_seconds > 0:
        raise ConfigError(f"timeout_seconds is {timeout_seconds}; it must be above 0")
    target = _target(url)
    if isinstance(target, Path):
        where = str(target)
        engine = _sqlite_engine(target, read_only=read_only, timeout_seconds=timeout_seconds)
    else:
        where = _without_passwords(target)
        engine = _postgres_engine(target, read_only=read_only, timeout_seconds=timeout_seconds)
    with ExitStack() as on_failure:
        on_failure.callback(engine.dispose)
        with faults_named(where):
            _prepare(engine, where, read_only=read_only, timeout_seconds=timeout_seconds)
        on_failure.pop_all()
    return Store(engine, where=where, read_only=read_only)


def _target(url: str) -> Path | URL:
    """A file for SQLite, a URL for PostgreSQL."""
    allowed = "a path, sqlite:///PATH or postgresql://USER:PASSWORD@HOST/DATABASE"
    if "://" not in url:
        path: str | None = url
    else:
        try:
            parsed = parse_url(url)
        except (ArgumentError, ValueError):
            # The text may hold a password, so it is not repeated.
            raise ConfigError(f"the store's URL cannot be read; it must be {allowed}") from None
        if parsed.drivername in ("postgresql", "postgresql+psycopg"):
            if importlib.util.find_spec("psycopg") is None:
                raise DependencyError(
                    "a PostgreSQL store needs psycopg; install it with pip install 'gmpo[postgres]'"
                )
            return parsed.set(drivername="postgresql+psycopg")
        if parsed.drivername not in ("sqlite", "sqlite+pysqlite"):
            raise ConfigError(f"a store cannot be {parsed.drivername}; it must be {allowed}")
        path = parsed.database
    if not path or path == ":memory:":
        raise ConfigError(
            f"the store {url!r} names no file, and one in memory could not be shared; "
            f"it must be {allowed}"
        )
    return Path(path)


def _without_passwords(url: URL) -> str:
    """A URL to show; parameters such as `sslpassword` are left out as its password is."""
    hidden = {name: "***" for name in url.query if "password" in name}
    shown = url.update_query_dict(hidden).render_as_string(hide_password=True)
    return shown.replace("%2A%2A%2A", "***")


def _sqlite_engine(path: Path, *, read_only: bool, timeout_seconds: float) -> Engine:
    if read_only and not path.is_file():
        raise StoreError(
            f"there is no store at {path}; check the path, or make one: gmpo serve --store, gmpo "
            "registry add or gmpo ab start"
        )
    if not read_only:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"the folder of store {path} cannot be made: {error.strerror}; choose another path"
            ) from None
    address = f"file:{quote(str(path.absolute()))}?mode={'ro' if read_only else 'rwc'}"

    def connect() -> sqlite3.Connection:
        # Without an isolation level the driver begins nothing by itself; `_begin` does.
        return sqlite3.connect(
            address,
            uri=True,
            timeout=timeout_seconds,
            check_same_thread=False,
            isolation_level=None,
        )

    engine = create_engine(
        "sqlite://", creator=connect, poolclass=QueuePool, pool_timeout=timeout_seconds
    )
    event.listen(engine, "connect", _set_up_sqlite)
    event.listen(engine, "begin", _begin)
    return engine


def _set_up_sqlite(connection: Any, _record: object) -> None:
    connection.execute("PRAGMA foreign_keys = ON")
    # Texts that are deleted on request must not stay readable in the file's free pages.
    connection.execute("PRAGMA secure_delete = ON")
    # With NORMAL a champion that was just set could be gone after a power failure.
    connection.execute("PRAGMA synchronous = FULL")


def _begin(connection: Connection) -> None:
    # A transaction that begins by reading cannot wait for the write lock later: SQLite refuses it
    # at once where another process has written in between.
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _postgres_engine(url: URL, *, read_only: bool, timeout_seconds: float) -> Engine:
    seconds = max(2, round(timeout_seconds))
    # Without these a call waits for a server that went away as long as TCP does: up to hours.
    asked: dict[str, Any] = {
        "connect_timeout": seconds,
        "tcp_user_timeout": 1000 * seconds,
        "keepalives": 1,
        "keepalives_idle": max(1, seconds // 3),
        "keepalives_interval": max(1, seconds // 3),
        "keepalives_count": 3,
    }
    engine = create_engine(
        url,
        pool_pre_ping=True,  # a server that was restarted is found again
        pool_timeout=timeout_seconds,
        connect_args={name: value for name, value in asked.items() if name not in url.query},
    )

    def set_up(connection: Any, _record: object) -> None:
        connection.execute(f"SET lock_timeout = {max(1, round(timeout_seconds * 1000))}")
        for name, value in _session_limits(seconds).items():
            # What the URL, the role or the server's administrator set stays.
            connection.execute(
                "SELECT set_config(%s, %s, false) FROM pg_settings "
                "WHERE name = %s AND source = 'default'",
                (name, value, name),
            )
        if read_only:
            connection.execute("SET default_transaction_read_only = on")
        connection.commit()

    event.listen(engine, "connect", set_up)
    return engine


def _session_limits(seconds: int) -> dict[str, str]:
    """Settings by which the server ends what hangs, by name.

    A gateway that went away inside a transaction keeps its locks until the server notices, and
    nobody else could write until then.

    Args:
        seconds: of silence after which a connection is lost.
    """
    return {
        "statement_timeout": f"{_STATEMENT_SECONDS}s",
        "idle_in_transaction_session_timeout": f"{_STATEMENT_SECONDS}s",
        "tcp_user_timeout": f"{seconds}s",
        "tcp_keepalives_idle": str(max(1, seconds // 3)),
        "tcp_keepalives_interval": str(max(1, seconds // 3)),
        "tcp_keepalives_count": "3",
    }


def _prepare(engine: Engine, where: str, *, read_only: bool, timeout_seconds: float) -> None:
    """Make the tables that are missing; refuse a store of a newer version."""
    if read_only:
        with engine.begin() as connection:
            version = _schema_version(connection)
        if version is None:
            raise StoreError(
                f"{where} holds no store yet; check the address, or make one: gmpo serve --store, "
                "gmpo registry add or gmpo ab start"
            )
    else:
        if engine.dialect.name == "sqlite":
            use_write_ahead_log(engine, where, timeout_seconds=timeout_seconds)
        with engine.execution_options(writes=True).begin() as connection:
            if engine.dialect.name == "postgresql":
                connection.execute(select(func.pg_advisory_xact_lock(_CREATION_LOCK)))
            version = _schema_version(connection)
            if version is None:
                TABLES.create_all(connection)
                connection.execute(insert(SCHEMA), {"version": SCHEMA_VERSION})
                version = SCHEMA_VERSION
            elif version < SCHEMA_VERSION:
                # Every change of the schema so far is a table more.
                TABLES.create_all(connection)
                connection.execute(update(SCHEMA).values(version=SCHEMA_VERSION))
                version = SCHEMA_VERSION
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"store {where} has schema {version}, but this gmpo knows only {SCHEMA_VERSION}; "
            "it was made by a newer gmpo: install that one, or name another store"
        )


def _schema_version(connection: Connection) -> int | None:
    if not inspect(connection).has_table(SCHEMA.name):
        return None
    version: int = connection.execute(select(SCHEMA.c.version)).scalar_one()
    return version
