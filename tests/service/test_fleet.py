"""A release over servers: real HTTP servers that load, follow, refuse, or never come."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.fleet_servers import NAME, Server, fleet, running
from tests.registries import decision, model_folder

from gmpo.errors import PromotionRefused, ServerUnreachable
from gmpo.fleet import Fleet, FleetServer
from gmpo.registry import Registry
from gmpo.store import ModelVersion

# The pointer's own moves are tested on both kinds of store in test_registry.py.
pytestmark = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)


@pytest.fixture
def versions(registry: Registry, tmp_path: Path) -> tuple[ModelVersion, ModelVersion]:
    old, new = (
        registry.add(model_folder(tmp_path / f"run-{value}", value), name=NAME)
        for value in (1.0, 2.0)
    )
    registry.adopt(NAME, old.version, reason="first")
    return old, new


def release(one: Fleet, registry: Registry, pair: tuple[ModelVersion, ModelVersion]) -> None:
    old, new = pair
    one.release(
        registry,
        new,
        expected_champion=old.version,
        evidence=decision(old.version, new.version),
    )


def test_adapters_are_loaded_everywhere_before_the_pointer_moves(registry, store, versions):
    old, new = versions
    servers = [Server(), Server()]
    with running(*servers):
        for server in servers:
            server.versions = [old.version]
        told: list[str] = []
        release(fleet(*servers, told=told), registry, versions)
        for server in servers:
            assert server.posted == [
                ("/v1/load_lora_adapter", {"lora_name": new.version, "lora_path": new.path}),
                ("/v1/unload_lora_adapter", {"lora_name": old.version}),
            ]
            assert server.versions == [new.version] and server.keys == {"Bearer secret"}
    assert store.champion(NAME).version == new.version
    assert told == [f"{server.url} reports version {new.version}" for server in servers]


def test_a_server_that_refuses_an_adapter_stops_the_release(registry, store, versions):
    old, new = versions
    good, bad = Server(), Server(refuses=True)
    with running(good, bad):
        with pytest.raises(ServerUnreachable, match="no adapter there"):
            release(fleet(good, bad), registry, versions)
        assert good.versions == []  # taken away again
    assert store.champion(NAME).version == old.version
    assert len(registry.history(NAME)) == 1
    assert new.version not in good.versions


def test_gateways_that_follow_are_waited_for(registry, store, versions):
    slow, quick = Server(store=store, late_by=5), Server(store=store)
    with running(slow, quick):
        release(fleet(slow, quick), registry, versions)
        assert slow.versions == quick.versions == [versions[1].version]
    assert store.champion(NAME).version == versions[1].version


def test_a_gateway_that_does_not_come_takes_the_release_back(registry, store, versions):
    old, new = versions
    adapters, stuck = Server(), Server(store=store, refuses=True)
    stuck.versions = [old.version]
    with running(adapters, stuck):
        with pytest.raises(ServerUnreachable, match=r"did not report .* pass the gate again"):
            release(fleet(adapters, stuck, patience=0.1), registry, versions)
        assert adapters.versions == []
    assert store.champion(NAME).version == old.version
    kinds = [row.reason["kind"] for row in registry.history(NAME)]
    assert kinds == ["adoption", "promotion", "rollback"]
    assert stuck.url in registry.history(NAME)[-1].reason["why"] and new
    with pytest.raises(PromotionRefused, match="taken back"):
        release(fleet(), registry, versions)


def test_a_release_without_evidence_leaves_no_adapter_behind(registry, store, versions):
    old, new = versions
    server = Server()
    with running(server):
        with pytest.raises(PromotionRefused):
            fleet(server).release(
                registry,
                new,
                expected_champion=old.version,
                evidence=decision(old.version, new.version, gain=-0.2),
            )
        assert server.versions == []
    assert store.champion(NAME).version == old.version


@pytest.mark.parametrize("refused_by", ["gate", "vllm", "gateway"])
def test_a_refused_release_leaves_what_a_server_had_loaded_before(
    refused_by, registry, store, versions
):
    old, new = versions
    beside, fresh = Server(), Server()  # the first serves both, for an experiment
    last = Server(store=store if refused_by == "gateway" else None, refuses=refused_by != "gate")
    beside.versions, fresh.versions = [old.version, new.version], [old.version]
    gain = -0.2 if refused_by == "gate" else 0.0
    with running(beside, fresh, last), pytest.raises((PromotionRefused, ServerUnreachable)):
        fleet(beside, fresh, last, patience=0.1).release(
            registry,
            new,
            expected_champion=old.version,
            evidence=decision(old.version, new.version, gain=gain),
        )
    assert beside.versions == [old.version, new.version] and beside.posted == []
    assert fresh.versions == [old.version]
    assert store.champion(NAME).version == old.version


def test_an_adapter_whose_loading_was_not_confirmed_is_unloaded(registry, versions):
    server, bad = Server(), Server(refuses=True)
    with running(server, bad):
        real = server.change

        def late(path: str, body: dict[str, str]) -> tuple[int, str]:
            status, said = real(path, body)
            return (504, "too late") if "unload" not in path else (status, said)

        server.change = late  # type: ignore[method-assign]
        with pytest.raises(ServerUnreachable, match="no adapter there"):
            release(fleet(server, bad), registry, versions)
        assert server.versions == []


def test_what_serves_since_a_release_that_was_cut_off_stays_loaded(registry, store, versions):
    old, new = versions
    good, other = Server(), Server()
    with running(good, other):
        release(fleet(good, other), registry, versions)
        # Begun again after both were restarted empty, and one takes no adapter any more.
        good.versions, other.versions, other.refuses = [], [], True
        with pytest.raises(ServerUnreachable, match="no adapter there"):
            release(fleet(good, other), registry, versions)
        assert good.versions == [new.version]
    assert store.champion(NAME).version == new.version and old


def test_a_release_that_was_cut_off_is_begun_again(registry, store, versions):
    server = Server()
    server.versions = [versions[1].version]
    with running(server):
        release(fleet(server), registry, versions)
        assert server.posted == []
        # Cut off after the pointer had moved: the old adapter is still to be unloaded.
        server.versions.append(versions[0].version)
        release(fleet(server), registry, versions)
        assert server.versions == [versions[1].version]
    assert len(registry.history(NAME)) == 2
    assert store.champion(NAME).version == versions[1].version


def test_servers_that_are_none_are_named(registry, store, versions):
    gone = Server()
    gone.http.shutdown()
    gone.http.server_close()
    with pytest.raises(ServerUnreachable, match="does not answer"):
        release(fleet(gone, patience=0.1), registry, versions)
    vllm = Server()
    with running(vllm), pytest.raises(ServerUnreachable, match="does not answer as a gateway does"):
        Fleet([]).reported(FleetServer(url=vllm.url, kind="gateway"))
    with pytest.raises(ServerUnreachable, match=r"no address|does not answer"):
        Fleet([]).reported(FleetServer(url="http://[x", kind="gateway"))
    assert store.champion(NAME).version == versions[0].version


def test_a_server_that_dies_while_it_unloads_is_told_of(registry, store, versions):
    told: list[str] = []
    server = Server()
    server.versions = [versions[0].version]
    with running(server):
        one = fleet(server, told=told)
        real = server.change

        def refuse(path: str, body: dict[str, str]) -> tuple[int, str]:
            return (500, "busy") if "unload" in path else real(path, body)

        server.change = refuse  # type: ignore[method-assign]
        release(one, registry, versions)
    assert f"still holds version {versions[0].version}: busy" in told[-1]
    assert store.champion(NAME).version == versions[1].version
