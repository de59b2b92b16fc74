"""Who answers, and what the client is told, when a server fails and the next one may not help."""

from __future__ import annotations

import json
from pathlib import Path

import httpx2
import pytest
from tests.routed_gateways import ASKED, STREAMED, begin, served
from tests.upstreams import Behaviour, Body, Reply, refuses, says, text_event

from gmpo.serving.judging import QualityRules

FOREIGN = "the embedded engine does not follow 'response_format'"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.mark.parametrize("body", [ASKED, STREAMED])
def test_a_fallbacks_refusal_does_not_make_a_valid_request_a_wrong_one(path: Path, body: Body):
    with served(path, {"a": refuses(503), "b": refuses(400, FOREIGN)}) as made:
        for _ in range(2):  # then the breaker opens, for a time that a busy machine may miss
            response = made.post("completions", body)
            assert response.status_code == 503 and "retry-after" in response.headers
            assert "backend 'a' answered with status 503" in response.json()["error"]["message"]
            assert FOREIGN not in response.text
        assert made.health()["routing"]["refused_later"] == 2


def test_an_arm_that_is_down_has_failed_where_the_other_one_refuses(path: Path):
    behaviours = {"a": refuses(400, FOREIGN), "b": refuses(503)}
    with served(path, behaviours, experiment="e", before=begin) as made:
        statuses = {}
        for turn in range(12):
            response = made.post("completions", ASKED, **{"x-gmpo-unit": f"u{turn}"})
            statuses[f"u{turn}"] = response.status_code
        outcomes = made.events("outcome", count=12)
        by_arm = {"control": (400, None, None), "candidate": (503, 0, "fault")}
        assert {event.payload["variant"] for event in outcomes} == set(by_arm)
        for event in outcomes:
            found = event.payload["success"], event.payload["judged_by"]
            assert (statuses[event.unit or ""], *found) == by_arm[event.payload["variant"]]


def test_a_low_answer_is_served_where_the_next_server_refuses_the_request(path: Path):
    low = says("4", logprob=-4.0)
    rules = QualityRules(is_buffered=True, threshold=0.6)
    with served(path, {"a": low, "b": refuses(400, FOREIGN)}, quality=rules) as made:
        answer = made.ask()
        assert answer["choices"][0]["text"] == "4"
        assert answer["gmpo"]["variant"] == "a" and not answer["gmpo"]["fell_back"]


async def killed(reply: Reply, body: Body) -> None:
    await reply.start()
    for _ in range(40):
        await reply.event(text_event("x"))
    reply.cut()


async def stalls(reply: Reply, body: Body) -> None:
    await reply.start()
    await reply.event(text_event("x"))
    await reply.client_gone()


async def malformed(reply: Reply, body: Body) -> None:
    await reply.start()
    await reply.event(text_event("x"))
    await reply.event('{"choices": [{"index": 0, "text": 7')
    await reply.client_gone()


@pytest.mark.parametrize(
    ("behave", "fault"), [(killed, "broken"), (stalls, "timeout"), (malformed, "broken")]
)
def test_a_plain_answer_whose_server_fails_in_its_middle_comes_from_the_next_one(
    path: Path, behave: Behaviour, fault: str
):
    with served(path, {"a": behave, "b": says("4", "2")}, upstream={"stall_seconds": 0.3}) as made:
        answer = made.ask()
        assert answer["choices"][0]["text"] == "42", "nothing of the first answer is left"
        assert answer["usage"]["completion_tokens"] == 2
        told = answer["gmpo"]
        assert (told["variant"], told["fallback_reason"]) == ("b", fault)
        several = made.ask({**ASKED, "prompt": ["1+1=", "2+2="]})
        assert [choice["text"] for choice in several["choices"]] == ["42", "42"]
        assert made.health()["routing"]["fallback_" + fault] >= 2


def test_a_stream_whose_server_fails_in_its_middle_is_still_cut(path: Path):
    with served(path, {"a": killed, "b": says("4")}) as made:
        events = [line[6:] for line in made.post("completions", STREAMED).text.splitlines() if line]
        assert json.loads(events[-1])["error"]["type"] == "upstream_disconnect"
        assert made.health()["routing"]["cut_streams"] == 1
        assert not made.upstreams["b"].bodies


def test_a_client_that_leaves_a_plain_answer_ends_it_and_nobody_else_is_asked(path: Path):
    async def slow(reply: Reply, body: Body) -> None:
        await stalls(reply, body)
        made.upstreams["a"].gone.set()

    with served(path, {"a": slow, "b": says("4")}) as made:
        with made.gateway.client(timeout=0.5) as client, pytest.raises(httpx2.ReadTimeout):
            client.post("/v1/completions", json=ASKED)
        assert made.upstreams["a"].gone.wait(5)
        (event,) = made.events("answer", count=1)
        assert (event.payload["status"], event.payload["backend"]) == (499, "a")
        assert not made.upstreams["b"].bodies
        assert made.health()["running_completions"] == 0
        assert made.health()["breakers"] == {"a": "closed", "b": "closed"}


def test_a_gateway_whose_breakers_are_all_open_is_not_ready(path: Path):
    now = [0.0]
    behaviours = {"a": refuses(503), "b": refuses(500)}
    with served(path, behaviours, breaker_clock=lambda: now[0]) as made:

        def ready() -> httpx2.Response:
            with made.gateway.client() as client:
                return client.get("/ready")

        assert ready().status_code == 200
        for _ in range(2):
            assert made.post("completions", ASKED).status_code == 503
        assert made.health()["breakers"] == {"a": "open", "b": "open"}
        # Both list their models, and would be asked nothing.
        assert ready().status_code == 503 and ready().json()["error"]["code"] == "not_ready"
        now[0] = 0.4
        assert ready().status_code == 200
