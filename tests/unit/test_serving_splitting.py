"""Traffic split by an experiment of the store: assignment, exposures, outcomes, changes."""

from __future__ import annotations

import asyncio
import sqlite3
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gmpo.abtest.assignment import assign
from gmpo.abtest.records import read_records
from gmpo.errors import ConfigError
from gmpo.live_shadow import CONTROLLER_SESSION
from gmpo.serving.answer_record import AnswerRecord
from gmpo.serving.backend import AnswerReport, GenerationRequest
from gmpo.serving.splitting import TrafficSplit, outcome_event
from gmpo.store import Event, Experiment, Store, open_store

CONFIG = {
    "salt": "s",
    "models": {"control": "old", "candidate": "new"},
    "weights": {"control": 0.75, "candidate": 0.25},
}


@pytest.fixture
def store(tmp_path: Path):
    with open_store(str(tmp_path / "store.db")) as opened:
        opened.put_experiment(
            Experiment(name="e", created=1.0, status="running", config=dict(CONFIG)),
            expected=None,
        )
        yield opened


class Split:
    def __init__(self, store: Store, **backend_of: str) -> None:
        self.events: list[Event] = []
        self.told: list[str] = []
        self.now = 1.0
        self.split = TrafficSplit(
            store,
            "e",
            backend_of=backend_of or {"old": "bot", "new": "new"},
            put=self.events.append,
            tell=self.told.append,
            clock=lambda: self.now,
        )

    def assign(self, unit: str, session: str | None = None):
        return self.split.assign(
            GenerationRequest(
                id="r", route="chat", model="bot", prompt="a", unit=unit, session=session
            )
        )


def test_units_are_assigned_by_their_hash_and_exposed_once(store: Store):
    made = Split(store)
    routes = {unit: made.assign(unit) for unit in map(str, range(200)) for _ in range(2)}
    for unit, route in routes.items():
        assert route is not None
        assert route.variant == assign("e", "s", unit, {"control": 0.75, "candidate": 0.25})
        assert route.backend == {"control": "bot", "candidate": "new"}[route.variant]
        assert route.experiment == "e"
        assert route.variants == {"bot": "control", "new": "candidate"}
    assert len(made.events) == 200
    weights = {"control": 0.75, "candidate": 0.25}
    for event in made.events:
        assert (event.kind, event.experiment) == ("exposure", "e")
        assert event.payload["weight"] == weights[event.payload["variant"]]
    shares = Counter(event.payload["variant"] for event in made.events)
    assert 30 < shares["candidate"] < 70  # 50 expected, spread 6
    assert "75 % old, 25 % new" in made.told[0]


def test_new_weights_move_only_units_at_the_border_and_a_stop_ends_the_split(store: Store):
    made = Split(store)
    units = [str(number) for number in range(100)]
    before = {unit: made.assign(unit) for unit in units}
    more = {"weights": {"control": 0.5, "candidate": 0.5}}
    change(store, **more)
    asyncio.run(made.split.look())
    after = {unit: made.assign(unit) for unit in units}
    moved = [unit for unit in units if before[unit].variant != after[unit].variant]
    assert 10 < len(moved) < 45  # 25 expected, spread 4.3
    assert all(after[unit].variant == "candidate" for unit in moved)
    assert len(made.events) == 100 + len(moved)
    stop(store)
    asyncio.run(made.split.look())
    assert made.assign("0") is None
    assert "does not run" in made.told[-1]


def change(store: Store, **changes: Any) -> None:
    running = store.experiment("e")
    assert running is not None
    store.put_experiment(replace(running, config={**CONFIG, **changes}), expected=running)


def stop(store: Store) -> None:
    running = store.experiment("e")
    assert running is not None
    store.put_experiment(replace(running, status="stopped"), expected=running)


def test_once_its_hours_are_over_everybody_gets_control_and_it_is_told_once(store: Store):
    change(store, end_after_hours=0.5)
    made = Split(store)
    made.now = 1800.9  # it began at 1
    units = [str(number) for number in range(50)]
    before = {unit: made.assign(unit) for unit in units}
    assert {route.variant for route in before.values()} == {"control", "candidate"}
    assert made.split.state() == {"name": "e", "status": "running", "ends": 1801.0}
    made.now = 1801.0
    for unit in [*units, "a new one"]:
        route = made.assign(unit)
        # It is part of no experiment any more: no exposure, and nothing for an outcome.
        assert (route.backend, route.experiment, route.variant) == ("bot", None, None)
    assert len(made.events) == 50
    assert made.split.counts["after_experiment"] == 51
    assert made.split.state() == {"name": "e", "status": "over", "ends": 1801.0}
    asyncio.run(made.split.look())
    (said,) = made.told[1:]
    assert said.startswith("the 0.5 hours of experiment 'e' are over: everybody gets control (old)")
    assert "gmpo ab report e" in said


def test_requests_of_a_cycle_are_in_no_arm_and_get_what_is_served(store: Store):
    change(store, end_after_hours=0.5)
    made = Split(store)
    for made.now in (1.0, 1801.0):  # once its hours are over, too
        assert made.assign(CONTROLLER_SESSION, CONTROLLER_SESSION) is None
    assert made.events == []
    assert made.split.counts == {"not_split": 2}


def test_an_experiment_that_nobody_asks_is_over_too(store: Store):
    change(store, end_after_hours=0.5)
    made = Split(store)
    made.now = 1801.0
    for _ in range(2):
        asyncio.run(made.split.look())
    assert len(made.told) == 2 and "are over" in made.told[1]
    # A gateway that starts after the end says so, and splits nothing.
    late = Split(store)
    late.now = 1801.0
    asyncio.run(late.split.look())
    assert late.assign("0").experiment is None


def test_more_hours_go_on_with_the_split_and_a_stop_ends_it(store: Store):
    change(store, end_after_hours=0.5)
    made = Split(store)
    before = made.assign("0")
    made.now = 2000.0
    assert made.assign("0").variant is None
    change(store, end_after_hours=1)
    asyncio.run(made.split.look())
    assert made.assign("0") == before
    assert "splits traffic: 75 % old, 25 % new" in made.told[-1]
    made.now = 3601.0
    assert made.assign("0").variant is None
    assert "the 1 hours" in made.told[-1], "a second end is told again"
    stop(store)
    asyncio.run(made.split.look())
    assert made.assign("0") is None
    assert made.split.state()["status"] == "stopped"


def test_an_experiment_that_cannot_be_followed_is_refused_at_the_start(store: Store):
    with pytest.raises(ConfigError, match="compares 'new', which is no backend"):
        Split(store, old="bot")
    with pytest.raises(ConfigError, match="are one backend"):
        Split(store, old="bot", new="bot")
    with pytest.raises(ConfigError, match="no experiment 'x'; there are: e"):
        TrafficSplit(store, "x", backend_of={}, put=print, tell=print)


def test_an_experiment_that_becomes_wrong_ends_the_split(store: Store):
    made = Split(store)
    change(store, models={"control": "old", "candidate": "other"})
    asyncio.run(made.split.look())
    assert made.assign("0") is None
    assert "split no longer" in made.told[-1] and "'other'" in made.told[-1]
    assert made.split.state()["status"] == "unusable"
    asyncio.run(made.split.look())
    assert len(made.told) == 2, "it is told once"


def test_while_the_store_cannot_be_read_the_split_goes_on(tmp_path: Path, store: Store):
    made = Split(store)
    store.close()
    (tmp_path / "store.db").write_bytes(b"no database" * 1000)
    asyncio.run(made.split.look())
    asyncio.run(made.split.look())
    assert made.split.num_failures == 2
    assert made.assign("0") is not None
    assert sum("cannot be read" in one for one in made.told) == 1


def test_each_outage_of_the_store_is_told_as_it_begins_and_as_it_ends(tmp_path: Path, store: Store):
    made = Split(store)
    begun = len(made.told)
    with closing(sqlite3.connect(tmp_path / "store.db")) as other:
        for _ in range(2):
            other.execute("ALTER TABLE gmpo_experiments RENAME TO elsewhere")
            asyncio.run(made.split.look())
            asyncio.run(made.split.look())
            other.execute("ALTER TABLE elsewhere RENAME TO gmpo_experiments")
            asyncio.run(made.split.look())
    assert ["can be read again" in one for one in made.told[begun:]] == [False, True] * 2
    assert made.split.counts["experiment_unread"] == made.split.num_failures == 4


def test_units_beyond_those_remembered_are_exposed_again(store: Store):
    made = Split(store)
    made.split.max_units = 2
    for unit in ("0", "1", "0", "2", "1"):
        made.assign(unit)
    # "0" was seen again before "2" came, so "1" was forgotten.
    assert [event.unit for event in made.events] == ["0", "1", "2", "1"]


def record(status: int, *, experiment: str | None = "e", **report: Any) -> AnswerRecord:
    return AnswerRecord(
        request=GenerationRequest(
            id="r", route="chat", model="m", prompt="a", unit="u", session="s"
        ),
        report=AnswerReport(
            experiment=experiment,
            assigned_variant="candidate",
            served_variant="candidate",
            model_version="v2",
            **report,
        ),
        time=100.0,
        status=status,
        finish_reason=None,
        usage=None,
        latency_seconds=2.0,
        first_token_seconds=None,
        error=None,
    )


@pytest.mark.parametrize(
    ("answer", "success", "judged_by"),
    [
        (record(200, quality=0.5), 1, "presumed"),
        (record(200, quality=0.1, is_low_quality=True), 0, "quality"),
        (
            record(200, quality=0.1, is_low_quality=True, quality_components={"verified": 1.0}),
            1,
            "verifier",
        ),
        (record(200, quality=0.9, quality_components={"verified": 0.0}), 0, "verifier"),
        (record(502), 0, "fault"),
        (record(504), 0, "fault"),
        (record(400), None, None),
        (record(499), None, None),
    ],
)
def test_an_answers_outcome_is_that_of_the_assigned_variant(
    answer: AnswerRecord, success: int | None, judged_by: str | None
):
    event = outcome_event(answer)
    assert event is not None
    assert event.payload["success"] == success
    assert event.payload["variant"] == "candidate"
    assert event.payload["latency_s"] == (2.0 if answer.status == 200 else None)
    assert (event.time, event.unit, event.request_id) == (102.0, "u", "r")
    (read,) = read_records([event]).outcomes
    assert (read.success, read.quality, read.session) == (success, answer.report.quality, "s")
    assert read.judged_by == judged_by
    assert (read.served_variant, read.model_version) == ("candidate", "v2")


def test_outside_of_an_experiment_there_is_no_outcome():
    assert outcome_event(record(200, experiment=None)) is None
