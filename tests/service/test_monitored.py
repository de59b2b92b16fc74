"""Runs and a real store looked at together: what is wrong, and what is kept of it."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.commands import gmpo, jsonl, refusal
from tests.registries import decision, model_folder

from gmpo.monitored import Monitored
from gmpo.monitoring.alerts import (
    Alert,
    AlertTimes,
    Condition,
    Notification,
    Now,
    advance,
    firing_labels,
)
from gmpo.registry import Registry
from gmpo.store import Event, Store, open_store

TIMES = AlertTimes(fire_after=0, resolve_after=0)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(str(tmp_path / "store.db"), timeout_seconds=0.05) as opened:
        yield opened


def anomaly(level: str, time: float, **changes: Any) -> Event:
    payload = {
        "level": level,
        "severity": 0.8,
        "families": {},
        "signals": {
            "quality_drop": {"value": 0.512, "baseline": 0.8, "score": 1.0},
            "success_drop": {"value": 1.0, "baseline": 1.0, "score": 0.0},
        },
        "recommended_actions": ["read recent answers"],
        "variant": "control",
        "gateway": "g1",
    }
    return Event(kind="anomaly", time=time, payload=payload | changes, model_version="ab12")


def labelled(conditions: list[Condition]) -> list[tuple[str, str]]:
    return [(one.labels["alertname"], one.severity) for one in conditions]


class Monitor:
    """Looks, and keeps what it tells."""

    def __init__(self, seen: Monitored) -> None:
        self.seen = seen
        self.alerts: dict[str, Alert] = {}

    def look(self, now: float) -> list[Notification]:
        at = Now(monotonic=now, unix=now)
        self.alerts, told = advance(self.alerts, self.seen.look(now), now=at, times=TIMES)
        self.seen.keep(told, firing=firing_labels(self.alerts))
        return told


def test_an_anomaly_lasts_until_it_is_over_or_its_gateway_is_gone(store: Store):
    seen = Monitored([], store)
    store.add_events([anomaly("warning", 100.0)])
    (found,) = seen.look(160.0)
    assert found.labels == {
        "alertname": "GmpoServingAnomaly",
        "model_version": "ab12",
        "variant": "control",
    }
    assert found.severity == "warning"
    assert found.annotations["summary"] == "quality_drop: 0.512, usually 0.8"
    assert found.annotations["action"] == "read recent answers"
    # The same from another gateway; the more severe one counts when alerts are made of them.
    store.add_events([anomaly("critical", 150.0, gateway="g2")])
    assert {one.severity for one in seen.look(160.0)} == {"warning", "critical"}
    store.add_events([anomaly("ok", 170.0, gateway="g2")])
    assert [one.severity for one in seen.look(180.0)] == ["warning"]
    # Not told again for over five minutes.
    assert seen.look(401.0) == []


def test_what_is_told_is_kept_as_it_stands_and_as_events(store: Store):
    monitor = Monitor(Monitored([], store))
    store.add_events([anomaly("critical", 100.0)])
    monitor.look(110.0)
    (row,) = store.alerts()
    assert (row.status, row.severity, row.starts_at, row.ends_at) == (
        "firing",
        "critical",
        110,
        None,
    )
    assert row.payload["labels"]["variant"] == "control"
    store.add_events([anomaly("ok", 120.0)])
    monitor.look(130.0)
    (row,) = store.alerts()
    assert (row.status, row.ends_at) == ("resolved", 130.0)
    changes = store.events(kinds=["alert"])
    assert [one.payload["status"] for one in changes] == ["firing", "resolved"]
    assert {one.model_version for one in changes} == {"ab12"}


def test_a_monitor_that_starts_ends_what_another_left_firing_and_no_more(store: Store):
    store.add_events([anomaly("critical", 100.0)])
    Monitor(Monitored([], store)).look(110.0)
    other = {"alertname": "GmpoRewardDrop", "run": "/another/run", "severity": "critical"}
    monitor = Monitor(Monitored([], store))
    monitor.seen.keep([], firing=[])
    assert [row.status for row in store.alerts()] == ["resolved"]
    Monitor(Monitored([], store)).look(110.0)
    assert [row.status for row in store.alerts()] == ["firing"]
    kept = Notification(
        status="firing", labels=other, annotations={}, starts_at=0.0, ends_at=None, valid_until=9e9
    )
    monitor.seen.keep([kept], firing=[other])
    Monitor(Monitored([], store)).look(1000.0)
    left = {row.payload["labels"]["alertname"]: row.status for row in store.alerts()}
    assert left == {"GmpoRewardDrop": "firing", "GmpoServingAnomaly": "resolved"}


def test_a_locked_store_loses_no_change(store: Store, tmp_path: Path):
    monitor = Monitor(Monitored([], store))
    store.add_events([anomaly("critical", 100.0)])
    with sqlite3.connect(tmp_path / "store.db", isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        monitor.look(110.0)
        assert (store.alerts(), monitor.seen.num_unwritten) == ([], 1)
        assert labelled(monitor.seen.look(111.0)) == [
            ("GmpoServingAnomaly", "critical"),
            ("GmpoStoreUnusable", "critical"),
        ]
        other.execute("ROLLBACK")
    other.close()
    monitor.look(120.0)
    assert monitor.seen.num_unwritten == 0
    assert [row.status for row in store.alerts()] == ["firing"]
    assert labelled(monitor.seen.look(121.0)) == [("GmpoServingAnomaly", "critical")]


def test_what_lasts_fires_on_where_the_store_was_locked_at_the_first_look(
    store: Store, tmp_path: Path
):
    store.add_events([anomaly("critical", 100.0), anomaly("warning", 100.0, variant="other")])
    Monitor(Monitored([], store)).look(110.0)
    store.add_events([anomaly("ok", 115.0, variant="other")])
    monitor = Monitor(Monitored([], store))
    with sqlite3.connect(tmp_path / "store.db", isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        monitor.look(120.0)
        other.execute("ROLLBACK")
    other.close()
    monitor.look(130.0)
    left = {row.payload["labels"].get("variant"): row.status for row in store.alerts()}
    # None is the store's own, which was unusable at the first look.
    assert left == {"control": "firing", "other": "resolved", None: "firing"}


def test_a_runs_level_is_an_event_when_it_changes(store: Store, tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.toml").touch()
    broken = {"kind": "round", "round": 1, "rollout/mismatch_mean": 9.0}
    jsonl(run / "metrics.jsonl", [broken])
    seen = Monitored([run], store)
    for now in (1.0, 2.0):
        assert labelled(seen.look(now)) == [("GmpoSamplerMismatch", "critical")]
    jsonl(
        run / "metrics.jsonl", [broken, {"kind": "round", "round": 2, "rollout/mismatch_mean": 0}]
    )
    assert seen.look(3.0) == []
    events = store.events(kinds=["anomaly"])
    assert [one.payload["level"] for one in events] == ["critical", "ok"]
    assert events[0].payload["run"] == str(run)
    assert events[0].payload["families"]["importance_ratio"] == {"sampler_mismatch": 1.0}


def test_a_damaged_champion_is_told_and_stays_the_registrys_alert(store: Store, tmp_path: Path):
    registry = Registry(store, tmp_path / "models")
    first, second = (
        registry.add(model_folder(tmp_path / str(value), value), name="bot") for value in (1.0, 2.0)
    )
    registry.adopt("bot", first.version, reason="first")
    evidence = decision(first.version, second.version)
    registry.submit("bot", evidence, approval="auto")
    (Path(second.path) / "config.json").unlink()
    assert registry.servable("bot").version == first.version
    monitor = Monitor(Monitored([], store))
    (told,) = monitor.look(time.time())
    assert (told.status, told.labels["alertname"], told.labels["model"]) == (
        "firing",
        "ChampionDamaged",
        "bot",
    )
    assert "config.json is missing" in told.annotations["summary"]
    assert told.annotations["summary"].endswith(f"serving: {first.version}")
    action = told.annotations["action"]
    assert f"go back to version {first.version} (gmpo registry rollback bot --store " in action
    assert action.endswith(" --reason WHY)")
    (row,) = store.alerts()
    assert (row.fingerprint, row.status) == ("registry/bot", "firing")
    registry.rollback("bot", expected_champion=second.version, reason="damaged")
    assert registry.servable("bot").version == first.version
    (over,) = monitor.look(time.time())
    assert over.status == "resolved"
    assert [row.status for row in store.alerts()] == ["resolved"]


def test_one_look_at_what_is_well_says_so(store: Store):
    result = gmpo("monitor", "--store", store.where, "--once")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == "note: nothing is wrong now: no alert fires, and none has ended\n"


def test_the_command_looks_at_a_store_and_refuses_what_is_none(store: Store, tmp_path: Path):
    store.add_events([anomaly("critical", time.time())])
    result = gmpo("monitor", "--store", store.where, "--once")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == (
        "firing critical GmpoServingAnomaly ab12 control: quality_drop: 0.512, usually 0.8; "
        "read recent answers\n"
    )
    assert [row.status for row in store.alerts()] == ["firing"]
    assert "nothing to monitor" in refusal("monitor", "--once")
    assert "there is no store at" in refusal("monitor", "--store", tmp_path / "no.db", "--once")
    assert not (tmp_path / "no.db").exists()


def test_a_run_near_a_bound_is_told_once(store: Store, tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.toml").touch()
    monitor = Monitor(Monitored([run], store))
    lines: list[dict[str, Any]] = []
    told = []
    # 0.6 (0.8 - fraction) / 0.3: 0.38, 0.42, 0.38 and so on; a warning is entered at 0.4.
    for look, fraction in enumerate((0.61, 0.59, 0.61, 0.59, 0.61, 0.59)):
        for _ in range(5):  # the median of five rounds counts
            number = len(lines) + 1
            lines.append({"kind": "round", "round": number})
            lines[-1]["ratio/effective_sample_fraction"] = fraction
        jsonl(run / "metrics.jsonl", lines)
        told += [(one.status, one.labels["alertname"]) for one in monitor.look(float(look))]
    assert told == [("firing", "GmpoRatioSpread")]
    (event,) = store.events(kinds=["anomaly"])
    assert event.payload["level"] == "warning"
