"""Cycles under real processes: killed at each step, and two that want to run one at once."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
from tests.forks import FORKS
from tests.learning import NAME, START, begin_champion, race, run_and_die

from gmpo.continual import open_cycle
from gmpo.continual.records import ROLL_BACK, STEPS
from gmpo.errors import ConfigError, LeaseHeld
from gmpo.store import Store, open_store

MOMENTS = ("begins", "during", "written", "moved")


def child(*arguments: object) -> int | None:
    """Exit code of a process that runs the cycle on."""
    process = FORKS.Process(target=run_and_die, args=arguments)
    process.start()
    process.join(60)
    return process.exitcode


def champions(store: Store) -> list[str]:
    return [champion.version for champion in store.champion_history(NAME)]


@pytest.mark.parametrize(
    ("fails", "steps", "outcome", "history"),
    [
        ([], STEPS, "promoted", [START, "v1"]),
        (["watch"], ("promote", "watch", ROLL_BACK), "rolled_back", [START, "v1", START]),
        (["gate"], ("gate",), "refused", [START]),
    ],
    ids=["promoted", "rolled back", "refused"],
)
def test_a_cycle_killed_at_each_step_in_turn_comes_to_the_same_end(
    tmp_path: Path, fails: list[str], steps: tuple[str, ...], outcome: str, history: list[str]
):
    url = str(tmp_path / "store.db")
    with open_store(url) as store:
        begin_champion(store)
        for step in steps:
            for moment in MOMENTS:
                assert child(url, str(tmp_path), fails, step, moment) == -signal.SIGKILL
                seen = champions(store)
                assert seen == history[: len(seen)], "nothing was changed twice"
                cycle = store.cycles(NAME)[-1]
                assert cycle.number == 1
                if cycle.ended is None:
                    assert cycle.state in (*STEPS, ROLL_BACK)
        if open_cycle(store, NAME) is not None:
            assert child(url, str(tmp_path), fails, "", "") == 0
        (cycle,) = store.cycles(NAME)
        assert cycle.state == outcome
        assert cycle.payload["result"]["outcome"] == outcome
        assert champions(store) == history


def test_of_two_controllers_one_runs_the_cycle_and_the_other_says_who_does(
    store_url: str, tmp_path
):
    with open_store(store_url) as store:
        begin_champion(store)
    processes = [
        FORKS.Process(target=race, args=(store_url, str(tmp_path), number)) for number in (1, 2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    said = [json.loads((tmp_path / f"{number}.json").read_text()) for number in (1, 2)]
    won = [one["won"] for one in said]
    assert sorted(won) == [False, True]
    loser = said[won.index(False)]
    assert loser["holder"] == f"controller-{won.index(True) + 1}"
    assert f"held by {loser['holder']} until" in loser["message"]
    with open_store(store_url) as store:
        assert champions(store) == [START, "v1"]
        assert len(store.cycles(NAME)) == 1


def test_a_lease_is_renewed_by_its_holder_and_free_once_it_is_over(store_url: str):
    with open_store(store_url) as store:
        first = store.take_lease("learn", holder="a", seconds=60.0)
        assert store.take_lease("learn", holder="a", seconds=90.0).until > first.until
        with pytest.raises(LeaseHeld, match="held by a until") as refused:
            store.take_lease("learn", holder="b", seconds=60.0)
        assert refused.value.holder == "a"
        assert store.take_lease("another", holder="b", seconds=60.0).holder == "b"
        store.take_lease("learn", holder="a", seconds=0.01)
        time.sleep(0.02)
        assert store.take_lease("learn", holder="b", seconds=60.0).holder == "b"
        store.drop_lease(first)
        assert store.lease("learn") is not None, "one that is another's by now is left alone"
        with pytest.raises(ConfigError, match="above 0"):
            store.take_lease("learn", holder="b", seconds=0.0)


def test_a_store_of_the_first_schema_gets_the_tables_that_it_lacks(store_url: str):
    with open_store(store_url) as store:
        begin_champion(store)
        with store._writing() as connection:
            for table in ("gmpo_cycles", "gmpo_leases"):
                connection.exec_driver_sql(f"DROP TABLE {table}")
            connection.exec_driver_sql("UPDATE gmpo_schema SET version = 1")
    with open_store(store_url) as store:
        assert store.begin_cycle(NAME, state="validate", payload={}).number == 1
        assert champions(store) == [START]
