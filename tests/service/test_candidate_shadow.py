"""Users' requests, answered unseen by the candidate that a cycle calls for."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.routed_gateways import ASKED, Served, served
from tests.upstreams import refuses, running_upstream, says

from gmpo.live_shadow import CONTROLLER_SESSION, ShadowCall, UsersShadows, called, users_answers
from gmpo.serving.server import bound_socket

UNIT = {"x-gmpo-unit": "ann"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


def call_for(url: str, *, seconds: float = 60.0) -> ShadowCall:
    until = time.time() + seconds
    return ShadowCall(name="bot", cycle=3, candidate="v2", url=url, until=until)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def until_told(made: Served, word: str) -> None:
    wait_until(lambda: any(word in one for one in made.told))


def test_a_candidate_answers_what_users_ask_and_no_cycle_while_it_is_called_for(path: Path):
    with (
        served(path, {"a": says("4", logprob=-0.1, fingerprint="v1")}, follow="bot") as made,
        running_upstream(says("4", logprob=-2.0, fingerprint="v2")) as candidate,
    ):
        made.ask(**UNIT)
        call = call_for(candidate.url)
        with called(made.store, call):
            until_told(made, "answers users' requests too")
            for _ in range(3):
                assert made.ask(**UNIT)["system_fingerprint"] == "v1"
            made.ask(**{"x-gmpo-session": CONTROLLER_SESSION})
            made.events("shadow", count=3)
        # Once the call is over nobody asks it any more.
        until_told(made, "answers no more")
        made.ask(**UNIT)
        time.sleep(0.1)
        assert len(candidate.bodies) == 3
        events = made.events("shadow", count=3)
        assert {event.experiment for event in events} == {"learn/bot/3/users"}
        assert {event.model_version for event in events} == {"v2"}
        assert {event.payload["variant"] for event in events} == {"candidate"}
        assert all(body["model"] == "bot" for body in candidate.bodies)
        pairs = UsersShadows(made.store, call, champion="v1").look()
        # All of one user, so one pair of means.
        assert len(pairs.served) == len(pairs.shadow) == 1
        assert pairs.shadow[0] < pairs.served[0]
        assert (pairs.num_failed, pairs.num_unpaired) == (0, 0)
        assert len(users_answers(made.store, "v1", since=0.0)) == 5


def test_the_candidates_server_gets_one_key_of_several(path: Path, monkeypatch: pytest.MonkeyPatch):
    with (
        served(path, {"a": says("4", fingerprint="v1")}, follow="bot") as made,
        running_upstream(says("4", fingerprint="v2")) as candidate,
    ):
        # After the gateway has begun, which would want one of them itself.
        monkeypatch.setenv("GMPO_API_KEYS", " sk-a, sk-b")
        with called(made.store, call_for(candidate.url)):
            until_told(made, "answers users' requests too")
            made.ask(**UNIT)
            made.events("shadow", count=1)
        sent = [head.lower() for head in candidate.headers]
        assert sent and all("authorization: bearer sk-a\r\n" in head for head in sent)


def test_a_candidate_that_fails_is_counted_and_users_see_nothing_of_it(path: Path):
    with (
        served(path, {"a": says("4", fingerprint="v1")}, follow="bot") as made,
        running_upstream(says("4")) as candidate,
    ):
        call = call_for(candidate.url)
        with called(made.store, call):
            until_told(made, "answers users' requests too")
            for status in (500, 400):
                candidate.behave = refuses(status)
                assert made.ask(**UNIT)["choices"][0]["text"] == "4"
                made.events("shadow", count=1 if status == 500 else 2)
            pairs = UsersShadows(made.store, call, champion="v1").look()
        # What its server does not allow says nothing against the model.
        assert (pairs.num_shadows, pairs.num_failed, pairs.num_unpaired) == (2, 1, 1)
        assert len(pairs.served) == 0


def test_a_candidate_that_cannot_be_reached_is_told_once(path: Path):
    with served(path, {"a": says("4")}, follow="bot") as made:
        with called(made.store, call_for("http://127.0.0.1:9/v1")):
            until_told(made, "does not answer here")
            made.ask(**UNIT)
            time.sleep(0.2)
        assert len(made.told) == 1
        assert not made.store.events(kinds=["shadow"])


def test_a_candidate_that_answers_late_is_shadowed_from_then_on(path: Path):
    with bound_socket("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    with served(path, {"a": says("4")}, follow="bot") as made:
        with called(made.store, call_for(f"http://127.0.0.1:{port}/v1")):
            until_told(made, "does not answer here")
            with running_upstream(says("4"), port=port):
                until_told(made, "answers users' requests too")
                made.ask(**UNIT)
                made.events("shadow", count=1)
        until_told(made, "answers no more")
        assert len(made.told) == 3
        assert made.health()["routing"]["candidate_unreached"] >= 1


def test_a_call_ends_by_itself_should_its_process_be_killed(path: Path):
    with (
        served(path, {"a": says("4")}, follow="bot") as made,
        running_upstream(says("4")) as candidate,
        # Whoever was killed does not come to the block's end.
        called(made.store, call_for(candidate.url, seconds=3.0)),
    ):
        until_told(made, "answers users' requests too")
        until_told(made, "answers no more")
        asked = len(candidate.bodies)
        assert made.ask(ASKED, **UNIT)
        time.sleep(0.1)
        assert len(candidate.bodies) == asked
