"""Cycles with real models from data to what is served, on a tiny model."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from tests.models import save_tiny
from tests.tiny_runs import tiny_recipe

from gmpo.config import RewardConfig
from gmpo.continual import ControllerSettings, open_cycle, run_cycle
from gmpo.continual.plan import LearnPlan, write_rows
from gmpo.continual.records import CycleFacts, CycleResult, StepReport
from gmpo.continual.release import Compared, read_compared
from gmpo.continual.serving import served_process
from gmpo.continual.work import RealWork, cycle_request, dry_run
from gmpo.errors import ConfigError, DataError, ModelError
from gmpo.registry import Registry
from gmpo.store import Store, open_store

pytestmark = pytest.mark.usefixtures("forked")

NAME = "tiny"
SERVE = ("--max-prompt-tokens", "60", "--max-tokens", "8", "--dtype", "fp32", "--name", NAME)


def rows(count: int, *, start: int = 0) -> list[dict[str, Any]]:
    """Questions to which any digit is an answer, which a tiny model learns within a few rounds."""
    return [
        {"prompt": f"{number * 7919 % 9973}?", "answers": list("123456789")}
        for number in range(start, start + count)
    ]


@dataclass(frozen=True, kw_only=True)
class Place:
    """A store with an adopted champion, and files to learn from."""

    folder: Path
    store: Store
    work: RealWork

    def file(self, name: str, listed: list[dict[str, Any]]) -> str:
        path = self.folder / f"{name}.jsonl"
        write_rows(path, listed)
        return str(path)

    def plan(self, **changes: Any) -> LearnPlan:
        recipe = changes.pop("recipe", None) or learning_recipe()
        return LearnPlan(
            recipe=recipe,
            **{
                "suites": {"old": self.file("old", rows(400, start=1000))},
                "approval": "auto",
                "check_samples": 0,
                "small_rounds": 1,
                "safety_items": 120,
                "live_items": 40,
                "growth_limits": {"latency": 4.0, "length": 1.5},
                "degradation_limit": 0.08,
                **changes,
            },
        )

    def run(self, plan: LearnPlan, listed: list[dict[str, Any]]) -> CycleResult:
        data = self.file("batch", listed)
        return run_cycle(
            self.store,
            NAME,
            self.work,
            folder=self.folder / "learn",
            request=lambda: cycle_request(plan, [data], trigger="asked for"),
            settings=ControllerSettings(),
        )


def learning_recipe(**changes: Any) -> Any:
    return tiny_recipe(
        "unused",
        reward={"weights": {"correct": 1.0}},
        sampling={"group_size": 16, "prompts_per_round": 8, "max_new_tokens": 1, "max_length": 64},
        training={"rounds": 6, "steps_per_round": 4, "learning_rate": 3e-3, **changes},
    )


@contextmanager
def opened(tmp_path: Path) -> Iterator[Place]:
    with open_store(str(tmp_path / "store.db")) as store:
        registry = Registry(store, tmp_path / "models")
        model = save_tiny(tmp_path / "tiny")
        first = registry.add(Path(model), name=NAME, parent=None, lineage={}, metrics={})
        registry.adopt(NAME, first.version, reason="first")
        work = RealWork(store=store, registry=registry, threads=1)
        yield Place(folder=tmp_path, store=store, work=work)


@contextmanager
def asking(url: str) -> Iterator[None]:
    """A user who asks on and on while the block runs."""
    over = threading.Event()

    def ask_on() -> None:
        body = {"model": NAME, "prompt": "7?", "max_tokens": 1, "user": "ann"}
        with httpx2.Client(timeout=60) as client:
            while not over.wait(0.2):
                client.post(f"{url}/completions", json=body).raise_for_status()

    thread = threading.Thread(target=ask_on)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_cycles_improve_what_is_served_and_leave_out_what_unlearns(tmp_path: Path):
    with opened(tmp_path) as place:
        first = place.store.champion(NAME)
        assert first is not None
        start = Path(place.work.folder_of(first.version))
        # A reward that wants letters unlearns what there was to lose.
        letters = learning_recipe(learning_rate=1e-2).model_copy(
            update={"reward": RewardConfig(weights={"format": 1.0}, format_pattern="(?s)[a-z].*")}
        )
        wild = place.plan(recipe=letters, small_rounds=4)
        collapsed = place.run(wild, rows(60, start=200))
        assert (collapsed.outcome, collapsed.champion) == ("refused", first.version)
        assert collapsed.reason == "Safety test failed", (collapsed.step, collapsed.sentence)
        assert collapsed.stability_metrics is not None
        assert collapsed.stability_metrics["rounds"] == 4  # of the small update
        arguments = ("--store", place.store.where, "--follow", NAME, *SERVE)
        with served_process(str(start), arguments=arguments, threads=1, seconds=60) as url:
            # A champion whose files are gone is named, and the cycle goes on once they are back.
            start.rename(tmp_path / "elsewhere")
            users = {"live_users": 5, "live_seconds": 30.0, "live_least": 1}
            with pytest.raises(ModelError, match="no version of 'tiny' can be served"):
                place.run(place.plan(gateway=url, **users), rows(60))
            cycle = open_cycle(place.store, NAME)
            assert cycle is not None
            (tmp_path / "elsewhere").rename(start)
            with asking(url):
                good = place.run(place.plan(), rows(60))
        _require_a_trail(place, good, first=first.version)
        assert good.number == cycle.number
        # The same rows again are known by now.
        again = place.run(place.plan(), rows(60))
        assert (again.outcome, again.step) == ("refused", "validate")
        assert again.reason == "Data validation failed: no_row_left"
        now = place.store.champion(NAME)
        assert now is not None
        assert now.version == good.new_model_version


def _require_a_trail(place: Place, result: CycleResult, *, first: str) -> None:
    """What a cycle that promoted leaves behind."""
    assert result.outcome == "promoted", (result.step, result.sentence)
    assert (result.success, result.reason) == (True, None)
    assert result.performance_improvement is not None
    assert result.performance_improvement > 0.1
    assert result.stability_metrics is not None
    assert result.stability_metrics["rounds"] == 6
    history = place.store.champion_history(NAME)
    assert [one.version for one in history] == [first, result.new_model_version]
    made = place.store.model_version(result.new_model_version or "")
    assert made is not None
    assert (made.parent, made.lineage["cycle"]) == (first, 2)
    shadows = place.store.events(kinds=["shadow"], experiment="learn/tiny/2")
    assert len(shadows) == 40
    unseen = place.store.events(kinds=["shadow"], experiment="learn/tiny/2/users")
    assert len(unseen) >= 5
    assert {event.model_version for event in unseen} == {result.new_model_version}
    assert {event.unit for event in unseen} == {"ann"}
    reports = place.store.cycles(NAME)[-1].payload["reports"]
    assert reports["live_test"]["details"]["users"]["source"] == "users"
    assert reports["watch"]["details"]["users"]["answers"] >= 5
    assert "requests of users" in reports["live_test"]["sentence"]
    answered = {event.request_id for event in place.store.events(kinds=["answer"])}
    assert {event.request_id for event in shadows} <= answered
    (swap,) = place.store.events(kinds=["swap"])
    assert swap.model_version == result.new_model_version
    cycles = place.store.cycles(NAME)
    assert [cycle.state for cycle in cycles] == ["refused", "promoted"]
    assert cycles[-1].payload["result"]["success"] is True
    assert not list(place.folder.glob("learn/*/*/run/checkpoints"))


def test_a_damaged_champion_is_not_learned_from_and_raises_an_alert(tmp_path: Path):
    with opened(tmp_path) as place:
        first = place.store.champion(NAME)
        assert first is not None
        other = save_tiny(tmp_path / "other", seed=1)
        second = place.work.registry.add(Path(other), name=NAME, parent=first.version)
        place.store.set_champion(
            NAME, expected=first.version, version=second.version, reason={"why": "a person"}
        )
        weights = Path(second.path) / "model.safetensors"
        weights.chmod(0o644)
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
        with pytest.raises(ModelError, match=f"version {first.version} can serve in its place"):
            place.run(place.plan(), rows(60))
        (alert,) = place.store.alerts()
        assert alert.status == "firing"
        cycle = open_cycle(place.store, NAME)
        assert cycle is not None
        assert cycle.state == "validate"


def test_a_candidate_is_held_against_what_earlier_champions_once_answered(tmp_path: Path):
    with opened(tmp_path) as place:
        first = place.store.champion(NAME)
        assert first is not None
        others = [
            place.work.registry.add(
                Path(save_tiny(tmp_path / f"seed-{seed}", seed=seed)), name=NAME
            )
            for seed in (1, 2)
        ]
        second, third = (one.version for one in others)
        place.store.set_champion(
            NAME, expected=first.version, version=second, reason={"why": "a person"}
        )

        def evaluated(number: int, champion: str, candidate: str, **changes: Any) -> Compared:
            made = {"new_model_version": candidate}
            facts = CycleFacts(
                name=NAME,
                number=number,
                folder=tmp_path / "learn" / f"cycle-{number:06}",
                champion=champion,
                champion_revision=1,
                request={"plan": place.plan(**changes).model_dump(mode="json")},
                reports={"update": StepReport(passed=True, sentence="made", details=made)},
            )
            folder = facts.files("evaluate")
            folder.mkdir(parents=True)
            assert place.work.evaluate(facts, folder).passed
            return read_compared(folder)

        # Nothing is kept of the first one yet, so there is no earlier version to go by.
        assert evaluated(1, second, third).anchor is None
        with pytest.raises(DataError, match="0 versions of 'tiny' begin with it"):
            dry(place, tmp_path, anchor="abcdefabcdef")
        start = Path(place.work.folder_of(first.version))
        start.rename(tmp_path / "elsewhere")
        with pytest.raises(ModelError, match="has no folder"):
            dry(place, tmp_path, anchor=first.version[:8])
        (tmp_path / "elsewhere").rename(start)
        assert dry(place, tmp_path, anchor=first.version[:8])["anchor"] == first.version[:8]
        pinned = evaluated(2, second, third, anchor=first.version[:8]).anchor
        assert pinned is not None
        assert pinned.versions == {"old": first.version}
        # It was asked now, so its files are needed no more.
        shutil.rmtree(start)
        best = evaluated(3, second, third).anchor
        assert best is not None
        assert best.versions == {"old": first.version}
        assert np.array_equal(best.suites[0].champion, pinned.suites[0].champion)
        assert evaluated(4, second, third, anchor="none").anchor is None


def dry(place: Place, folder: Path, **changes: Any) -> dict[str, Any]:
    """What a cycle would do by a changed plan."""
    data = [place.file("batch", rows(30))]
    plan = place.plan(**changes)
    return dry_run(plan, data, place.work, name=NAME, folder=folder / "learn")


def test_bad_input_is_named_before_anything_is_trained(tmp_path: Path):
    with opened(tmp_path) as place:
        with pytest.raises(ConfigError, match="too small for the margin"):
            place.run(place.plan(suites={"old": place.file("few", rows(20, start=1000))}), rows(60))
        old = rows(400, start=1000)
        twice = {"old": place.file("old", old), "new": place.file("new", [*rows(399), old[0]])}
        with pytest.raises(ConfigError, match=r"suite 'new' is item .* of suite 'old' too"):
            place.run(place.plan(suites=twice), rows(60, start=3000))
        assert open_cycle(place.store, NAME) is None
        bad = [{"prompt": row["prompt"], "answer": ""} for row in rows(30)]
        result = place.run(place.plan(), bad)
        assert (result.outcome, result.step) == ("refused", "validate")
        few = place.run(place.plan(), rows(5, start=300))
        assert few.reason == "Data validation failed: too_few_rows"
        told = dry_run(
            place.plan(),
            [place.file("batch", rows(30))],
            place.work,
            name=NAME,
            folder=tmp_path / "learn",
        )
        assert told["data_passes"]
        assert told["suites"] == {"old": 400}
        assert len(place.store.cycles(NAME)) == 2
        one = place.plan(traffic=place.file("one", rows(1)), gateway="http://127.0.0.1:9/v1")
        with pytest.raises(DataError, match="has 1 request, and the live test needs at least 2"):
            dry_run(one, [str(tmp_path)], place.work, name=NAME, folder=tmp_path / "learn")
        empty = tmp_path / "empty.jsonl"
        empty.write_text("")
        with pytest.raises(DataError, match="holds no row"):
            dry_run(place.plan(), [str(empty)], place.work, name=NAME, folder=tmp_path / "learn")
