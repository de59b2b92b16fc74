"""A gateway whose backend breaks: anomalies in `/metrics` and in the store."""

from __future__ import annotations

from pathlib import Path

import httpx2
import pytest
from tests.gateways import BreakingBackend, router_of, running_gateway

from gmpo.monitoring import answer_blocks
from gmpo.serving.anomaly_watch import AnomalyWatch, stored_baselines
from gmpo.serving.breaker import BreakerRules
from gmpo.serving.figures import GatewayFigures
from gmpo.serving.recording import EventWriter
from gmpo.store import Event, open_store


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of twenty answers, however fast they come."""
    monkeypatch.setattr(answer_blocks, "BLOCK_SECONDS", 0.0)


def ask(client: httpx2.Client, times: int) -> set[int]:
    asked = {"model": "tiny", "prompt": "2+3=", "max_tokens": 4}
    return {client.post("/v1/completions", json=asked).status_code for _ in range(times)}


def level(exposition: str) -> float:
    (line,) = [one for one in exposition.splitlines() if one.startswith("gmpo_anomaly_level{")]
    assert 'model_version="ab12"' in line
    return float(line.split()[-1])


def test_a_backend_that_breaks_is_an_anomaly_in_metrics_and_store(tmp_path: Path):
    path = str(tmp_path / "store.db")
    store = open_store(path)
    writer = EventWriter(store)
    figures = GatewayFigures(events=writer.counts)
    watch = AnomalyWatch(figures, put=writer.put)
    backend = BreakingBackend()
    # An opened breaker would answer in the backend's place, also once that is mended.
    router = router_of(backend, BreakerRules(failures=1000))
    with (
        running_gateway(router=router, observers=(watch.observe,)) as gateway,
        gateway.client() as client,
    ):
        assert ask(client, 20) == {200}
        assert level(figures.exposition().decode()) == 0
        backend.is_broken = True
        # What never reached the engine counts against the model that should have answered.
        assert ask(client, 40) == {503}
        assert level(figures.exposition().decode()) == 2
        backend.is_broken = False
        assert ask(client, 40) == {200}
        assert level(figures.exposition().decode()) == 0
    writer.close()
    events = store.events(kinds=["anomaly"])
    store.close()
    assert [event.payload["level"] for event in events] == ["critical", "ok"]
    assert {event.model_version for event in events} == {"ab12"}
    first = events[0].payload
    assert first["severity"] == pytest.approx(0.9)
    assert first["families"]["performance"] == {"success_drop": 1.0}
    assert first["families"]["importance_ratio"] == {}
    assert first["recommended_actions"][0].startswith("read `error` of recent answers")
    assert first["gateway"] == events[1].payload["gateway"]


def test_what_was_learned_is_there_after_a_restart(tmp_path: Path):
    learned = {"success_drop": {"center": 1.0, "scale": 0.005}}
    later = {"success_drop": {"center": 0.9, "scale": 0.01}}
    with open_store(str(tmp_path / "store.db")) as store:
        for number, (version, detectors) in enumerate(
            [("ab12", learned), ("cd34", learned), ("ab12", later), (None, learned)]
        ):
            payload = {"variant": "tiny", "detectors": detectors, "gateway": "g"}
            store.add_events(
                [Event(kind="baseline", time=float(number), payload=payload, model_version=version)]
            )
        found = stored_baselines(store)
    assert {key.model_version: value for key, value in found.items()} == {
        "ab12": later,
        "cd34": learned,
    }
