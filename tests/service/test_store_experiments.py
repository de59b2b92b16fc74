"""Experiments in the store, on SQLite and PostgreSQL: none is written over what another wrote."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from tests.forks import FORKS

from gmpo.errors import DataError, ExperimentMoved
from gmpo.store import Event, Experiment, open_store
from gmpo.store.experiments import write_experiment

RUNNING = Experiment(name="e", created=2.0, status="running", config={"share": 0})


def change(kind: str, share: int | None = None) -> Event:
    return Event(kind=kind, time=3.0, payload={"share": share}, experiment="e")


def test_an_experiment_is_written_only_by_who_knows_it(store_url: str):
    with open_store(store_url) as store, open_store(store_url) as other:
        store.put_experiment(RUNNING, expected=None)
        with pytest.raises(ExperimentMoved, match="is an experiment 'e' already"):
            other.put_experiment(RUNNING, expected=None, event=change("weights"))
        more = replace(RUNNING, config={"share": 1})
        other.put_experiment(more, expected=RUNNING, event=change("weights", 1))
        with pytest.raises(ExperimentMoved, match="'e' was changed meanwhile by another process"):
            store.put_experiment(
                replace(RUNNING, status="stopped"), expected=RUNNING, event=change("decision")
            )
        stopped = replace(more, status="stopped", decision={"action": "wait"})
        store.put_experiment(stopped, expected=more, event=change("decision"))
        with pytest.raises(ExperimentMoved, match="'e' was stopped meanwhile; it stays as"):
            other.put_experiment(
                replace(more, config={"share": 2}), expected=more, event=change("weights", 2)
            )
        unwritable = replace(change("decision"), payload={"x": float("nan")})
        with pytest.raises(DataError, match="payload is not JSON"):
            store.put_experiment(RUNNING, expected=stopped, event=unwritable)
        absent = replace(RUNNING, name="other")
        with pytest.raises(ExperimentMoved, match="'other' is not there any more"):
            store.put_experiment(absent, expected=absent)
        assert store.experiments() == [stopped]
        assert [one.kind for one in store.events()] == ["weights", "decision"]


def test_a_write_that_waits_for_a_stop_does_not_undo_it(store_url: str):
    stopped = replace(RUNNING, status="stopped", decision={})
    refusals: list[ExperimentMoved] = []
    with open_store(store_url) as stopper, open_store(store_url) as changer:
        stopper.put_experiment(RUNNING, expected=None)

        def change_weights() -> None:
            try:
                changer.put_experiment(
                    replace(RUNNING, config={"share": 1}),
                    expected=RUNNING,
                    event=change("weights", 1),
                )
            except ExperimentMoved as error:
                refusals.append(error)

        late = threading.Thread(target=change_weights)
        with stopper._writing() as connection:
            write_experiment(connection, stopped, expected=RUNNING)
            late.start()  # it sees the experiment run, if it looks before this is committed
            late.join(timeout=0.5)
            assert late.is_alive(), "it waits for the one that stops"
        late.join()
        assert "was stopped meanwhile" in str(refusals[0])
        assert stopper.experiment("e") == stopped
        assert stopper.count_events() == 0


def raise_share(url: str, times: int) -> None:
    """Add 1 to the experiment's share so many times, whoever else does."""
    with open_store(url, timeout_seconds=60.0) as store:
        while times:
            read = store.experiment("e")
            assert read is not None
            share = read.config["share"] + 1
            try:
                store.put_experiment(
                    replace(read, config={"share": share}),
                    expected=read,
                    event=change("weights", share),
                )
            except ExperimentMoved:
                continue
            times -= 1


def test_changes_by_many_processes_each_count_once(store_url: str):
    with open_store(store_url) as store:
        store.put_experiment(RUNNING, expected=None)
    workers = [FORKS.Process(target=raise_share, args=(store_url, 10)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 3
    with open_store(store_url) as store:
        found = store.experiment("e")
        assert found is not None and found.config == {"share": 30}
        assert [one.payload["share"] for one in store.events()] == list(range(1, 31))
