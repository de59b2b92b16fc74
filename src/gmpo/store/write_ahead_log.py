"""SQLite's write-ahead log: readers and one writer work at once, and what it still holds."""

from __future__ import annotations

import sqlite3
import time

from sqlalchemy import Engine

from gmpo.errors import StoreLocked

__all__ = ["empty_write_ahead_log", "use_write_ahead_log"]


def use_write_ahead_log(engine: Engine, where: str, *, timeout_seconds: float) -> None:
    """Let readers and one writer work at once; the file remembers it.

    Raises:
        StoreLocked: other processes kept the file in use.
    """
    deadline = time.monotonic() + timeout_seconds
    while True:
        connection = engine.raw_connection()
        try:
            connection.cursor().execute("PRAGMA journal_mode = WAL").close()
            return
        except sqlite3.OperationalError as error:
            # The change of mode is the one thing for which SQLite does not wait by itself.
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                raise
            if time.monotonic() > deadline:
                raise StoreLocked(
                    f"store {where} is locked by another process; end whatever uses it"
                ) from None
            time.sleep(0.01)
        finally:
            connection.close()


def empty_write_ahead_log(engine: Engine, where: str) -> None:
    """Bring the file to what the log says, and cut the log to nothing.

    Until then pages as they were before a deletion stay in the file, and in the log's old frames.

    Raises:
        StoreLocked: other processes read or wrote all the while.
    """
    connection = engine.raw_connection()
    try:
        cursor = connection.cursor()
        cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        ((is_busy, *_),) = cursor.fetchall()
        cursor.close()
    finally:
        connection.close()
    if is_busy:
        raise StoreLocked(
            f"store {where} was in use all the while, so what was deleted may still be read in its "
            f"file or in {where}-wal; delete again once no process holds a transaction open"
        )
