"""A champion is served when it changes; what cannot be served is said once."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from itertools import pairwise
from pathlib import Path

import pytest
from tests.models import save_tiny
from tests.registries import decision

from gmpo.cli.serve_weights import first_weights
from gmpo.config import ModelConfig
from gmpo.errors import ModelError
from gmpo.model_files import weights_version
from gmpo.registry import Registry
from gmpo.serving.following import ChampionFollower
from gmpo.serving.supervision import SupervisedTask
from gmpo.store import ModelVersion, Store, open_store


def version(name: str) -> ModelVersion:
    return ModelVersion(
        version=name,
        created=0.0,
        name="bot",
        path=f"/models/{name}",
        parent=None,
        lineage={},
        metrics={},
    )


def test_it_serves_each_new_champion_once_and_gives_a_broken_one_up(tmp_path: Path):
    store = open_store(str(tmp_path / "store.db"))
    for name in ("a", "b", "bad"):
        store.put_model_version(version(name))
    serving, asked, told = ["start"], list[str](), list[str]()

    async def serve(wanted: ModelVersion) -> None:
        asked.append(wanted.path)
        if wanted.version == "bad":
            raise ModelError("its file is damaged")
        serving.append(wanted.version)

    follower = ChampionFollower(
        store, "bot", serve=serve, served=lambda: serving[-1], tell=told.append
    )

    async def work() -> None:
        await follower.look()
        assert not asked, "there is no champion yet"
        expected = None
        for name in ("a", "bad", "b", "bad"):
            store.set_champion("bot", expected=expected, version=name, reason={})
            expected = name
            for _ in range(2):
                await follower.look()
        assert asked == [f"/models/{name}" for name in ("a", "bad", "b", "bad")]
        await follower.look_again()

    asyncio.run(work())
    store.close()
    assert serving == ["start", "a", "b"] and len(asked) == 5
    assert len(told) == 3 and "champion bad of 'bot'" in told[0]
    assert "its file is damaged; version a goes on serving" in told[0]
    assert "version b goes on serving" in told[2]


def test_in_place_of_a_broken_champion_its_predecessor_is_served(tmp_path: Path):
    store = open_store(str(tmp_path / "store.db"))
    for name in ("a", "bad"):
        store.put_model_version(version(name))
    store.set_champion("bot", expected=None, version="bad", reason={})
    serving, told = ["start"], list[str]()
    whole = ["a"]

    async def serve(wanted: ModelVersion) -> None:
        if wanted.version == "bad":
            raise ModelError("its file is damaged")
        serving.append(wanted.version)

    def instead() -> ModelVersion:
        if not whole:
            raise ModelError("no version is whole")
        return version(whole[0])

    follower = ChampionFollower(
        store, "bot", serve=serve, served=lambda: serving[-1], tell=told.append, instead=instead
    )

    async def work() -> None:
        for _ in range(3):
            await follower.look()
        assert serving == ["start", "a"] and len(told) == 2
        assert told[1] == "version a serves until bad is restored"
        whole.clear()
        await follower.look_again()

    asyncio.run(work())
    store.close()
    assert serving == ["start", "a"]
    assert told[-1] == "nothing can be served in place of champion bad: no version is whole"


def test_a_store_that_cannot_be_read_is_said_once_and_looked_at_again(tmp_path: Path):
    path = tmp_path / "store.db"
    store = open_store(str(path))
    store.put_model_version(version("a"))
    store.set_champion("bot", expected=None, version="a", reason={})
    asked, told = list[str](), list[str]()

    async def serve(wanted: ModelVersion) -> None:
        asked.append(wanted.version)

    follower = ChampionFollower(store, "bot", serve=serve, served=lambda: "start", tell=told.append)
    other = sqlite3.connect(path)
    other.execute("ALTER TABLE gmpo_champions RENAME TO elsewhere")
    for _ in range(2):
        asyncio.run(follower.look())
    assert follower.num_failures == 2 and len(told) == 1 and not asked
    assert follower.state()["reason"] == told[0]
    assert "champion of 'bot' cannot be read" in told[0]
    other.execute("ALTER TABLE elsewhere RENAME TO gmpo_champions")
    asyncio.run(follower.look())
    assert asked == ["a"] and told[1:] == ["the champion of 'bot' can be read again"]
    assert follower.state()["reason"] is None
    # A second outage is news again, and so is where the champion's row alone cannot be read.
    other.execute("ALTER TABLE gmpo_model_versions RENAME TO elsewhere")
    asyncio.run(follower.look())
    assert len(told) == 3 and follower.state()["reason"] == told[2]
    assert asked == ["a"] and follower.counts == {"champion_unread": 3, "champion_not_served": 0}
    other.execute("ALTER TABLE elsewhere RENAME TO gmpo_model_versions")
    other.close()
    asyncio.run(follower.look())
    store.close()
    assert asked == ["a", "a"] and len(told) == 4


def test_a_champion_for_which_memory_was_short_is_served_once_there_is_some(tmp_path: Path):
    store = open_store(str(tmp_path / "store.db"))
    store.put_model_version(version("a"))
    store.set_champion("bot", expected=None, version="a", reason={})
    serving, told, times = ["start"], list[str](), list[float]()

    async def serve(wanted: ModelVersion) -> None:
        times.append(time.monotonic())
        if len(times) < 4:
            raise ModelError("can't allocate memory")
        serving.append(wanted.version)

    follower = ChampionFollower(
        store, "bot", serve=serve, served=lambda: serving[-1], tell=told.append
    )
    follower.first_retry_seconds, follower.last_retry_seconds = 0.05, 0.1

    async def work() -> None:
        task = asyncio.ensure_future(follower.run(seconds=0.005))
        while serving[-1] != "a":
            await asyncio.sleep(0.001)
            if times and len(times) < 4:
                assert follower.state() == {
                    "name": "bot",
                    "wanted": "a",
                    "served": "start",
                    "reason": "can't allocate memory",
                }
        await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(asyncio.wait_for(work(), 10))
    store.close()
    waited = [later - sooner for sooner, later in pairwise(times)]
    assert len(told) == 1 and follower.num_refused == 3
    assert all(wait >= least for wait, least in zip(waited, (0.05, 0.1, 0.1), strict=True))
    assert follower.state() == {"name": "bot", "wanted": "a", "served": "a", "reason": None}


def test_work_beside_a_gateway_begins_anew_whatever_ended_it():
    told, begun = list[str](), list[float]()

    async def work() -> None:
        begun.append(time.monotonic())
        if len(begun) < 4:
            raise MemoryError("no page left")
        await asyncio.sleep(60)

    supervised = SupervisedTask(
        "following", work, tell=told.append, first_seconds=0.05, last_seconds=0.1
    )

    async def watch() -> None:
        task = asyncio.ensure_future(supervised.run())
        while len(begun) < 4:
            await asyncio.sleep(0.001)
        task.cancel()

    asyncio.run(asyncio.wait_for(watch(), 10))
    waited = [later - sooner for sooner, later in pairwise(begun)]
    assert all(wait >= least for wait, least in zip(waited, (0.05, 0.1, 0.1), strict=True))
    assert supervised.num_failures == len(told) == 3
    assert told[0].startswith("following failed: MemoryError: no page left (")
    assert told[0].endswith("; it begins anew in 0.05 s")


def test_a_gateway_that_begins_again_serves_the_champion_from_its_first_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folders = [save_tiny(tmp_path / name, seed=seed) for seed, name in enumerate("abc")]
    base, old, new = (weights_version(Path(folder)) for folder in folders)
    config = ModelConfig(name=folders[0], dtype="fp32")

    def first(store: Store, follow: str | None = "bot") -> str:
        return first_weights(config, store, follow, max_rows=2).version

    with open_store(str(tmp_path / "store.db")) as store:
        registry = Registry(store, tmp_path / "models")
        assert first(store) == base, "there is no champion yet"
        for folder in folders[1:]:
            registry.add(folder, name="bot")
        registry.adopt("bot", old, reason="first")
        registry.promote("bot", expected_champion=old, candidate=new, evidence=decision(old, new))
        assert (first(store), first(store, None)) == (new, base)
        assert "cannot be served" not in capsys.readouterr().err
        (Path(registry.version(new).path) / "model.safetensors").unlink()
        assert first(store) == old
        said = capsys.readouterr().err
        assert f"champion {new} of 'bot' cannot be served" in said
        assert f"version {old} serves until {new} is restored" in said
        (Path(registry.version(old).path) / "model.safetensors").unlink()
        assert first(store) == base
        assert "serves until the champion of 'bot' can be served" in capsys.readouterr().err
