"""A rollback over servers: the pointer moves whatever they do, and who did not follow is named."""

from __future__ import annotations

import json
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
from tests.commands import gmpo
from tests.fleet_servers import NAME, Server, fleet, running
from tests.registries import decision, model_folder

from gmpo.errors import ChampionMoved, PromotionRefused, ServersBehind
from gmpo.fleet import Fleet
from gmpo.registry import Registry
from gmpo.store import ModelVersion

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


# The pointer's own moves are tested on both kinds of store in test_registry.py.
pytestmark = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)


@pytest.fixture
def versions(registry: Registry, tmp_path: Path) -> list[ModelVersion]:
    """Three champions, one after the other; the last serves."""
    added = [
        registry.add(model_folder(tmp_path / f"run-{value}", value), name=NAME)
        for value in (1.0, 2.0, 3.0)
    ]
    registry.adopt(NAME, added[0].version, reason="first")
    for revision, (old, new) in enumerate(pairwise(added), start=1):
        registry.promote(
            NAME,
            expected_champion=old.version,
            candidate=new.version,
            evidence=decision(old.version, new.version, revision=revision),
        )
    return added


def take_back(one: Fleet, registry: Registry, version: ModelVersion) -> str:
    champion = one.rollback(registry, NAME, expected_champion=version.version, reason="slow")
    return champion.version


def closed_server() -> Server:
    gone = Server()
    gone.http.shutdown()
    gone.http.server_close()
    return gone


def test_the_predecessor_is_loaded_before_the_pointer_moves(registry, store, versions):
    _, old, bad = versions
    empty, both = Server(), Server()
    empty.versions, both.versions = [bad.version], [old.version, bad.version]
    serving: list[tuple[str, str]] = []
    with running(empty, both):
        real = empty.change

        def watched(path: str, body: dict[str, str]) -> tuple[int, str]:
            serving.append((path, store.champion(NAME).version))
            return real(path, body)

        empty.change = watched  # type: ignore[method-assign]
        assert take_back(fleet(empty, both), registry, bad) == old.version
        assert serving == [(LOAD, bad.version), (UNLOAD, old.version)]
        assert empty.posted[0][1] == {"lora_name": old.version, "lora_path": old.path}
        assert both.posted == [(UNLOAD, {"lora_name": bad.version})]
        assert empty.versions == both.versions == [old.version]
    assert store.champion(NAME).reason["why"] == "slow"


def test_gateways_are_waited_for_after_the_pointer_has_moved(registry, store, versions):
    _, old, bad = versions
    slow = Server(store=store, late_by=5, holds=[bad.version])
    with running(slow):
        assert take_back(fleet(slow), registry, bad) == old.version
        assert slow.versions == [old.version]


def test_servers_that_cannot_follow_are_named_and_hold_nothing_up(registry, store, versions):
    _, old, bad = versions
    good, refusing, gone = Server(), Server(refuses=True), closed_server()
    stuck = Server(store=store, refuses=True)
    good.versions, refusing.versions, stuck.versions = [bad.version], [bad.version], [bad.version]
    with running(good, refusing, stuck):
        with pytest.raises(ServersBehind) as caught:
            take_back(fleet(refusing, gone, stuck, good, patience=0.2), registry, bad)
        assert good.versions == [old.version]
    said = str(caught.value)
    assert said.startswith(f"the pointer has moved: {old.version} is the champion of 'bot'")
    assert f"{refusing.url} still holds version {bad.version}: no adapter there" in said
    assert f"{refusing.url} does not load {old.path} as an adapter (status 404" in said
    assert said.count(f"{gone.url}/models does not answer") == 1
    assert f"{stuck.url} did not report version {old.version} within 0.2 seconds" in said
    assert f"--expected {bad.version}" in said and good.url not in said
    assert "the release" not in said
    assert store.champion(NAME).version == old.version


def test_a_server_that_hangs_does_not_hold_the_pointer_up(
    registry, store, versions, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("gmpo.fleet._HASTE_SECONDS", 0.2)
    _, old, bad = versions
    hanging, good = Server(), Server()
    goes_on = threading.Event()
    real = hanging.rows

    def late() -> list[dict[str, str]]:
        goes_on.wait(20)
        return real()

    hanging.rows = late  # type: ignore[method-assign]
    hanging.versions, good.versions = [bad.version], [bad.version]
    with running(hanging, good):
        back = threading.Thread(target=take_back, args=(fleet(hanging, good), registry, bad))
        back.start()
        while store.champion(NAME).version == bad.version or bad.version in good.versions:
            assert back.is_alive()
            time.sleep(0.01)
        assert hanging.versions == [bad.version] and good.versions == [old.version]
        goes_on.set()  # it comes within the patience
        back.join()
        assert hanging.versions == [old.version]


def test_a_load_that_was_given_up_and_went_on_counts(registry, store, versions):
    _, old, bad = versions
    server = Server(holds=[bad.version])
    with running(server):
        real = server.change

        def late(path: str, body: dict[str, str]) -> tuple[int, str]:
            answer = real(path, body)
            return (400, "already loaded") if path == LOAD else answer

        server.change = late  # type: ignore[method-assign]
        assert take_back(fleet(server), registry, bad) == old.version
        assert server.versions == [old.version]


def test_a_rollback_goes_on_with_the_servers_and_no_further_back(registry, store, versions):
    _, old, bad = versions
    server = Server(refuses=True, holds=[bad.version])
    with running(server):
        with pytest.raises(ServersBehind):
            take_back(fleet(server, patience=0.1), registry, bad)
        server.refuses = False
        assert take_back(fleet(server), registry, bad) == old.version
        assert server.versions == [old.version]
    assert [row.version for row in registry.history(NAME)][2:] == [bad.version, old.version]


def test_what_is_loaded_is_where_the_rollback_leads(registry, store, versions):
    first, old, bad = versions
    (Path(old.path) / "model.safetensors").unlink()
    server = Server(holds=[bad.version])
    with running(server):
        assert take_back(fleet(server), registry, bad) == first.version
        assert [body["lora_name"] for _, body in server.posted] == [first.version, bad.version]
        assert server.versions == [first.version]
    assert store.champion(NAME).reason["damaged"] == [old.version]


def test_files_that_are_damaged_while_they_are_loaded_are_passed_over(registry, store, versions):
    first, old, bad = versions
    server = Server(holds=[bad.version])
    with running(server):
        real = server.change

        def damaging(path: str, body: dict[str, str]) -> tuple[int, str]:
            if body["lora_name"] == old.version:
                (Path(old.path) / "model.safetensors").unlink(missing_ok=True)
            return real(path, body)

        server.change = damaging  # type: ignore[method-assign]
        assert take_back(fleet(server), registry, bad) == first.version
        assert server.versions == [first.version]


def test_a_rollback_that_is_refused_loads_nothing(registry, store, versions):
    first, old, bad = versions
    server = Server(holds=[bad.version])
    with running(server):
        with pytest.raises(ChampionMoved):
            take_back(fleet(server), registry, first)
        for version in (first, old):
            (Path(version.path) / "model.safetensors").unlink()
        with pytest.raises(PromotionRefused, match="no predecessor"):
            take_back(fleet(server), registry, bad)
        assert server.posted == []
    assert store.champion(NAME).version == bad.version


def test_a_rollback_that_loses_a_race_unloads_what_it_loaded(registry, store, versions):
    first, old, bad = versions
    server = Server(holds=[bad.version])
    with running(server):
        real = server.change

        def raced(path: str, body: dict[str, str]) -> tuple[int, str]:
            if path == LOAD:
                registry.rollback(NAME, expected_champion=bad.version, reason="another")
                registry.rollback(NAME, expected_champion=old.version, reason="another")
            return real(path, body)

        server.change = raced  # type: ignore[method-assign]
        with pytest.raises(ChampionMoved):
            take_back(fleet(server), registry, bad)
        assert server.versions == [bad.version]
    assert store.champion(NAME).version == first.version


def test_where_a_rollback_leads_is_said_without_doing_it(registry, store, versions):
    _, old, bad = versions
    assert registry.rollback_target(NAME, expected_champion=bad.version) == old
    with pytest.raises(ChampionMoved):
        registry.rollback_target(NAME, expected_champion=old.version)
    assert store.champion(NAME).version == bad.version and len(registry.history(NAME)) == 3


def test_the_command_takes_back_on_servers_and_ends_with_1_where_one_is_behind(
    registry, store, versions, tmp_path: Path
):
    first, old, bad = versions
    good, refusing = Server(), Server(refuses=True)
    good.versions = [bad.version]
    command = ("registry", "rollback", NAME, "--reason", "slow", "--json")
    where = ("--store", str(tmp_path / "store.db"), "--patience", "0.2")
    with running(good, refusing):
        done = gmpo(*command, *where, "--vllm", good.url, "--vllm", refusing.url)
        assert done.exit_code == 1
        assert json.loads(done.stdout)["version"] == old.version
        said = " ".join(done.stderr.split())
        assert f"error: the pointer has moved: {old.version} is the champion" in said
        assert f"{refusing.url} does not load" in said and good.versions == [old.version]
        refusing.refuses = False
        again = gmpo(*command, *where, "--vllm", refusing.url, "--expected", bad.version[:8])
        assert again.exit_code == 0, again.stderr
        assert refusing.versions == [old.version]
    assert store.champion(NAME).version == old.version != first.version
