"""What users' own requests say of a candidate: waited for, paired, judged."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_ind
from tests.tiny_runs import tiny_recipe

from gmpo.continual.plan import LearnPlan, write_rows
from gmpo.continual.records import CycleFacts, StepReport
from gmpo.continual.trained_on import TrainedRequests
from gmpo.continual.users import fell_by_more, users_shadow, users_watch
from gmpo.errors import RunStopped
from gmpo.live_shadow import (
    CONTROLLER_SESSION,
    ShadowCall,
    UsersShadows,
    called,
    standing_call,
)
from gmpo.store import Event, ModelVersion, Store, open_store

NAME, CHAMPION, CANDIDATE = "bot", "v1", "v2"
URL = "http://127.0.0.1:9/v1"
TRAINED = "What is 2 + 2?"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(str(tmp_path / "store.db")) as opened:
        yield opened


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a cycle that was trained on one row, whose prompt nobody asks unless a test says so."""
    update = tmp_path / "cycle-000001" / "update"
    update.mkdir(parents=True)
    write_rows(update / "train.jsonl", [{"id": "new-0", "prompt": TRAINED, "answer": "4"}])
    return update.parent


def facts(folder: Path, **reports: StepReport) -> CycleFacts:
    made = StepReport(passed=True, sentence="made", details={"new_model_version": CANDIDATE})
    return CycleFacts(
        name=NAME,
        number=1,
        folder=folder,
        champion=CHAMPION,
        champion_revision=1,
        request={},
        reports={"update": made, **reports},
    )


def plan(**changes: Any) -> LearnPlan:
    few = {"live_users": 30, "live_seconds": 0.2, "live_least": 5}
    return LearnPlan(recipe=tiny_recipe("unused"), suites={"old": "old"}, **{**few, **changes})


def answer(
    number: int,
    quality: float | None = 0.9,
    *,
    version: str | None = CHAMPION,
    status: int = 200,
    session: str | None = None,
    unit: str | None = None,
) -> Event:
    return Event(
        kind="answer",
        time=time.time(),
        payload={"status": status, "quality": quality, "latency_s": 0.1, "session": session},
        model_version=version,
        unit=unit or f"user-{number}",
        request_id=f"{version}-{number}",
    )


def shadow(
    number: int, quality: float | None, *, fault: str | None = None, unit: str | None = None
) -> Event:
    return Event(
        kind="shadow",
        time=time.time(),
        payload={"quality": quality, "latency_s": 0.1, "fault": fault, "error": fault},
        model_version=CANDIDATE,
        experiment=f"learn/{NAME}/1/users",
        unit=unit or f"user-{number}",
        request_id=f"{CHAMPION}-{number}",
    )


def text(number: int, content: str, *, version: str = CHAMPION) -> Event:
    """What was asked, as a gateway records it where the client allows it."""
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
    return Event(
        kind="text",
        time=time.time(),
        payload={"messages": turns, "prompt": None, "completions": ["4"], "consent": True},
        model_version=version,
        request_id=f"{version}-{number}",
    )


def promote_candidate(store: Store) -> None:
    for version in (CHAMPION, CANDIDATE):
        row = ModelVersion(
            version=version, created=0.0, name=NAME, path="", parent=None, lineage={}, metrics={}
        )
        store.put_model_version(row)
    store.set_champion(NAME, expected=None, version=CANDIDATE, reason={})
    time.sleep(0.01)


def ask(store: Store, settings: LearnPlan, folder: Path) -> StepReport:
    return users_shadow(facts(folder), settings, store, url=URL, should_stop=lambda: False)


def test_pairs_by_hand(store: Store):
    call = ShadowCall(name=NAME, cycle=1, candidate=CANDIDATE, url=URL, until=time.time() + 60)
    store.add_events(
        [
            answer(0, 0.8, unit="ann"),
            answer(1, 0.6, unit="ann"),
            answer(2, 0.5, unit="bob"),
            answer(3, 0.5),
            answer(4, None),
            answer(5, 0.9, session=CONTROLLER_SESSION),
            shadow(0, 0.4, unit="ann"),
            shadow(1, 0.6, unit="ann"),
            shadow(2, 0.7, unit="bob"),
            shadow(3, None, fault="timeout"),
            shadow(4, 0.5),
            shadow(5, 0.5),
            shadow(6, None, fault="bad_request"),
        ]
    )
    pairs = UsersShadows(store, call, champion=CHAMPION).look()
    # ann: (.8 + .6) / 2 and (.4 + .6) / 2; bob as he is.
    assert pairs.served == pytest.approx([0.7, 0.5])
    assert pairs.shadow == pytest.approx([0.5, 0.7])
    # 4 has no quality, 5 is no user's, 6 is not allowed there.
    assert (pairs.num_shadows, pairs.num_failed, pairs.num_unpaired) == (7, 1, 3)


def test_each_answer_is_read_once_whatever_else_users_ask(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """One that is asked much: what a look costs goes by the shadows, not by the requests."""
    call = ShadowCall(name=NAME, cycle=1, candidate=CANDIDATE, url=URL, until=time.time() + 60)
    store.add_events([answer(number) for number in range(500)])
    shadows = UsersShadows(store, call, champion=CHAMPION)
    read: list[int] = []
    events = store.events

    def counted(**filters: Any) -> list[Event]:
        found = events(**filters)
        read.append(len(found))
        return found

    monkeypatch.setattr(store, "events", counted)
    assert shadows.look().num_shadows == 0
    store.add_events([shadow(0, 0.5), shadow(1, 0.5), shadow(500, 0.5)])
    first = shadows.look()
    assert (first.num_shadows, first.num_compared, first.num_unpaired) == (3, 2, 1)
    # Three shadows, and what there is of the requests: 2 + 2 + 1.
    assert sum(read) == 3 + 5
    # What was recorded late is found by the next look, which reads nothing twice.
    read.clear()
    store.add_events([answer(500), shadow(2, 0.5)])
    second = shadows.look()
    assert (second.num_shadows, second.num_compared, second.num_unpaired) == (4, 4, 0)
    assert sum(read) == 1 + 2 + 2


def test_a_watch_reads_each_answer_once_while_it_waits(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    promote_candidate(store)
    store.add_events([answer(number, version=CANDIDATE) for number in range(20)])
    read: list[int] = []
    events = store.events

    def counted(**filters: Any) -> list[Event]:
        found = events(**filters)
        read.append(len(found) if filters.get("model_version") == CANDIDATE else 0)
        return found

    def asked_on() -> bool:
        store.add_events([answer(len(read) + 100, version=CANDIDATE)])
        return False

    monkeypatch.setattr(store, "events", counted)
    live = StepReport(passed=True, sentence="fine", details={"users": {"source": "users"}})
    cycle, settings = facts(folder, live_test=live), plan(live_users=22, live_seconds=30.0)
    found = users_watch(cycle, settings, store, should_stop=asked_on)
    assert found is not None
    assert found.details["answers"] == sum(read) == 22


def test_requests_that_reached_no_version_are_told_and_held_against_none(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("gmpo.continual.users._PAGE_EVENTS", 7)
    store.add_events([answer(number) for number in range(40)])
    store.add_events([answer(number, None, version=None, status=503) for number in range(2)])
    promote_candidate(store)
    store.add_events([answer(number, version=CANDIDATE) for number in range(40)])
    store.add_events([answer(number, None, version=None, status=503) for number in range(9)])
    # No failure is the refusal of what is not allowed, no user's what a cycle asked.
    store.add_events([answer(9, None, version=None, status=400)])
    store.add_events([answer(10, None, version=None, status=503, session=CONTROLLER_SESSION)])
    live = StepReport(passed=True, sentence="fine", details={"users": {"source": "users"}})
    cycle = facts(folder, live_test=live)
    found = users_watch(cycle, plan(), store, should_stop=lambda: False)
    assert found is not None
    assert found.passed
    assert found.sentence.endswith(
        "; 9 requests failed before any version was asked (2 before the promotion)"
    )
    counted = {key: found.details[key] for key in ("failed", "without_version")}
    assert (counted, found.details["without_version_before"]) == (
        {"failed": 0, "without_version": 9},
        2,
    )


def test_a_call_stands_until_it_ends_or_its_time_is_over(store: Store):
    call = ShadowCall(name=NAME, cycle=1, candidate=CANDIDATE, url=URL, until=time.time() + 60)
    assert standing_call(store, NAME) is None
    with called(store, call):
        assert standing_call(store, NAME) == call
        assert standing_call(store, "another") is None
        assert standing_call(store, NAME, now=call.until) is None
    assert standing_call(store, NAME) is None


def test_where_users_ask_too_little_nobody_is_waited_for(store: Store, folder: Path):
    cycles = [answer(number, session=CONTROLLER_SESSION) for number in range(50)]
    store.add_events([*cycles, *(answer(number) for number in range(50, 54))])
    report = ask(store, plan(live_seconds=300.0), folder)
    assert report.passed
    assert report.details == {"source": "own", "requests_before": 4}
    assert "users asked 4 requests in 300 seconds, fewer than 5" in report.sentence
    assert store.events(kinds=["shadow_call"]) == []


def test_a_wait_ends_when_it_is_stopped_and_so_does_the_call(store: Store, folder: Path):
    store.add_events([answer(number) for number in range(10)])
    with pytest.raises(RunStopped, match="waited for users"):
        users_shadow(
            facts(folder), plan(live_seconds=300.0), store, url=URL, should_stop=lambda: True
        )
    assert len(store.events(kinds=["shadow_call"])) == 2
    assert standing_call(store, NAME) is None


@pytest.mark.parametrize(
    ("drop", "faults", "passed", "reason", "said"),
    [
        (0.0, 0, True, None, "answered 60 of 60 requests of users, at a quality of 0.700"),
        (0.02, 0, True, None, "0.680 (0.700"),  # certain, and within the margin
        (0.3, 0, False, None, "a drop of more than 5 points is shown"),
        (0.0, 1, True, None, "59 of 60"),
        (0.0, 2, False, "New version fails to answer", "58 of 60"),
    ],
)
def test_users_pairs_decide(
    store: Store,
    folder: Path,
    drop: float,
    faults: int,
    passed: bool,
    reason: str | None,
    said: str,
):
    store.add_events([answer(number, 0.6 + 0.2 * (number % 2)) for number in range(60)])
    store.add_events(
        [
            shadow(number, None, fault="failed")
            if number < faults
            else shadow(number, 0.6 + 0.2 * (number % 2) - drop)
            for number in range(60)
        ]
    )
    report = ask(store, plan(live_seconds=60.0), folder)  # enough are there
    assert (report.passed, report.reason) == (passed, reason)
    assert said in report.sentence
    assert report.details["source"] == "users"
    assert report.details["users"] == 60 - faults


def test_answers_to_what_the_candidate_was_trained_on_are_not_compared(store: Store, folder: Path):
    settings = plan(live_users=20, live_seconds=60.0)  # enough are there, so nobody is waited for
    # 20 requests on which it has lost much, and 40 that it knows by heart.
    store.add_events([answer(number, 0.6 + 0.2 * (number % 2)) for number in range(60)])
    store.add_events(
        [shadow(number, 1.0 if number >= 20 else 0.3 + 0.2 * (number % 2)) for number in range(59)]
    )
    store.add_events([shadow(59, None, fault="failed")])
    report = ask(store, settings, folder)
    assert report.passed  # their texts are not known
    assert report.details["trained_on"] == 0
    assert "trained on" not in report.sentence
    # Case, white space and the system's turn make no difference.
    store.add_events([text(number, " what is  2 + 2? ") for number in range(20, 60)])
    store.add_events([text(number, "What is 2 + 3?") for number in range(20)])
    report = ask(store, settings, folder)
    assert not report.passed
    assert report.details["trained_on"] == 39
    assert (report.details["failed"], report.details["users"]) == (1, 20)
    assert report.details["quality"] == {"served": pytest.approx(0.7), "shadow": pytest.approx(0.4)}
    assert (
        "answered 59 of 60 requests of users (39 asked what the cycle trained on and are not "
        "compared), at a quality of 0.400 (0.700 the champion's)"
    ) in report.sentence


def test_requests_of_trained_prompts_are_found_as_they_are_recorded(store: Store, folder: Path):
    requests = TrainedRequests(store, folder / "update", since=time.time() - 60.0)
    assert requests.look() == set()
    store.add_events([text(1, TRAINED), text(2, "What is 2 + 3?")])
    assert requests.look() == {f"{CHAMPION}-1"}
    store.add_events([text(3, TRAINED)])
    assert requests.look() == {f"{CHAMPION}-1", f"{CHAMPION}-3"}
    later = TrainedRequests(store, folder / "update", since=time.time() + 60.0)
    assert later.look() == set()


def test_a_gateway_that_has_nobody_asked_is_said(store: Store, folder: Path):
    store.add_events([answer(number) for number in range(10)])
    report = ask(store, plan(live_seconds=1.0), folder)
    assert report.passed
    assert "no gateway had a user's request answered" in report.sentence


@pytest.mark.parametrize(
    ("quality", "failed", "passed", "reason"),
    [
        (0.9, 0, True, None),
        (0.6, 0, False, None),
        (0.9, 1, True, None),
        (0.9, 5, False, "New version fails to answer"),
    ],
)
def test_what_users_get_after_the_promotion_is_held_against_before(
    store: Store, folder: Path, quality: float, failed: int, passed: bool, reason: str | None
):
    store.add_events([answer(number, 0.88 + 0.02 * (number % 2)) for number in range(40)])
    promote_candidate(store)
    store.add_events(
        [
            answer(number, None, version=CANDIDATE, status=503)
            if number < failed
            else answer(number, quality - 0.02 * (number % 2), version=CANDIDATE)
            for number in range(40)
        ]
    )
    settings = plan(live_seconds=30.0)
    live = StepReport(passed=True, sentence="fine", details={"users": {"source": "users"}})
    found = users_watch(facts(folder, live_test=live), settings, store, should_stop=lambda: False)
    assert found is not None
    assert (found.passed, found.reason) == (passed, reason), found.sentence
    assert f"{40 - failed} of 40 answers" in found.sentence
    own = StepReport(passed=True, sentence="fine", details={"users": {"source": "own"}})
    assert users_watch(facts(folder, live_test=own), settings, store, should_stop=bool) is None


def test_what_users_get_of_prompts_that_were_trained_on_is_not_held_against_before(
    store: Store, folder: Path
):
    store.add_events([answer(number, 0.88 + 0.02 * (number % 2)) for number in range(40)])
    store.add_events([answer(number, 0.1) for number in range(40, 60)])
    store.add_events([text(number, TRAINED) for number in range(40, 60)])
    promote_candidate(store)
    store.add_events(
        [
            # 0.3 less than before, which the answers that it knows by heart would hide.
            answer(number, 1.0 if number >= 20 else 0.6 - 0.02 * (number % 2), version=CANDIDATE)
            for number in range(60)
        ]
    )
    store.add_events([text(number, TRAINED, version=CANDIDATE) for number in range(20, 60)])
    live = StepReport(passed=True, sentence="fine", details={"users": {"source": "users"}})
    cycle, settings = facts(folder, live_test=live), plan(live_users=20, live_seconds=30.0)
    found = users_watch(cycle, settings, store, should_stop=lambda: False)
    assert found is not None
    assert not found.passed
    assert (found.details["trained_on"], found.details["trained_on_before"]) == (40, 20)
    assert "60 of 60 answers (40 asked what the cycle trained on and are not compared), at a " in (
        found.sentence
    )


def test_a_fall_by_hand():
    before = np.array([0.8, 0.8, 0.9, 1.0, 1.0])
    after = before - 0.7
    # Variances .01 each, error sqrt(.01 / 5 + .01 / 5) = .0632, 8 degrees of freedom, whose upper
    # 5 % begin at 1.860: .7 - .1176 = .582 is the largest drop that is shown.
    assert fell_by_more(before, after, margin=0.58, alpha=0.05)
    assert not fell_by_more(before, after, margin=0.585, alpha=0.05)
    assert not fell_by_more(before[:4], after, margin=0.0, alpha=0.05)
    ones = np.ones(5)
    assert fell_by_more(ones, ones - 0.5, margin=0.4, alpha=0.05)
    assert not fell_by_more(ones, ones, margin=0.4, alpha=0.05)


@given(
    before=st.lists(st.floats(0, 1), min_size=5, max_size=20),
    after=st.lists(st.floats(0, 1), min_size=5, max_size=20),
)
def test_the_fall_is_welchs(before: list[float], after: list[float]):
    one, other = np.round(before, 3), np.round(after, 3)
    if one.std() < 0.01 or other.std() < 0.01:
        return
    p = ttest_ind(one - 0.05, other, equal_var=False, alternative="greater").pvalue
    if abs(p - 0.05) > 1e-9:
        assert fell_by_more(one, other, margin=0.05, alpha=0.05) is bool(p < 0.05)
