"""Who answers, and what the client is told, when a server fails and the next one may not help."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.routed_gateways import ASKED, STREAMED, begin, served
from tests.upstreams import Body, refuses, says

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
