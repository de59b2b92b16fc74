"""A full disk under SQLite and a real PostgreSQL: what was there stays, and no write is torn."""

from __future__ import annotations

import os
import secrets
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from tests.disks import fill, small_disk

from gmpo.errors import StoreFull
from gmpo.store import Event, Store, open_store

MOST_WRITES = 2_000


def event(number: int) -> Event:
    # Drawn: a text that repeats is kept in less room.
    return Event(kind="a", time=0.0, payload={"number": number, "text": secrets.token_hex(2_000)})


def numbers(store: Store) -> list[int]:
    return [one.payload["number"] for one in store.events()]


def write_until_full(store: Store) -> int:
    """How many writes of two events each were whole before one found no room."""
    for write in range(MOST_WRITES):
        try:
            store.add_events([event(2 * write), event(2 * write + 1)])
        except StoreFull as error:
            assert "the disk is full" in str(error)
            return write
    raise AssertionError("the disk was never full")


@pytest.fixture
def disk() -> Iterator[Path]:
    """A file system that a server's user may reach, which the folders of tests are not."""
    with tempfile.TemporaryDirectory(prefix="gmpo-disk-", dir="/tmp") as name:
        Path(name).chmod(0o755)
        with small_disk(Path(name) / "disk", kilobytes=64_000) as mounted:
            yield mounted


@pytest.fixture
def on_tablespace(disk: Path, postgres_server: str) -> Iterator[str]:
    """A new database of the server whose tables and indexes lie on the disk."""
    shutil.chown(disk, "postgres", "postgres")
    name = f"full_{os.getpid()}"
    with psycopg.connect(postgres_server, autocommit=True) as connection:
        connection.execute(f"CREATE TABLESPACE {name} LOCATION '{disk}'")
        connection.execute(f"CREATE DATABASE {name} TABLESPACE {name}")
        try:
            yield postgres_server.removesuffix("postgres") + name
        finally:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
            connection.execute(f"DROP TABLESPACE {name}")


@pytest.fixture(params=["sqlite", "postgresql"])
def url_on_disk(request: pytest.FixtureRequest, disk: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{disk / 'store.db'}"
    url: str = request.getfixturevalue("on_tablespace")
    return url


def test_a_full_disk_takes_all_of_a_write_or_nothing_and_goes_on_once_there_is_room(
    url_on_disk: str, disk: Path
):
    with open_store(url_on_disk) as store:
        store.add_events([event(-1)])
        fill(disk, leave=500_000)
        written = write_until_full(store)
        assert 0 < written < MOST_WRITES
        whole = [-1, *range(2 * written)]
        assert numbers(store) == whole
        (disk / "filler").unlink()
        store.add_events([event(2 * written)])
        assert numbers(store) == [*whole, 2 * written]


# Without a disk of its own, which only root can mount.


def test_a_file_that_may_not_grow_keeps_what_was_there(tmp_path: Path):
    path = tmp_path / "store.db"
    with open_store(str(path)) as store:
        store.add_events([event(1)])
        pages = sqlite3.connect(path).execute("PRAGMA page_count").fetchone()[0]
    # The limit belongs to a connection, as the free space does to a disk.
    with open_store(str(path)) as store:
        limit_pages(store, pages + 2)
        with pytest.raises(StoreFull, match="disk is full"):
            store.add_events([Event(kind="a", time=2.0, payload={"text": "x" * 100_000})])
        limit_pages(store, 1_000_000)
        store.add_events([event(3)])
        assert numbers(store) == [1, 3]


def limit_pages(store: Store, count: int) -> None:
    with store._reading() as connection:
        connection.exec_driver_sql(f"PRAGMA max_page_count = {count}")
