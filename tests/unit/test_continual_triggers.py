"""When a cycle is due."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gmpo.continual.triggers import Triggers, due
from gmpo.errors import ConfigError
from gmpo.store import Event, ModelVersion, Store, open_store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(str(tmp_path / "store.db")) as opened:
        yield opened


def asked(store: Store, triggers: Triggers, **changes) -> str | None:
    facts = {"num_new": 50, "data_digest": "new", "now": 0.0, **changes}
    return due(store, "bot", triggers, **facts)


def ended_cycle(store: Store, digest: str = "old") -> float:
    begun = store.begin_cycle("bot", state="a", payload={"request": {"data_digest": digest}})
    store.move_cycle(begun, state="refused", payload=begun.payload, ends=True)
    return begun.created


def anomaly(level: str, time: float, version: str | None = "v1") -> Event:
    payload = {"level": level, "severity": 0.5}
    return Event(kind="anomaly", time=time, payload=payload, model_version=version)


def serve(store: Store, version: str, *, name: str = "bot", instead_of: str | None = None) -> None:
    row = ModelVersion(
        version=version, created=0.0, name=name, path="", parent=None, lineage={}, metrics={}
    )
    store.put_model_version(row)
    store.set_champion(name, expected=instead_of, version=version, reason={})


def test_without_triggers_a_cycle_is_always_due(store: Store):
    ended_cycle(store, "new")
    assert asked(store, Triggers()) == "asked for"


def test_enough_rows_are_due_once(store: Store):
    assert asked(store, Triggers(min_rows=51)) is None
    assert asked(store, Triggers(min_rows=50)) == "50 new rows, at least 50 wanted"
    ended_cycle(store, "new")
    assert asked(store, Triggers(min_rows=50)) is None
    assert asked(store, Triggers(min_rows=50), data_digest="newer") is not None


def test_enough_time_is_due(store: Store):
    triggers = Triggers(every_seconds=60)
    assert asked(store, triggers) == "no cycle has been run yet"
    assert asked(store, triggers, num_new=0) is None
    begun = ended_cycle(store)
    assert asked(store, triggers, now=begun + 59) is None
    assert asked(store, triggers, now=begun + 60) == "60 seconds since cycle 1"


def test_an_anomaly_since_the_newest_cycle_is_due(store: Store):
    triggers = Triggers(on_drift=True)
    serve(store, "v1")
    begun = ended_cycle(store)
    store.add_events([anomaly("critical", begun - 5), anomaly("ok", begun + 5)])
    assert asked(store, triggers) is None
    store.add_events([anomaly("warning", begun + 6)])
    assert asked(store, triggers) == "an anomaly of level warning of version v1"


def test_an_anomaly_of_another_model_of_the_store_is_not_due(store: Store):
    triggers = Triggers(on_drift=True)
    serve(store, "v1")
    serve(store, "w1", name="other")
    begun = ended_cycle(store)
    store.add_events([anomaly("critical", begun + 5, "w1")])
    assert asked(store, triggers) is None
    facts = {"num_new": 50, "data_digest": "new", "now": 0.0}
    told = due(store, "other", triggers, **facts)
    assert told == "an anomaly of level critical of version w1"
    assert due(store, "without a champion", triggers, **facts) is None


def test_an_anomaly_that_is_not_of_the_version_that_serves_is_not_due(store: Store):
    triggers = Triggers(on_drift=True)
    serve(store, "v1")
    begun = ended_cycle(store)
    # Of a run that gmpo monitor watches, of a gateway's memory, of requests that reached no model.
    store.add_events([anomaly("critical", begun + 4, None), anomaly("critical", begun + 5, "v1")])
    serve(store, "v2", instead_of="v1")
    assert asked(store, triggers) is None
    store.add_events([anomaly("critical", begun + 6, "v2")])
    assert asked(store, triggers) == "an anomaly of level critical of version v2"


def test_a_trigger_that_means_nothing_is_refused():
    with pytest.raises(ConfigError, match="min_rows is 0"):
        Triggers(min_rows=0)
