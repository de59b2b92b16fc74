"""A champion is served when it changes; what cannot be served is said once."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

from gmpo.errors import ModelError
from gmpo.serving.following import ChampionFollower
from gmpo.store import ModelVersion, open_store


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
    assert "champion of 'bot' cannot be read" in told[0]
    other.execute("ALTER TABLE elsewhere RENAME TO gmpo_champions")
    other.close()
    asyncio.run(follower.look())
    store.close()
    assert asked == ["a"]
