"""A cycle with real models, killed at each of its steps in turn, while a gateway serves on."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import httpx2
import pytest
from tests.flow.test_learn import NAME, SERVE, Place, opened, rows
from tests.forks import FORKS

from gmpo.continual import ControllerSettings, run_cycle
from gmpo.continual.plan import LearnPlan
from gmpo.continual.records import STEPS
from gmpo.continual.serving import served_process
from gmpo.continual.work import RealWork, cycle_request
from gmpo.registry import Registry
from gmpo.store import open_store

MOMENTS = ("begins", "during", "written")
_DURING_SECONDS = {"small_update": 3.0, "update": 3.0, "live_test": 3.0}
"""After which a step of its own processes is in their midst; others are killed after a moment."""


def learn_and_die(place: str, plan: LearnPlan, data: str, step: str, moment: str) -> None:
    """Go on with the cycle in this process, which kills itself at that moment of that step."""

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def tell(found_step: str, found_moment: str, _: object) -> None:
        if found_step != step:
            return
        if found_moment == moment:
            die()
        if (moment, found_moment) == ("during", "begins"):
            threading.Timer(_DURING_SECONDS.get(step, 0.02), die).start()
        if (moment, found_moment) == ("during", "written"):
            die()  # it was quicker than the timer

    folder = Path(place)
    with open_store(str(folder / "store.db")) as store:
        work = RealWork(store=store, registry=Registry(store, folder / "models"), threads=1)
        run_cycle(
            store,
            NAME,
            work,
            folder=folder / "learn",
            request=lambda: cycle_request(plan, [data], trigger="asked for"),
            settings=ControllerSettings(tell=tell, lease_seconds=2.0, patience_seconds=20.0),
        )


def _run(place: Place, plan: LearnPlan, data: str, step: str, moment: str) -> int | None:
    process = FORKS.Process(
        target=learn_and_die, args=(str(place.folder), plan, data, step, moment)
    )
    process.start()
    process.join(300)
    return process.exitcode


def _require_one_champion_served(place: Place, url: str, first: str) -> None:
    """The store has one chain of champions, and its last one is what the gateway comes to serve."""
    history = place.store.champion_history(NAME)
    assert [one.revision for one in history] == list(range(1, len(history) + 1))
    assert len(history) <= 2
    assert history[0].version == first
    deadline = time.monotonic() + 60
    while True:
        (served,) = httpx2.get(f"{url}/models", timeout=60).json()["data"]
        if served["model_version"] == history[-1].version:
            break
        assert time.monotonic() < deadline, (served, history[-1].version)
        time.sleep(0.2)
    assert place.work.registry.verify(history[-1].version).is_whole


@pytest.mark.verify
def test_real_cycles_killed_at_each_step_in_turn_come_to_the_same_end(tmp_path: Path):
    with opened(tmp_path) as place:
        champion = place.store.champion(NAME)
        assert champion is not None
        first = champion.version
        data = place.file("batch", rows(60))
        arguments = ("--store", place.store.where, "--follow", NAME, *SERVE)
        start = place.work.folder_of(first)
        with served_process(start, arguments=arguments, threads=1, seconds=120) as url:
            plan = place.plan(gateway=url)
            for step in STEPS:
                for moment in MOMENTS:
                    code = _run(place, plan, data, step, moment)
                    assert code == -signal.SIGKILL, (step, moment)
                    _require_one_champion_served(place, url, first)
                    (cycle,) = place.store.cycles(NAME)
                    assert cycle.ended is None
            assert _run(place, plan, data, "", "") == 0
            _require_one_champion_served(place, url, first)
        (cycle,) = place.store.cycles(NAME)
        assert cycle.state == "promoted", cycle.payload["reports"]
        candidate = cycle.payload["result"]["new_model_version"]
        history = [one.version for one in place.store.champion_history(NAME)]
        assert history == [first, candidate]
        assert {one.version for one in place.store.model_versions(NAME)} == {first, candidate}
        assert place.store.count_events(kinds=["gate"]) == 1
