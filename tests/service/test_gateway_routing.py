"""Several models' servers behind one gateway: fallback, breaker, experiment, shadow, feedback."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import threading
import time
from contextlib import closing
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.gateways import running_gateway
from tests.routed_gateways import ASKED, STREAMED, begin, served
from tests.upstreams import Behaviour, Body, Reply, in_turn, refuses, says, text_event

from gmpo.abtest.analysis import analyse_records
from gmpo.abtest.records import EVENT_KINDS, read_records
from gmpo.abtest_report import render_experiment
from gmpo.serving.judging import QualityRules
from gmpo.serving.shadowing import ShadowSettings


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


def test_an_error_of_the_first_is_answered_by_the_second_and_said_everywhere(path: Path):
    with served(path, {"a": refuses(500), "b": says("4", "2", fingerprint="v2")}) as made:
        response = made.post("completions", ASKED)
        answer = response.json()
        assert answer["choices"][0]["text"] == "42"
        told = answer["gmpo"]
        assert (told["fell_back"], told["fallback_reason"]) == (True, "failed")
        assert (told["variant"], told["model_version"]) == ("b", "v2")
        # exp(-.5) = .607; floor .05: .626; the other two components are 1.
        assert told["quality_score"] == pytest.approx(0.626**0.3333, abs=1e-3)
        assert response.headers["x-gmpo-variant"] == "b"
        assert response.headers["x-gmpo-model-version"] == "v2"
        assert response.headers["x-gmpo-fell-back"] == "true"
        assert float(response.headers["x-gmpo-quality-score"]) == pytest.approx(
            told["quality_score"], abs=1e-4
        )
        (event,) = made.events("answer", count=1)
        assert event.payload["fell_back"] and event.payload["fallback_reason"] == "failed"
        assert event.payload["backend"] == event.payload["served_variant"] == "b"
        assert event.payload["quality"] == told["quality_score"]
        assert made.health()["routing"] == {
            "fallback_failed": 1,
            "low_quality": 0,
            "low_quality_served": 0,
        }


def test_an_error_at_the_first_chunk_of_a_stream_falls_back_before_headers_are_sent(path: Path):
    async def first_is_error(reply: Reply, body: Body) -> None:
        await reply.start()
        await reply.event({"error": {"message": "no worker", "code": 500}})
        await reply.end()

    with served(path, {"a": first_is_error, "b": says("4")}) as made:
        response = made.post("completions", STREAMED)
        events = [line[6:] for line in response.text.splitlines() if line]
        assert response.headers["x-gmpo-fell-back"] == "true"
        assert events[-1] == "[DONE]"
        assert json.loads(events[0])["choices"][0]["text"] == "4"


def test_a_stalled_first_gives_way_to_the_second(path: Path):
    async def stall(reply: Reply, body: Body) -> None:
        await reply.start()
        await reply.client_gone()
        made.upstreams["a"].gone.set()

    limits = {"first_token_seconds": 0.2}
    with served(path, {"a": stall, "b": says("4")}, upstream=limits) as made:
        assert made.ask()["gmpo"]["fallback_reason"] == "timeout"
        assert made.upstreams["a"].gone.wait(5)


def test_both_down_is_one_clear_error(path: Path):
    with served(path, {"a": refuses(503), "b": refuses(502)}) as made:
        response = made.post("completions", ASKED)
        assert response.status_code == 503 and "retry-after" in response.headers
        error = response.json()["error"]
        assert error["code"] == "no_backend"
        assert "a: backend 'a' answered with status 503" in error["message"]
        assert "b: backend 'b' answered with status 502" in error["message"]
        (event,) = made.events("answer", count=1)
        assert event.payload["status"] == 503 and event.payload["backend"] is None
        assert event.model_version == "a-model", "of the one that was asked first"


def test_an_open_breaker_spares_the_backend_and_half_open_lets_it_come_back(path: Path):
    now = [0.0]
    behaviours = {"a": refuses(500), "b": says("4")}
    with served(path, behaviours, breaker_clock=lambda: now[0]) as made:
        for _ in range(4):
            last = made.ask()
        assert len(made.upstreams["a"].bodies) == 2
        assert last["gmpo"]["fallback_reason"] == "breaker_open"
        assert made.health()["breakers"] == {"a": "open", "b": "closed"}
        with made.gateway.client() as client:
            figures = client.get("/metrics").text
        assert 'gmpo_gateway_breaker_open{backend="a"} 1.0' in figures
        assert 'gmpo_gateway_routing_total{event="fallback_breaker_open"} 2.0' in figures
        made.upstreams["a"].behave = says("5")
        now[0] = 0.45
        assert made.ask()["choices"][0]["text"] == "5"
        assert made.health()["breakers"]["a"] == "closed"


def test_a_low_score_falls_back_where_answers_are_held_back(path: Path):
    rules = QualityRules(is_buffered=True, threshold=0.6)
    unsure = says("4", logprob=-4.0)
    with served(path, {"a": unsure, "b": says("5", logprob=-0.1)}, quality=rules) as made:
        response = made.post("completions", STREAMED)
        first, *_, last = [line[6:] for line in response.text.splitlines() if line]
        assert json.loads(first)["choices"][0]["text"] == "5" and last == "[DONE]"
        (event,) = made.events("answer", count=1)
        assert event.payload["fallback_reason"] == "low_quality"
        assert event.payload["served_variant"] == "b"


async def cut(reply: Reply, body: Body) -> None:
    await reply.start()
    await reply.event(text_event("4"))
    reply.cut()


def test_an_experiment_splits_by_unit_and_its_report_can_be_read(path: Path):
    # The candidate breaks half of its streams off, which nobody else can go on with.
    flaky = in_turn(*[cut, says("b")] * 40)
    with served(path, {"a": says("a"), "b": flaky}, experiment="e", before=begin) as made:
        variants: dict[str, set[str]] = {}
        for turn in range(40):
            unit = f"u{turn % 20}"
            headers = {"x-gmpo-unit": unit} if turn < 20 else {}
            body = STREAMED if turn < 20 else {**STREAMED, "user": unit}
            events = made.post("completions", body, **headers).text.split("\n\n")
            if "data: [DONE]" in events:
                text = json.loads(events[0][6:])["choices"][0]["text"]
                told = json.loads(events[1][6:])["gmpo"]["variant"]
                assert told == {"a": "control", "b": "candidate"}[text]
                variants.setdefault(unit, set()).add(told)
        assert all(len(seen) == 1 for seen in variants.values()), "a unit keeps its variant"
        exposures = made.events("exposure", count=20)
        outcomes = made.events("outcome", count=40)
        assigned = {event.unit: event.payload["variant"] for event in exposures}
        for event in outcomes:
            assert event.payload["variant"] == assigned[event.unit]
        failed = [event for event in outcomes if event.payload["success"] == 0]
        assert failed and all(event.payload["variant"] == "candidate" for event in failed)
        answers = made.events("answer", count=40)
        cuts = [one for one in answers if one.payload["status"] == 502]
        assert len(cuts) == len(failed)
        assert {one.payload["assigned_variant"] for one in cuts} == {"candidate"}
        found = made.store.experiment("e")
        assert found is not None
        records = read_records(made.store.events(kinds=EVENT_KINDS, experiment="e"))
        report = analyse_records(found, records)
        assert report.num_units == 20 and not records.counts["malformed_events"]


def test_a_session_is_the_unit_where_no_user_is_told(path: Path):
    with served(path, {"a": says("a"), "b": says("b")}, experiment="e", before=begin) as made:
        for turn in range(24):
            made.ask(**{"x-gmpo-session": f"s{turn % 8}"})
        made.ask({**ASKED, "user": "u"}, **{"x-gmpo-session": "s0"})
        made.ask({**ASKED, "user": "u"}, **{"x-gmpo-session": "s0", "x-gmpo-unit": "w"})
        made.ask()
        exposures = made.events("exposure", count=8 + 3)
        units = [event.unit for event in exposures]
        assert units[:10] == [*(f"s{turn}" for turn in range(8)), "u", "w"]
        assert units[10] == exposures[10].request_id
        outcomes = made.events("outcome", count=27)
        for unit in units:
            variants = {one.payload["variant"] for one in outcomes if one.unit == unit}
            assert len(variants) == 1, "a session keeps its variant"


def test_covariates_of_requests_take_noise_out_of_an_experiment(path: Path):
    # How sure an answer is depends on the unit far more than on the arm.
    def sure(arm: float) -> Behaviour:
        async def behave(reply: Reply, body: Body) -> None:
            ease = float(body["prompt"].partition(" ")[2])
            await says("4", logprob=-0.2 - arm - 2 * (1 - ease))(reply, body)

        return behave

    plan = {"primary": "quality", "burn_in": 10, "tuned_for": 60}
    arms = {"a": sure(0.0), "b": sure(0.1)}
    with served(path, arms, experiment="e", before=partial(begin, **plan)) as made:
        for turn in range(60):
            ease = turn * 37 % 60 / 60
            metadata = {"covariate": ease if turn % 2 else f"{ease}"}
            asked = {**ASKED, "prompt": f"ease {ease}", "metadata": metadata}
            made.ask(asked, **{"x-gmpo-unit": f"u{turn}"})
        # A later request's figure may have been changed by the experiment, and is left alone.
        made.ask(
            {**ASKED, "prompt": "ease 1", "metadata": {"covariate": 9}}, **{"x-gmpo-unit": "u0"}
        )
        events = made.events("exposure", count=60)
        assert {event.payload["covariate"] for event in events} == {n / 60 for n in range(60)}
        made.events("outcome", count=61)
        found = made.store.experiment("e")
        assert found is not None
        records = read_records(made.store.events(kinds=EVENT_KINDS, experiment="e"))
    report = analyse_records(found, records)
    with_them = report.primary
    config = {**found.config, "use_covariates": False}
    without = analyse_records(replace(found, config=config), records).primary
    assert without.variance_kept == 1 and with_them.variance_kept < 0.3
    assert with_them.interval is not None and without.interval is not None
    width = with_them.interval.high - with_them.interval.low
    assert width < 0.55 * (without.interval.high - without.interval.low)
    assert with_them.interval.low < with_them.estimate < with_them.interval.high
    shown = StringIO()
    Console(file=shown, width=200).print(render_experiment(report))
    left = f"covariates left {100 * with_them.variance_kept:.0f} % of the variance of mean quality"
    assert left in shown.getvalue()


@pytest.mark.parametrize(
    ("metadata", "param", "said"),
    [
        ({"covariate": "much"}, "metadata.covariate", "a number from -1000000000 to 1000000000"),
        ({"covariate": True}, "metadata.covariate", "or a text of one, not True"),
        ({"covariate": 10**400}, "metadata.covariate", "it must be a number"),
        ({"covariate": [1]}, "metadata.covariate", "not [1]"),
        ("0.5", "metadata", "it must be a JSON object, not '0.5'"),
    ],
)
def test_a_covariate_that_is_no_number_is_refused(
    path: Path, metadata: object, param: str, said: str
):
    with served(path, {"a": says("a"), "b": says("b")}, experiment="e", before=begin) as made:
        response = made.post("completions", {**ASKED, "metadata": metadata})
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["param"] == param and said in error["message"]
        assert not made.store.events(kinds=["exposure"])


@pytest.mark.parametrize(("behave", "fault"), [(refuses(500), "failed"), (cut, "broken")])
def test_an_arm_that_is_down_is_served_by_the_other_and_judged_as_assigned(
    path: Path, behave: Behaviour, fault: str
):
    with served(path, {"a": says("a"), "b": behave}, experiment="e", before=begin) as made:
        for turn in range(20):
            assert made.ask(**{"x-gmpo-unit": f"u{turn}"})["choices"][0]["text"] == "a"
        answers = made.events("answer", count=20)
        rescued = [one for one in answers if one.payload["assigned_variant"] == "candidate"]
        assert len(rescued) > 3
        assert {one.payload["served_variant"] for one in answers} == {"control"}
        assert all(one.payload["fell_back"] for one in rescued)
        reasons = {one.payload["fallback_reason"] for one in rescued}
        assert reasons == {fault, "breaker_open"}
        for event in made.events("outcome", count=20):
            is_rescued = event.payload["variant"] == "candidate"
            assert event.payload["fell_back"] is is_rescued
            assert event.payload["served_variant"] == "control"


def test_shadows_answer_unseen_at_most_so_many_at_once_and_never_slow_the_served(path: Path):
    release = threading.Event()

    async def slow(reply: Reply, body: Body) -> None:
        while not release.is_set():
            await asyncio.sleep(0.01)
        await says("b", logprob=-1.0)(reply, body)

    shadow = ShadowSettings(backend="b", share=1.0, max_running=2)
    limits = {"first_token_seconds": 20.0}
    with served(path, {"a": says("a"), "b": slow}, shadow=shadow, upstream=limits) as made:
        began = time.perf_counter()
        answers = [made.ask() for _ in range(4)]
        assert time.perf_counter() - began < 5
        assert [one["choices"][0]["text"] for one in answers] == ["a"] * 4
        deadline = time.monotonic() + 5
        while len(made.upstreams["b"].bodies) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(made.upstreams["b"].bodies) == 2
        release.set()
        events = made.events("shadow", count=2)
        assert {event.request_id for event in events} <= {one["id"] for one in answers}
        for event in events:
            assert event.payload["variant"] == event.payload["backend"] == "b"
            assert event.payload["latency_s"] > 0 and event.payload["error"] is None
            assert event.payload["mean_logprob"] == -1.0
            assert event.payload["quality"] < answers[0]["gmpo"]["quality_score"]


def test_shadows_of_an_arm_are_paired_with_the_served_answer(path: Path):
    shadow = ShadowSettings(backend="b", share=1.0, max_running=50)
    behaviours = {"a": says("a"), "b": says("b", logprob=-1.0)}
    with served(path, behaviours, shadow=shadow, experiment="e", before=begin) as made:
        texts = [
            made.ask(**{"x-gmpo-unit": f"u{turn}"})["choices"][0]["text"] for turn in range(16)
        ]
        made.events("shadow", count=texts.count("a"))
        made.events("answer", count=16)
        records = read_records(made.store.events(kinds=EVENT_KINDS, experiment="e"))
        assert len(records.shadow_pairs) == texts.count("a") > 2
        for pair in records.shadow_pairs:
            assert pair.shadow_quality is not None and pair.served_quality is not None
            assert pair.shadow_quality < pair.served_quality


def test_a_failing_shadow_is_recorded_and_harms_nobody(path: Path):
    shadow = ShadowSettings(backend="b", share=1.0)
    with served(path, {"a": says("a"), "b": refuses(500)}, shadow=shadow) as made:
        assert made.ask()["choices"][0]["text"] == "a"
        (event,) = made.events("shadow", count=1)
        assert event.payload["quality"] is None and "status 500" in event.payload["error"]


def test_feedback_is_recorded_and_becomes_an_outcome_of_the_experiment(path: Path):
    with served(path, {"a": says("a"), "b": says("b")}, experiment="e", before=begin) as made:
        answer = made.ask(**{"x-gmpo-unit": "u", "x-gmpo-session": "s"})
        body = {"request_id": answer["id"], "thumbs": "down", "comment": "wrong"}
        response = made.post("feedback", body)
        assert response.status_code == 200
        assert response.json() == {"object": "feedback", "request_id": answer["id"], "score": 0.0}
        (event,) = made.events("feedback", count=1)
        assert event.payload == {"score": 0.0, "thumbs": "down", "comment_length": 5}
        assert (event.request_id, event.unit, event.experiment) == (answer["id"], "u", "e")
        assert event.model_version == answer["gmpo"]["model_version"]
        made.events("outcome", count=2)
        records = read_records(made.store.events(kinds=EVENT_KINDS, experiment="e"))
        (outcome,) = records.outcomes
        assert outcome.success == 0, "what somebody said replaces what was taken for granted"
        assert outcome.judged_by == "feedback"
        assert outcome.session == "s" and outcome.latency_seconds is not None


def test_feedback_on_an_earlier_gateways_answer_is_looked_up(path: Path):
    with served(path, {"a": says("a")}) as made:
        answer = made.ask()
        made.events("answer", count=1)
    with served(path, {"a": says("a")}) as made:
        body = {"request_id": answer["id"], "score": 0.75}
        assert made.post("feedback", body).json()["score"] == 0.75
        (event,) = made.events("feedback", count=1)
        assert event.payload == {"score": 0.75, "comment_length": 0}
        assert event.model_version == answer["gmpo"]["model_version"]


REFUSED_FEEDBACK: list[tuple[Any, int, str | None, str]] = [
    (
        {"request_id": "cmpl-0", "score": 1},
        404,
        "request_id",
        "there is no answer 'cmpl-0' on record; give the id of a response, or of one with several "
        "prompts a request_id in its gmpo",
    ),
    (
        {"request_id": "cmpl-0"},
        400,
        None,
        "neither score nor thumbs is given; give either score or thumbs: score is a number from 0 "
        "to 1, thumbs is 'up' or 'down'",
    ),
    (
        {"request_id": "cmpl-0", "score": 1, "thumbs": "up"},
        400,
        None,
        "both are given; give either score or thumbs: score is a number from 0 to 1, thumbs is "
        "'up' or 'down'",
    ),
    (
        {"request_id": "cmpl-0", "score": 1.5},
        400,
        "score",
        "score: it must be a number from 0 to 1, not 1.5",
    ),
    (
        {"request_id": "cmpl-0", "score": "good"},
        400,
        "score",
        "score: it must be a number from 0 to 1, not 'good'",
    ),
    (
        {"request_id": "cmpl-0", "score": True},
        400,
        "score",
        "score: it must be a number from 0 to 1, not True",
    ),
    (
        {"request_id": "cmpl-0", "thumbs": "sideways"},
        400,
        "thumbs",
        "thumbs: Input should be 'up' or 'down', not 'sideways'",
    ),
    (
        {"request_id": "cmpl-0", "thumb": "up"},
        400,
        "thumb",
        "there is no field 'thumb', which is 'up'; did you mean 'thumbs'?",
    ),
    (
        {"request_id": "cmpl-0", "score": 1, "stars": 5},
        400,
        "stars",
        "there is no field 'stars', which is 5; known are request_id, score, thumbs, comment",
    ),
    (
        {"score": 1},
        400,
        "request_id",
        "request_id: it is required, and missing; give the id of an answer",
    ),
    (
        {"request_id": 7, "score": 1},
        400,
        "request_id",
        "request_id: Input should be a valid string, not 7",
    ),
    (
        {"request_id": "a\0", "score": 1},
        400,
        "request_id",
        "request_id: it must hold no NUL character, not 'a\\x00'",
    ),
]


def test_feedback_that_cannot_be_kept_is_refused_with_what_is_allowed(path: Path):
    with served(path, {"a": says("a")}) as made:
        for body, status, param, said in REFUSED_FEEDBACK:
            response = made.post("feedback", body)
            assert response.status_code == status, response.text
            error = response.json()["error"]
            assert (error["message"], error["param"]) == (said, param)
            assert error.keys() == {"message", "type", "param", "code"}
        assert not made.store.events(kinds=["feedback"])


def test_without_a_store_feedback_is_refused_clearly():
    with running_gateway(router=_Nobody()) as gateway, gateway.client() as client:
        response = client.post("/v1/feedback", json={"request_id": "r", "score": 1})
        assert response.status_code == 404
        assert "start it with --store" in response.json()["error"]["message"]


class _Nobody:
    """A router of no backend."""

    model_names = ("bot",)
    model_version = None

    async def route(self, request: Any, report: Any) -> Any:
        raise AssertionError("nobody asks")

    async def ready(self) -> bool:
        return True

    async def close(self) -> None:
        pass


def test_a_locked_store_delays_no_answer_and_loses_no_event(path: Path):
    with served(path, {"a": says("a"), "b": says("b")}, experiment="e", before=begin) as made:
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            began = time.perf_counter()
            answers = [made.ask(**{"x-gmpo-unit": f"u{turn}"}) for turn in range(5)]
            body = {"request_id": answers[0]["id"], "thumbs": "up"}
            assert made.post("feedback", body).status_code == 200
            assert time.perf_counter() - began < 5
            other.execute("ROLLBACK")
        made.events("answer", count=5)
        made.events("exposure", count=5)
        made.events("outcome", count=6)
        made.events("feedback", count=1)
        assert made.writer.num_lost == 0
