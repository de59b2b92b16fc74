"""The store on SQLite and on a real PostgreSQL: what is written comes back, whoever else writes."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.forks import FORKS

from gmpo.errors import (
    ChampionMoved,
    ConfigError,
    DataError,
    StoreError,
    StoreLocked,
)
from gmpo.store import AlertRow, Event, Experiment, ModelVersion, open_store
from gmpo.store.cycles import _alone
from gmpo.store.database import DELETABLE
from gmpo.store.event_rows import append_events
from gmpo.store.tables import row_of


def event(number: int, kind: str = "answer", **fields) -> Event:
    return Event(kind=kind, time=float(number), payload={"number": number}, **fields)


def version(digest: str, *, name: str = "bot", parent: str | None = None) -> ModelVersion:
    return ModelVersion(
        version=digest,
        created=1.5,
        name=name,
        path=f"/models/{digest}",
        parent=parent,
        lineage={"recipe": "quickstart", "rounds": 24},
        metrics={"accuracy": 0.7},
    )


def numbers(events: list[Event]) -> list[int]:
    return [one.payload["number"] for one in events]


def test_events_come_back_in_order_and_whole(store_url: str):
    first = event(3, model_version="v1", experiment="e", unit="u", request_id="r")
    second = event(1, kind="outcome")
    with open_store(store_url) as store:
        store.add_events([first, second])
        store.add_events([])
        read = store.events()
    assert read == [first, second]
    assert read[0].id is not None
    assert read[1].id is not None
    assert read[0].id < read[1].id


def test_every_filter_selects_what_it_says(store_url: str):
    with open_store(store_url) as store:
        store.add_events(
            [
                event(0, model_version="v1"),
                event(1, kind="outcome", model_version="v2", experiment="e", request_id="r1"),
                event(2, experiment="e", request_id="r2"),
                event(3, kind="exposure"),
            ]
        )
        ids = [one.id for one in store.events()]
        assert numbers(store.events(kinds=["answer"])) == [0, 2]
        assert numbers(store.events(kinds=["answer", "exposure"])) == [0, 2, 3]
        assert numbers(store.events(kinds=[])) == []
        assert numbers(store.events(since=1.0)) == [1, 2, 3]
        assert numbers(store.events(until=1.0)) == [0]
        assert numbers(store.events(after_id=ids[1])) == [2, 3]
        assert numbers(store.events(model_version="v2")) == [1]
        assert numbers(store.events(experiment="e", kinds=["outcome"])) == [1]
        assert numbers(store.events(request_id="r2")) == [2]
        assert numbers(store.events(limit=3, newest_first=True)) == [3, 2, 1]
        assert store.count_events() == 4
        assert store.count_events(experiment="e", since=2.0) == 1


# NUL cannot be kept by PostgreSQL, and is refused in names; in payloads JSON escapes it.
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(payload=st.dictionaries(st.text(), values, max_size=4))
def test_any_json_survives(store_url: str, payload: dict):
    written = Event(kind="metric", time=0.0, payload=payload)
    with open_store(store_url) as store:
        store.add_events([written])
        assert store.events(limit=1, newest_first=True) == [written]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (Event(kind="a", time=0.0, payload={"x": float("nan")}), "payload is not JSON"),
        (Event(kind="a", time=0.0, payload={"x": object()}), "payload is not JSON"),
        (Event(kind="a", time=float("inf"), payload={}), "time is inf"),
        (Event(kind="a\0", time=0.0, payload={}), "NUL"),
        (Event(kind="a", time=0.0, payload={}, unit="\ud800"), "no valid Unicode"),
    ],
)
def test_what_no_database_holds_is_refused_and_nothing_written(store_url: str, wrong, said: str):
    with open_store(store_url) as store:
        with pytest.raises(DataError, match=said):
            store.add_events([event(1), wrong])
        assert store.events() == []


def test_a_model_version_never_changes(store_url: str):
    with open_store(store_url) as store:
        store.put_model_version(version("a"))
        store.put_model_version(replace(version("a"), created=9.0))
        with pytest.raises(DataError, match="another path"):
            store.put_model_version(replace(version("a"), path="/elsewhere"))
        store.put_model_version(version("b", name="other", parent="a"))
        assert store.model_version("a") == version("a")
        assert store.model_version("c") is None
        assert [one.version for one in store.model_versions()] == ["a", "b"]
        assert store.model_versions("other") == [version("b", name="other", parent="a")]


def test_a_champion_is_replaced_only_by_who_knows_it(store_url: str):
    with open_store(store_url) as store:
        for digest in ("a", "b", "c"):
            store.put_model_version(version(digest))
        assert store.champion("bot") is None
        first = store.set_champion("bot", expected=None, version="a", reason={"gate": "first"})
        assert (first.version, first.previous, first.revision) == ("a", None, 1)
        second = store.set_champion("bot", expected="a", version="b", reason={})
        with pytest.raises(ChampionMoved, match="is b, not a as expected") as moved:
            store.set_champion("bot", expected="a", version="c", reason={})
        assert (moved.value.expected, moved.value.found) == ("a", "b")
        with pytest.raises(ChampionMoved, match="not none yet"):
            store.set_champion("bot", expected=None, version="c", reason={})
        assert store.champion("bot") == second
        assert store.champion_history("bot") == [first, second]
        back = store.set_champion("bot", expected="b", version="a", reason={"why": "complaints"})
        assert (back.version, back.previous, back.revision) == ("a", "b", 3)


def test_a_champion_must_be_a_registered_version_of_that_model(store_url: str):
    with open_store(store_url) as store:
        store.put_model_version(version("a", name="other"))
        with pytest.raises(DataError, match="not registered"):
            store.set_champion("bot", expected=None, version="z", reason={})
        with pytest.raises(DataError, match="one of 'other'"):
            store.set_champion("bot", expected=None, version="a", reason={})
        with pytest.raises(DataError, match="before and after"):
            store.set_champion("bot", expected="a", version="a", reason={})
        assert store.champion_history("bot") == []


def test_experiments_and_alerts_are_replaced_by_name(store_url: str):
    running = Experiment(name="e", created=2.0, status="running", config={"weights": [0.5, 0.5]})
    stopped = replace(running, status="stopped", decision={"what": "promote"})
    firing = AlertRow(
        fingerprint="f",
        status="firing",
        severity="warning",
        starts_at=1.0,
        ends_at=None,
        payload={},
    )
    resolved = replace(firing, status="resolved", ends_at=5.0)
    other = replace(firing, fingerprint="g", starts_at=0.5)
    with open_store(store_url) as store:
        store.put_experiment(running, expected=None)
        assert store.experiments() == [running]
        store.put_experiment(stopped, expected=running)
        assert store.experiment("e") == stopped
        assert store.experiment("unknown") is None
        for alert in (firing, other, resolved):
            store.put_alert(alert)
        assert store.alerts() == [other, resolved]
        assert store.alerts("firing") == [other]


def test_a_store_is_read_while_another_writes_it(store_url: str):
    with open_store(store_url) as writer, open_store(store_url, read_only=True) as reader:
        for number in range(5):
            writer.add_events([event(number)])
            assert numbers(reader.events()) == list(range(number + 1))
        with pytest.raises(StoreError, match="read-only"):
            reader.add_events([event(9)])


def test_threads_share_one_store(store_url: str):
    with open_store(store_url) as store:

        def work(start: int) -> None:
            for number in range(start, start + 25):
                store.add_events([event(number)])

        threads = [threading.Thread(target=work, args=(25 * place,)) for place in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(numbers(store.events())) == list(range(100))


def write_many(url: str, start: int) -> None:
    with open_store(url, timeout_seconds=60.0) as store:
        for number in range(start, start + 30, 3):
            store.add_events([event(one) for one in range(number, number + 3)])


def test_processes_write_at_once_and_nothing_is_lost(store_url: str):
    # None has made the tables: all of them try.
    workers = [FORKS.Process(target=write_many, args=(store_url, 30 * place)) for place in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    with open_store(store_url) as store:
        read = numbers(store.events())
    assert sorted(read) == list(range(120))
    # One call's events stand together: its transaction was whole.
    assert all(b == a + 1 for a, b in itertools.pairwise(read) if a % 3 != 2)


def race(url: str, own: str, rounds: int) -> None:
    """Try to follow champion a, b, c ... by one's own version; exit with the number of wins."""
    wins = 0
    with open_store(url, timeout_seconds=60.0) as store:
        for _ in range(rounds):
            now = store.champion("bot")
            known = now.version if now else None
            if known == own:
                time.sleep(0.001)
                continue
            try:
                store.set_champion("bot", expected=known, version=own, reason={"by": own})
                wins += 1
            except ChampionMoved:
                pass
    os._exit(wins)


def test_of_many_promoters_one_wins_each_revision(store_url: str):
    rivals = ["a", "b", "c", "d"]
    with open_store(store_url) as store:
        for digest in rivals:
            store.put_model_version(version(digest))
    workers = [FORKS.Process(target=race, args=(store_url, digest, 15)) for digest in rivals]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    with open_store(store_url) as store:
        history = store.champion_history("bot")
    assert sum(worker.exitcode or 0 for worker in workers) == len(history) >= 1
    assert [one.revision for one in history] == list(range(1, len(history) + 1))
    for before, after in itertools.pairwise(history):
        assert after.previous == before.version != after.version


KILLED = """
import os, signal, sys
from sqlalchemy import insert
from gmpo.store import open_store
from gmpo.store.tables import EVENTS, row_of
from gmpo.store import Event
store = open_store(sys.argv[1])
store.add_events([Event(kind="a", time=0.0, payload={"number": 0})])
with store._writing() as connection:
    connection.execute(insert(EVENTS), [row_of(Event(kind="a", time=1.0, payload={"number": 1}))])
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_killed_inside_a_transaction_leaves_nothing_of_it(store_url: str):
    killed = subprocess.run([sys.executable, "-c", KILLED, store_url], check=False)
    assert killed.returncode == -signal.SIGKILL
    with open_store(store_url) as store:
        store.add_events([event(2)])
        assert numbers(store.events()) == [0, 2]


def test_a_locked_store_says_so_after_its_time_out(store_url: str):
    with open_store(store_url) as holder, open_store(store_url, timeout_seconds=0.3) as store:
        with holder._writing() as connection:
            if connection.dialect.name == "postgresql":
                connection.exec_driver_sql("LOCK TABLE gmpo_events IN EXCLUSIVE MODE")
            with pytest.raises(StoreLocked, match="nothing was written"):
                store.add_events([event(1)])
        store.add_events([event(2)])
        assert numbers(store.events()) == [2]


def test_a_newer_schema_is_refused(store_url: str):
    open_store(store_url).close()
    with open_store(store_url) as store, store._writing() as connection:
        connection.exec_driver_sql("UPDATE gmpo_schema SET version = 99")
    with pytest.raises(StoreError, match="schema 99"):
        open_store(store_url)


def test_a_closed_store_and_one_of_another_process_are_refused(store_url: str):
    store = open_store(store_url)
    pid = os.fork()
    if pid == 0:  # the child must not run pytest's own ending
        try:
            store.events()
        except StoreError as error:
            os._exit(0 if "after the fork" in str(error) else 1)
        os._exit(2)
    assert os.waitpid(pid, 0)[1] == 0
    store.close()
    with pytest.raises(StoreError, match="was closed"):
        store.events()


# Only SQLite


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "store.db"


def test_what_is_no_store_is_refused(tmp_path: Path, path: Path):
    with pytest.raises(StoreError, match="there is no store at"):
        open_store(str(path), read_only=True)
    assert not path.parent.exists()
    noise = tmp_path / "noise.db"
    noise.write_bytes(b"no database at all" * 400)
    with pytest.raises(StoreError, match="no SQLite database or is damaged"):
        open_store(str(noise))
    other = tmp_path / "other.db"
    connection = sqlite3.connect(other)
    connection.execute("CREATE TABLE t (a)")
    connection.close()
    with pytest.raises(StoreError, match="holds no store yet"):
        open_store(str(other), read_only=True)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("mysql://host/db", "cannot be mysql"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("", "names no file"),
        ("postgresql://me:secret@host:port/db", "cannot be read"),
        ("://", "cannot be read"),
    ],
)
def test_other_urls_are_refused(url: str, said: str):
    with pytest.raises(ConfigError, match=said):
        open_store(url)


def test_a_server_that_is_not_there_is_named_without_its_password():
    with pytest.raises(StoreError, match="cannot be reached") as refused:
        open_store("postgresql://me:secret@127.0.0.1:9/none", timeout_seconds=2.0)
    assert "secret" not in str(refused.value)
    with pytest.raises(StoreError, match=r"password=\*\*\*") as refused:
        open_store("postgresql://me@127.0.0.1:9/none?password=secret", timeout_seconds=2.0)
    assert "secret" not in str(refused.value)


def test_a_limit_and_kinds_are_checked(path: Path):
    with open_store(str(path)) as store:
        with pytest.raises(ConfigError, match="limit is 0"):
            store.events(limit=0)
        with pytest.raises(ConfigError, match="must be a list of kinds"):
            store.events(kinds="answer")


def test_texts_can_be_deleted_and_nothing_else_can(store_url: str):
    with open_store(store_url) as store:
        store.add_events(
            [
                event(1, kind="text", request_id="a"),
                event(2, kind="verdict", request_id="a"),
                event(3, kind="text", request_id="b"),
                event(4, kind="answer", request_id="a"),
                event(5, kind="text", request_id="c"),
            ]
        )
        newest = store.events()[-1].id
        assert newest is not None
        assert store.delete_events(["text"], until=3.0, dry_run=True) == 1
        assert store.delete_events(["text"], until=3.0) == 1
        assert store.delete_events(["text", "verdict"], request_id="a") == 1
        assert store.delete_events(["text"], request_id="c") == 1
        assert store.delete_events(["text"], request_id="c") == 0
        assert [one.kind for one in store.events()] == ["text", "answer", *["purge"] * 3]
        with pytest.raises(DataError, match="events of kind 'answer' are never deleted"):
            store.delete_events(["text", "answer"])
        # Whoever had read all of them before the newest went still misses nothing.
        store.add_events([event(6)])
        assert numbers(store.events(after_id=newest, kinds=["answer"])) == [6]


def test_a_purge_of_the_newest_events_hides_nothing_from_who_had_read_them(store_url: str):
    with open_store(store_url) as store:
        of_one = [event(number, kind, request_id="a") for number, kind in enumerate(DELETABLE)]
        store.add_events([event(9), *of_one])
        newest = store.events()[-1].id
        assert store.delete_events(DELETABLE, request_id="a") == 2
        store.add_events([event(10)])
        assert [one.kind for one in store.events(after_id=newest)] == ["purge", "answer"]


def test_a_purge_waits_for_whoever_numbers_events(store_url: str):
    with open_store(store_url) as holder, open_store(store_url, timeout_seconds=0.3) as store:
        store.add_events([event(1, kind="text")])
        with holder._writing() as connection:
            append_events(connection, [row_of(event(2))])
            with pytest.raises(StoreLocked):
                store.delete_events(["text"])
        assert store.delete_events(["text"]) == 1
        assert [one.kind for one in store.events()] == ["answer", "purge"]


# Only PostgreSQL


def test_a_server_that_went_away_is_noticed_by_both_ends(postgres_url: str):
    limits = "SELECT name, setting FROM pg_settings WHERE name = ANY(%s)"
    names = ["statement_timeout", "idle_in_transaction_session_timeout", "tcp_user_timeout"]
    with open_store(postgres_url, timeout_seconds=6.0) as store, store._reading() as connection:
        found = connection.exec_driver_sql(limits, (names,)).all()
        assert {name: int(value) for name, value in found} == dict(
            zip(names, (600_000, 600_000, 6000), strict=True)
        )
        driver = connection.connection.driver_connection
        assert driver is not None
        with socket.socket(fileno=os.dup(driver.fileno())) as wire:
            assert wire.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 6000
            assert wire.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert wire.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 2


def test_limits_that_the_url_sets_stay(postgres_url: str):
    url = f"{postgres_url}?tcp_user_timeout=9000&options=-cstatement_timeout%3D50"
    with open_store(url) as store:
        with store._reading() as connection:
            driver = connection.connection.driver_connection
            assert driver is not None
            with socket.socket(fileno=os.dup(driver.fileno())) as wire:
                assert wire.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 9000
        with (
            pytest.raises(StoreError, match=r"ended a statement \(.*statement timeout"),
            store._reading() as connection,
        ):
            connection.exec_driver_sql("SELECT pg_sleep(5)")


def test_a_lease_is_not_given_back_while_another_takes_it(postgres_url: str):
    with open_store(postgres_url) as holder, open_store(postgres_url, timeout_seconds=0.3) as store:
        lease = store.take_lease("cycle", holder="a", seconds=60.0)
        with holder._writing() as connection:
            _alone(connection)  # as whoever takes one does before it looks whether it is there
            with pytest.raises(StoreLocked):
                store.drop_lease(lease)
        store.drop_lease(lease)
        assert store.lease("cycle") is None
