"""Clumsy and hostile requests and servers: what one client does must not harm the others."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.gateways import running_gateway, tiny_backend
from tests.models import save_tiny
from tests.routed_gateways import ASKED, Served, begin, served
from tests.upstreams import Body, Reply, refuses, says

from gmpo.serving.access import read_api_keys


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


def post(made: Served, content: bytes) -> httpx2.Response:
    headers = {"content-type": "application/json"}
    with made.gateway.client() as client:
        return client.post("/v1/completions", content=content, headers=headers)


def with_field(field: str) -> bytes:
    return json.dumps(ASKED).encode()[:-1] + b", " + field.encode() + b"}"


# Python reads these, and would not write them into the request to the server.
@pytest.mark.parametrize(
    "field", ['"foo": NaN', '"foo": [1, {"bar": -Infinity}]'], ids=["nan", "infinity"]
)
def test_what_no_server_reads_is_the_clients_fault_and_opens_no_breaker(path: Path, field: str):
    with served(path, {"a": says("4")}) as made:  # whose breaker opens after two failures
        for _ in range(3):
            refused = post(made, with_field(field))
            assert refused.status_code == 400, refused.text
            assert refused.json()["error"]["type"] == "invalid_request_error"
        assert made.health()["breakers"] == {"a": "closed"}
        assert made.upstreams["a"].bodies == []
        assert made.ask()["choices"][0]["text"] == "4"


def test_lists_in_lists_of_any_depth_are_read_or_refused(path: Path):
    with served(path, {"a": says("4")}) as made:
        statuses = {
            post(made, with_field('"foo": ' + "[" * depth + "]" * depth)).status_code
            for depth in range(860, 1000, 4)
        }
        assert statuses == {200, 400}, "both sides of the limit, and never a failure"
        assert made.health()["breakers"] == {"a": "closed"}


def test_half_of_a_surrogate_pair_goes_to_the_server_as_it_came(path: Path):
    with served(path, {"a": says("4")}) as made:
        assert post(made, with_field('"foo": "\\ud83d"')).status_code == 200
        assert made.upstreams["a"].bodies[0]["foo"] == "\ud83d"
        assert made.health()["breakers"] == {"a": "closed"}


def test_a_name_that_no_encoding_has_is_refused_in_the_one_shape(tmp_path: Path):
    folder = save_tiny(tmp_path / "model")
    with running_gateway(lambda: tiny_backend(folder)) as gateway, gateway.client() as client:
        for route in ("completions", "feedback"):
            content = b'{"model": "tiny", "prompt": "1", "\\ud800": 1}'
            refused = client.post(
                f"/v1/{route}", content=content, headers={"content-type": "application/json"}
            )
            assert refused.status_code == 400, refused.text
            assert refused.json()["error"]["message"]


def test_the_prompts_of_one_request_close_a_breaker_together(path: Path):
    with served(path, {"a": refuses(500)}) as made:
        for _ in range(2):
            assert made.post("completions", ASKED).status_code == 500
        assert made.health()["breakers"] == {"a": "open"}
        made.upstreams["a"].behave = says("4")
        time.sleep(0.45)
        # One alone may pass while it is half open; the other two belong to the same response.
        answer = made.ask({**ASKED, "prompt": ["1+3=", "2+2=", "3+1="]})
        assert [choice["text"] for choice in answer["choices"]] == ["4"] * 3
        assert made.health()["breakers"] == {"a": "closed"}


def test_one_request_cannot_ask_for_thousands_of_completions(path: Path):
    with served(path, {"a": says("4")}) as made:
        body = {**ASKED, "prompt": ["1+1="] * 33, "n": 4}
        refused = made.post("completions", body)
        assert refused.status_code == 400
        error = refused.json()["error"]
        assert error["param"] == "n"
        assert error["message"].startswith("33 prompts with n 4 are 132 completions, and at most")
        assert made.upstreams["a"].bodies == []


@pytest.mark.parametrize(
    ("asked", "told"),
    [("9" * 400, "1"), ("\xb2", "1"), ("99999999", "3600"), ("7", "7")],
    ids=["huge", "no digit", "years", "plain"],
)
def test_a_servers_strange_retry_after_is_not_passed_on(path: Path, asked: str, told: str):
    async def overloaded(reply: Reply, body: Body) -> None:
        head = f"HTTP/1.1 429 X\r\ncontent-length: 2\r\nretry-after: {asked}\r\n\r\n{{}}"
        await reply.raw(head.encode("latin-1"))

    with served(path, {"a": overloaded}) as made:
        refused = made.post("completions", ASKED)
        assert refused.status_code == 429, refused.text
        assert refused.headers["retry-after"] == told


def test_a_version_with_a_line_end_becomes_no_header_of_its_own(path: Path):
    with served(path, {"a": says("4", fingerprint="v1\r\nset-cookie: a=b")}) as made:
        response = made.post("completions", ASKED)
        assert response.status_code == 200
        assert "set-cookie" not in response.headers
        assert response.headers["x-gmpo-model-version"] == "v1%0D%0Aset-cookie: a%3Db"


def test_a_file_of_keys_may_begin_with_a_mark_of_its_encoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("GMPO_API_KEYS", raising=False)
    file = tmp_path / "keys"
    file.write_bytes(b"\xef\xbb\xbfsk-one\r\nsk-two\r\n")
    keys = read_api_keys(file)
    assert keys.accept(b"sk-one") and keys.accept(b"sk-two")
    assert not keys.accept(b"")


def test_keys_reach_neither_a_server_nor_the_store(path: Path):
    with served(path, {"a": says("4")}) as made:
        made.ask(authorization="Bearer sk-secret", cookie="session=sk-secret")
        made.events("answer", count=1)
        assert "sk-secret" not in made.upstreams["a"].headers[0]
        assert not any("sk-secret" in repr(event) for event in made.store.events())


def test_once_its_hours_are_over_a_gateway_gives_everybody_control(path: Path):
    now = [1.0]
    behaviours = {"b": says("b"), "a": says("a")}  # without an experiment "b" would be asked first

    def begun(store: Any) -> None:
        begin(store, end_after_hours=24)

    with served(path, behaviours, experiment="e", before=begun, clock=lambda: now[0]) as made:
        units = [f"u{place}" for place in range(12)]
        texts = {unit: made.ask(**{"x-gmpo-unit": unit})["choices"][0]["text"] for unit in units}
        assert set(texts.values()) == {"a", "b"}
        assert made.health()["experiment"] == {"name": "e", "status": "running", "ends": 86401.0}
        made.events("outcome", count=12)
        now[0] = 86401.0
        for unit in [*units, "a new one"]:
            answer = made.ask(**{"x-gmpo-unit": unit})
            assert answer["choices"][0]["text"] == "a"
            assert answer["gmpo"]["fell_back"] is False
        health = made.health()
        assert health["experiment"] == {"name": "e", "status": "over", "ends": 86401.0}
        assert health["routing"]["after_experiment"] == 13
        with made.gateway.client() as client:
            assert 'gmpo_gateway_routing_total{event="after_experiment"} 13.0' in (
                client.get("/metrics").text
            )
        assert sum("are over" in said for said in made.told) == 1
        made.events("answer", count=25)
        made.events("exposure", count=12)
        made.events("outcome", count=12)
        # What somebody says later of an answer from before the end still belongs to it.
        first = made.store.events(kinds=["answer"], limit=1)[0]
        said = made.post("feedback", {"request_id": first.request_id, "thumbs": "down"})
        assert said.status_code == 200
        made.events("outcome", count=13)
