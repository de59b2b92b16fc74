"""A gateway before a model's server that answers, fails, stalls or breaks off; real sockets."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import pytest
from tests.gateways import RunningGateway, running_gateway
from tests.upstreams import (
    Behaviour,
    Body,
    Reply,
    Upstream,
    in_turn,
    refuses,
    running_upstream,
    says,
    text_event,
)

from gmpo.errors import ConfigError
from gmpo.serving.answer_record import AnswerRecord
from gmpo.serving.upstream import UpstreamBackend, UpstreamSettings

ASKED: dict[str, Any] = {"model": "bot", "prompt": "12+3=", "max_tokens": 64}
STREAMED = {**ASKED, "stream": True, "stream_options": {"include_usage": True}}


class Both:
    """An upstream, a gateway before it, and what the gateway recorded."""

    def __init__(self, upstream: Upstream, gateway: RunningGateway) -> None:
        self.upstream, self.gateway = upstream, gateway
        self.records: list[AnswerRecord] = []

    def ask(self, body: Body = ASKED, route: str = "completions") -> httpx2.Response:
        with self.gateway.client() as client:
            return client.post(f"/v1/{route}", json=body)

    def events(self, body: Body = STREAMED) -> list[str]:
        return [line[6:] for line in self.ask(body).text.splitlines() if line]

    def record(self) -> AnswerRecord:
        deadline = time.monotonic() + 5
        while not self.records and time.monotonic() < deadline:
            time.sleep(0.01)
        (one,) = self.records
        return one


@contextmanager
def both(behave: Behaviour, **settings) -> Iterator[Both]:
    records: list[AnswerRecord] = []
    with running_upstream(behave) as upstream:
        of = UpstreamSettings(
            **{"url": upstream.url, "model": "bot-4", "first_token_seconds": 5.0, **settings}
        )

        def backend() -> UpstreamBackend:
            return UpstreamBackend("bot", of, random_source=random.Random(1))

        with running_gateway(backend, observers=[records.append]) as gateway:
            made = Both(upstream, gateway)
            made.records = records
            yield made


def backend_of(made: Both) -> UpstreamBackend:
    assert isinstance(made.gateway.backend, UpstreamBackend)
    return made.gateway.backend


def test_an_answer_passes_through_whole_and_streamed():
    with both(says("4", "2", fingerprint="v9")) as made:
        whole = made.ask().json()
        assert whole["choices"][0]["text"] == "42"
        assert whole["choices"][0]["logprobs"] is None
        assert whole["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        assert whole["system_fingerprint"] == whole["gmpo"]["model_version"] == "v9"
        *events, done = made.events()
        assert done == "[DONE]"
        pieces = [json.loads(event) for event in events]
        assert [one["choices"][0]["text"] for one in pieces if one["choices"]] == ["4", "2", ""]
        assert pieces[-1]["usage"] == whole["usage"]
        chat = {"model": "bot", "messages": [{"role": "user", "content": "hi"}], "logprobs": True}
        answer = made.ask(chat, "chat/completions").json()
        assert answer["choices"][0]["message"]["content"] == "42"
        assert [one["logprob"] for one in answer["choices"][0]["logprobs"]["content"]] == [-0.5] * 2


def test_the_server_is_asked_for_its_own_model_a_stream_and_log_probabilities():
    with both(says("4")) as made:
        body = {
            **ASKED,
            "seed": 3,
            "top_k": 5,
            "metadata": {"reference": "15"},
            "store": True,
            "user": "u",
        }
        assert made.ask(body).status_code == 200
        assert made.upstream.bodies == [
            {
                "model": "bot-4",
                "prompt": "12+3=",
                "max_tokens": 64,
                "n": 1,
                "temperature": 1.0,
                "top_p": 1.0,
                "seed": 3,
                "top_k": 5,
                "user": "u",
                "logprobs": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ]
        assert "metadata" not in made.upstream.bodies[0]
        refused = made.ask({**ASKED, "tools": [{}]})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "tools"


def test_a_limit_reaches_the_server_once_whatever_its_name():
    with both(says("4")) as made:
        asked = {"model": "bot", "prompt": "12+3=", "max_completion_tokens": 40}
        assert made.ask(asked).status_code == 200
        chat = {"model": "bot", "messages": [{"role": "user", "content": "hi"}]}
        assert made.ask({**chat, "max_completion_tokens": 40}, "chat/completions").is_success
        limits = [
            {name: value for name, value in body.items() if "max_" in name}
            for body in made.upstream.bodies
        ]
        assert limits == [{"max_tokens": 40}, {"max_completion_tokens": 40}]
        refused = made.ask({**asked, "max_tokens": 40})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "max_completion_tokens"


def test_its_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BOT_KEY", "sk-9")
    with both(says("4"), api_key_env="BOT_KEY") as made:
        assert made.ask().status_code == 200
        assert "authorization: Bearer sk-9" in made.upstream.headers[0]
    monkeypatch.delenv("BOT_KEY")
    settings = UpstreamSettings(url="http://127.0.0.1:9/v1", model="m", api_key_env="BOT_KEY")
    with pytest.raises(ConfigError, match="BOT_KEY, which is not set"):
        UpstreamBackend("bot", settings)


def test_a_stream_cut_after_40_of_60_tokens_is_not_passed_off_as_whole():
    async def cut(reply: Reply, body: Body) -> None:
        await reply.start()
        for _ in range(40):
            await reply.event(text_event("x"))
        reply.cut()

    with both(cut) as made:
        *pieces, last = made.events()
        assert len(pieces) == 40
        assert all(json.loads(one)["choices"][0]["finish_reason"] is None for one in pieces)
        error = json.loads(last)["error"]
        assert error["type"] == "upstream_disconnect" and "broke the connection" in error["message"]
        assert made.record().status == 502
        assert len(made.upstream.bodies) == 1, "after the first token it is not asked again"
        made.records.clear()
        refused = made.ask()
        assert refused.status_code == 502
        assert refused.json()["error"]["type"] == "upstream_disconnect"


def test_a_stream_that_ends_politely_but_too_early_is_cut_too():
    async def short(reply: Reply, body: Body) -> None:
        await reply.start()
        await reply.event(text_event("x"))
        await reply.event("[DONE]")
        await reply.end()

    with both(short) as made:
        *_, last = made.events()
        assert json.loads(last)["error"]["type"] == "upstream_disconnect"


def test_a_malformed_chunk_ends_the_answer():
    async def malformed(reply: Reply, body: Body) -> None:
        await reply.start()
        await reply.event(text_event("x"))
        await reply.event('{"choices": [{"index": 0, "text": 7')
        await reply.client_gone()

    with both(malformed) as made:
        first, last = made.events()
        assert json.loads(first)["choices"][0]["text"] == "x"
        assert "cannot be used" in json.loads(last)["error"]["message"]


def test_a_stalled_stream_is_cut_and_its_connection_closed():
    async def stall(reply: Reply, body: Body) -> None:
        await reply.start()
        await reply.event(text_event("x"))
        await reply.client_gone()
        made.upstream.gone.set()

    with both(stall, stall_seconds=0.2) as made:
        first, last = made.events()
        assert json.loads(first)["choices"][0]["text"] == "x"
        assert json.loads(last)["error"]["type"] == "timeout_error"
        assert made.upstream.gone.wait(5)


def test_a_server_that_drips_bytes_and_no_token_runs_out_of_time():
    async def drip(reply: Reply, body: Body) -> None:
        await reply.start()
        while True:
            await reply.data(b": ping\n\n")
            await asyncio.sleep(0.02)

    with both(drip, first_token_seconds=0.2) as made:
        refused = made.ask()
        assert refused.status_code == 504
        assert "no token for 0.2 seconds" in refused.json()["error"]["message"]
        assert len(made.upstream.bodies) == 1, "a time-out is not tried again"


def test_a_client_that_leaves_closes_the_servers_connection():
    async def slow(reply: Reply, body: Body) -> None:
        await reply.start()
        await reply.event(text_event("x"))
        await reply.client_gone()
        made.upstream.gone.set()

    with both(slow) as made, made.gateway.client() as client:
        with client.stream("POST", "/v1/completions", json=STREAMED) as response:
            next(response.iter_lines())
        assert made.upstream.gone.wait(5)
        assert made.record().status == 499


def test_what_may_pass_is_tried_again_before_the_first_token():
    async def dies(reply: Reply, body: Body) -> None:
        await reply.start()
        reply.cut()

    with both(in_turn(refuses(503, retry_after="0"), dies, says("4"))) as made:
        assert made.ask().json()["choices"][0]["text"] == "4"
        assert backend_of(made).num_retries == 2
        assert len(made.upstream.bodies) == 3


def test_tries_end():
    with both(refuses(429, retry_after="0"), retries=1) as made:
        refused = made.ask()
        assert (refused.status_code, len(made.upstream.bodies)) == (429, 2)
        assert "retry-after" in refused.headers


@pytest.mark.parametrize(
    ("behave", "status", "message", "num_asked"),
    [
        (refuses(400, "max_tokens is too large"), 400, "max_tokens is too large", 1),
        (refuses(401), 500, "another API key", 1),
        (refuses(404), 500, "no model 'bot-4'", 1),
        (refuses(500), 500, "status 500", 1),
        (refuses(504), 504, "status 504", 1),
    ],
)
def test_refusals_are_told_apart(behave: Behaviour, status: int, message: str, num_asked: int):
    with both(behave) as made:
        refused = made.ask(STREAMED)
        assert refused.status_code == status
        error = refused.json()["error"]
        assert message in error["message"]
        assert (error["param"], error["code"]) == (("p", "c") if status == 400 else (None, None))
        assert len(made.upstream.bodies) == num_asked


def test_a_server_that_is_not_there_is_503_and_not_ready():
    with both(says("4"), url="http://127.0.0.1:9/v1", retries=0) as made:
        refused = made.ask()
        assert refused.status_code == 503 and "cannot be reached" in refused.text
        with made.gateway.client() as client:
            assert client.get("/ready").status_code == 503


def test_an_echoed_prompt_comes_in_one_piece():
    async def echo(reply: Reply, body: Body) -> None:
        assert "stream" not in body
        told = {"tokens": ["a", "b"], "token_logprobs": [None, -1.5], "text_offset": [0, 1]}
        choice = {"index": 0, "text": "ab", "finish_reason": "length", "logprobs": told}
        usage = {"prompt_tokens": 2, "completion_tokens": 0}
        await reply.whole(200, {"choices": [choice], "usage": usage})

    with both(echo) as made:
        body = {**ASKED, "prompt": "ab", "echo": True, "max_tokens": 0, "logprobs": 1}
        (choice,) = made.ask(body).json()["choices"]
        assert choice["logprobs"]["token_logprobs"] == [None, -1.5]
        assert made.record().payload()["mean_logprob"] is None
