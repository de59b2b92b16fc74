"""The state machine of a cycle: which step follows which, and what becomes of a cycle."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.learning import NAME, START, ScriptedWork, begin_champion, run

from gmpo.continual import CycleWork, abandon_cycle, lease_name, open_cycle, run_cycle
from gmpo.continual.records import REASONS, ROLL_BACK, STEPS
from gmpo.errors import ConfigError, CycleMoved, DataError, LeaseHeld, RunStopped, StoreError
from gmpo.store import Store, open_store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(str(tmp_path / "store.db")) as opened:
        begin_champion(opened)
        yield opened


def champions(store: Store) -> list[str]:
    return [champion.version for champion in store.champion_history(NAME)]


def test_a_cycle_whose_steps_all_pass_promotes_its_candidate(store: Store, tmp_path: Path):
    work = ScriptedWork(store=store)
    result = run(store, work, tmp_path)
    assert work.done == list(STEPS)
    assert champions(store) == [START, "v1"]
    assert result.as_dict() == {
        "success": True,
        "reason": None,
        "details": {},
        "new_model_version": "v1",
        "performance_improvement": 0.03,
        "stability_metrics": {"alarms": 0},
        "outcome": "promoted",
        "step": "watch",
        "sentence": "watch is over",
        "name": NAME,
        "number": 1,
        "champion": START,
    }
    (cycle,) = store.cycles(NAME)
    assert cycle.state == "promoted"
    assert cycle.ended is not None
    assert cycle.payload["result"] == result.as_dict()
    assert cycle.payload["request"] == {"data": "new.jsonl"}
    assert store.lease(lease_name(NAME)) is None


@pytest.mark.parametrize("step", [step for step in STEPS if step not in ("watch", "promote")])
def test_a_step_that_does_not_pass_ends_the_cycle_and_names_itself(
    store: Store, tmp_path: Path, step: str
):
    work = ScriptedWork(store=store, fails=frozenset([step]))
    result = run(store, work, tmp_path)
    assert work.done == list(STEPS[: STEPS.index(step) + 1])
    assert not result.success
    assert (result.outcome, result.step, result.reason) == ("refused", step, REASONS[step])
    assert champions(store) == [START]


@pytest.mark.parametrize(
    ("step", "metrics"),
    [
        ("validate", None),
        ("small_update", {"alarms": 1}),
        ("safety_test", {"alarms": 1}),
        ("update", {"alarms": 0}),
        ("evaluate", {"alarms": 0}),
    ],
)
def test_a_result_has_the_metrics_of_the_run_that_was_trained_last(
    store: Store, tmp_path: Path, step: str, metrics: dict[str, int] | None
):
    result = run(store, ScriptedWork(store=store, fails=frozenset([step])), tmp_path)
    assert result.stability_metrics == metrics


def test_a_new_champion_that_disappoints_is_taken_back(store: Store, tmp_path: Path):
    work = ScriptedWork(store=store, fails=frozenset(["watch"]))
    result = run(store, work, tmp_path)
    assert work.done == [*STEPS, "roll_back"]
    assert (result.outcome, result.reason) == ("rolled_back", "Performance degradation detected")
    assert result.step == "watch"
    assert champions(store) == [START, "v1", START]


def test_the_next_cycle_starts_from_the_new_champion(store: Store, tmp_path: Path):
    run(store, ScriptedWork(store=store), tmp_path)
    second = run(store, ScriptedWork(store=store), tmp_path)
    assert (second.number, second.champion, second.new_model_version) == (2, "v1", "v2")
    assert champions(store) == [START, "v1", "v2"]


def test_a_cycle_waits_for_a_person_and_goes_on(store: Store, tmp_path: Path):
    work = ScriptedWork(store=store, waits=True)
    waiting = run(store, work, tmp_path)
    assert (waiting.outcome, waiting.success) == ("waiting", False)
    assert waiting.step == "approve"
    assert waiting.sentence == "version v1 waits for a person"
    assert open_cycle(store, NAME) is not None
    work.waits = False
    assert run(store, work, tmp_path).outcome == "promoted"
    assert work.done == list(STEPS)


@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_breaks_is_done_again_and_no_other_is(store: Store, tmp_path: Path, step: str):
    def break_once(found: str) -> None:
        if found == step and step not in broken:
            broken.append(step)
            raise DataError("a disk that is full")

    broken: list[str] = []
    work = ScriptedWork(store=store, during=break_once)
    with pytest.raises(DataError):
        run(store, work, tmp_path)
    assert store.lease(lease_name(NAME)) is None
    assert run(store, work, tmp_path).outcome == "promoted"
    assert work.done == list(STEPS)
    assert champions(store) == [START, "v1"]


def test_a_stopped_cycle_goes_on_with_what_it_was_asked(store: Store, tmp_path: Path):
    work = ScriptedWork(store=store)
    with pytest.raises(RunStopped, match="stopped before 'evaluate'"):
        run(store, work, tmp_path, should_stop=lambda: len(work.done) == 4)
    result = run_cycle(
        store, NAME, work, folder=tmp_path, request=lambda: pytest.fail("it was asked again")
    )
    assert result.outcome == "promoted"


def test_an_unfinished_cycle_can_be_abandoned_before_its_candidate_serves(
    store: Store, tmp_path: Path
):
    assert abandon_cycle(store, NAME, reason="none there") is None
    run(store, ScriptedWork(store=store, waits=True), tmp_path)
    result = abandon_cycle(store, NAME, reason="the data were the wrong ones")
    assert result is not None
    assert (result.outcome, result.reason) == ("abandoned", "Abandoned")
    assert "the wrong ones" in result.sentence
    assert open_cycle(store, NAME) is None
    second = ScriptedWork(store=store)
    with pytest.raises(RunStopped):
        run(store, second, tmp_path, should_stop=lambda: "promote" in second.done)
    with pytest.raises(ConfigError, match="at 'watch', where its candidate may serve"):
        abandon_cycle(store, NAME, reason="too late")


def test_a_candidate_that_a_person_promoted_meanwhile_is_not_left_unwatched(
    store: Store, tmp_path: Path
):
    work = ScriptedWork(store=store, waits=True)
    run(store, work, tmp_path)
    store.set_champion(NAME, expected=START, version="v1", reason={"why": "a person"})
    with pytest.raises(ConfigError, match="serves already, because somebody promoted it; run the"):
        abandon_cycle(store, NAME, reason="forgotten")
    work.waits = False
    assert run(store, work, tmp_path).outcome == "promoted"
    assert work.done[-1] == "watch"
    # Another version in its place is no reason to go on.
    run(store, ScriptedWork(store=store, waits=True), tmp_path)
    store.set_champion(NAME, expected="v1", version=START, reason={"why": "a person"})
    result = abandon_cycle(store, NAME, reason="forgotten")
    assert result is not None
    assert result.outcome == "abandoned"


def test_a_lease_that_cannot_be_given_back_is_told_and_the_result_stands(
    store: Store, tmp_path: Path
):
    other = sqlite3.connect(store.where, isolation_level=None)

    def lock(step: str, moment: str, _) -> None:
        if (step, moment) == ("watch", "moved"):
            other.execute("BEGIN IMMEDIATE")

    told: list[str] = []
    with open_store(store.where, timeout_seconds=0.1) as opened:
        result = run(opened, ScriptedWork(store=opened), tmp_path, tell=lock, warn=told.append)
    other.close()
    assert result.outcome == "promoted"
    (said,) = told
    assert said.startswith("lease 'learn/bot' could not be given back (")
    assert said.endswith("it ends by itself, within 30 seconds")
    assert store.lease(lease_name(NAME)) is not None


def test_a_model_without_champion_has_nothing_to_learn_from(tmp_path: Path):
    with open_store(str(tmp_path / "store.db")) as store:
        with pytest.raises(ConfigError, match="no champion to learn from"):
            run(store, ScriptedWork(store=store), tmp_path)
        assert store.cycles() == []


def test_whoever_lost_its_lease_moves_nothing(store: Store, tmp_path: Path):
    """A process that slept too long: another one took the lease over while a step ran."""

    def lose(step: str) -> None:
        if step == "update":
            held = store.lease(lease_name(NAME))
            assert held is not None
            store.drop_lease(held)
            store.take_lease(lease_name(NAME), holder="the other", seconds=60.0)

    work = ScriptedWork(store=store, during=lose)
    with pytest.raises(LeaseHeld, match="held by the other"):
        run(store, work, tmp_path)
    cycle = open_cycle(store, NAME)
    assert cycle is not None
    assert cycle.state == "update"
    held = store.lease(lease_name(NAME))
    assert held is not None
    assert held.holder == "the other"


def test_a_cycle_is_moved_only_from_where_it_was_read(store: Store):
    begun = store.begin_cycle(NAME, state="validate", payload={})
    moved = store.move_cycle(begun, state="update", payload={"a": 1})
    assert moved == store.cycles(NAME)[0]
    assert moved.revision == 2
    with pytest.raises(CycleMoved, match="no longer as it was read"):
        store.move_cycle(begun, state="gate", payload={})
    with pytest.raises(CycleMoved, match="goes on at 'update'"):
        store.begin_cycle(NAME, state="validate", payload={})
    ended = store.move_cycle(moved, state="refused", payload={}, ends=True)
    with pytest.raises(CycleMoved):
        store.move_cycle(replace(ended), state="promoted", payload={}, ends=True)
    assert store.begin_cycle(NAME, state="validate", payload={}).number == 2
    assert store.begin_cycle("other", state="validate", payload={}).number == 1


def test_all_that_a_step_wrote_is_on_the_disk_before_the_cycle_moves(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    flushed: set[int] = set()
    fsync = os.fsync

    def told(descriptor: int) -> None:
        fsync(descriptor)
        flushed.add(os.fstat(descriptor).st_ino)

    def require(step: str, moment: str, _) -> None:
        if moment == "written":
            folder = tmp_path / "cycle-000001"
            kept = [folder / step, *(folder / step).iterdir(), folder, tmp_path]
            assert {path.stat().st_ino for path in kept} <= flushed
            seen.append({path.name for path in (folder / step).iterdir()})

    seen: list[set[str]] = []
    monkeypatch.setattr(os, "fsync", told)
    run(store, ScriptedWork(store=store), tmp_path, tell=require)
    assert seen == [{"half", "whole", "report.json"}] * len(STEPS)


def test_a_damaged_report_is_named(store: Store, tmp_path: Path):
    def spoil(step: str, moment: str, _) -> None:
        if (step, moment) == ("evaluate", "written"):
            (tmp_path / "cycle-000001" / "evaluate" / "report.json").write_text("{")
            raise KeyboardInterrupt

    work = ScriptedWork(store=store)
    with pytest.raises(KeyboardInterrupt):
        run(store, work, tmp_path, tell=spoil)
    with pytest.raises(StoreError, match=r"evaluate/report\.json cannot be read"):
        run(store, work, tmp_path)


def test_a_new_step_cannot_be_left_out():
    """Work has to do it, a refusal has a reason for it, and crash tests go through `STEPS`."""
    methods = {name for name in vars(CycleWork) if not name.startswith("_")}
    assert methods == {*STEPS, ROLL_BACK} == set(REASONS)
