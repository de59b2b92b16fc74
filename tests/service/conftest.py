"""Servers that tests start for real."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from tests.programs import missing
from tests.service.postgres import postgres_programs, running_postgres

from gmpo.registry import Registry
from gmpo.store import Store, open_store

_numbers = itertools.count()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    programs = postgres_programs()
    if programs is None:
        missing("PostgreSQL server", package="postgresql")
    with running_postgres(programs) as url:
        yield url


@pytest.fixture
def postgres_url(postgres_server: str) -> str:
    """A new database of a running server."""
    name = f"store_{os.getpid()}_{next(_numbers)}"
    with psycopg.connect(postgres_server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return postgres_server.removesuffix("postgres") + name


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a store may be made: a file, or a new database of a running server."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'store.db'}"
    url: str = request.getfixturevalue("postgres_url")
    return url


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    with open_store(store_url) as opened:
        yield opened


@pytest.fixture
def registry(store: Store, tmp_path: Path) -> Registry:
    return Registry(store, tmp_path / "models")
