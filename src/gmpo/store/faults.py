"""What goes wrong in a database, said as the store's own errors."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from gmpo.errors import StoreError, StoreFull, StoreLocked

__all__ = ["faults_named"]

_PRIMARY = 0xFF
"""SQLite's extended error codes keep the primary one in their low byte."""


@contextmanager
def faults_named(where: str) -> Iterator[None]:
    """Turn a driver's errors into `StoreError`s that name the store.

    Broken constraints pass as they are: whoever wrote the row knows what they mean.
    """
    try:
        yield
    except IntegrityError:
        raise
    except PoolTimeout:
        raise StoreLocked(
            f"store {where}: every connection of this process stayed busy; use fewer threads"
        ) from None
    except DBAPIError as error:
        raise _named(where, error.orig) from None
    except sqlite3.Error as error:  # while a connection is set up, before SQLAlchemy wraps errors
        raise _named(where, error) from None


def _named(where: str, fault: BaseException | None) -> StoreError:
    said = " ".join(str(fault).split())
    if isinstance(fault, sqlite3.Error):
        return _of_sqlite(where, fault, said)
    import psycopg  # only its errors are left, so it is there

    if isinstance(fault, psycopg.Error):
        return _of_postgres(where, fault.sqlstate or "", said)
    return StoreError(f"store {where}: {said}")


def _of_sqlite(where: str, fault: sqlite3.Error, said: str) -> StoreError:
    code = fault.sqlite_errorcode
    primary = code & _PRIMARY
    if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return _locked(where)
    # Before a page of the shared index is used it is allocated, so that it cannot fault later.
    if primary == sqlite3.SQLITE_FULL or code == sqlite3.SQLITE_IOERR_SHMSIZE:
        return _full(where)
    if primary in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        return StoreError(
            f"store {where} is no SQLite database or is damaged ({said}); restore a copy, "
            "or name another file"
        )
    if primary in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
        return StoreError(
            f"store {where} cannot be opened or written ({said}); check that its folder exists "
            "and that this user may write there"
        )
    return StoreError(f"store {where}: {said}")


# https://www.postgresql.org/docs/current/errcodes-appendix.html
_LOCKED_STATES = ("55P03", "40P01", "40001")
_FULL_STATES = ("53100",)
_CANCELED_STATES = ("57014",)


def _of_postgres(where: str, state: str, said: str) -> StoreError:
    if state in _LOCKED_STATES:
        return _locked(where)
    if state in _FULL_STATES:
        return _full(where)
    if state in _CANCELED_STATES:
        return StoreError(
            f"store {where}: the server ended a statement ({said}); nothing was written; try "
            "again, with less at once, or raise the server's statement_timeout"
        )
    if not state or state.startswith(("08", "28", "3D", "53", "57")):
        return StoreError(
            f"store {where} cannot be reached ({said}); check that the server runs, and the "
            "URL's host, port, user, password and database"
        )
    return StoreError(f"store {where}: {said}")


def _locked(where: str) -> StoreLocked:
    return StoreLocked(
        f"store {where} stayed locked by another process until the time-out; nothing was "
        "written; try again, or end whatever holds a transaction open"
    )


def _full(where: str) -> StoreFull:
    return StoreFull(
        f"store {where}: the disk is full; nothing of this write was kept and what was there "
        "before is whole; free some space and try again"
    )
