"""What the gateway turns away, cuts, and lives through; over real sockets."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
from tests.gateways import (
    BreakingBackend,
    RunningGateway,
    running_gateway,
    served,
    tiny_backend,
)
from tests.models import save_tiny

from gmpo.serving.admission import AdmissionLimits
from gmpo.serving.answer_record import AnswerRecord
from gmpo.serving.app import GatewayLimits
from gmpo.serving.backend import Backend, BackendError, Chunk, GenerationRequest, Usage
from gmpo.serving.breaker import BreakerRules
from gmpo.serving.engine import EmbeddedBackend
from gmpo.serving.entrance import EntranceLimits
from gmpo.serving.judging import AnswerJudge, QualityRules
from gmpo.serving.router import VariantRouter
from gmpo.serving.server import ServerSettings

KEYS = ["sk-one", "sk-two"]
ASKED: dict[str, Any] = {"model": "tiny", "prompt": "12+3=", "max_tokens": 4, "temperature": 0}
LIMITS = GatewayLimits(entrance=EntranceLimits(max_body_bytes=4096, body_seconds=0.5))
SETTINGS = ServerSettings(head_seconds=0.5, drain_seconds=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def gateway(folder: str) -> Iterator[RunningGateway]:
    with running_gateway(
        lambda: tiny_backend(folder), limits=LIMITS, keys=KEYS, settings=SETTINGS
    ) as running:
        yield running


@pytest.fixture
def client(gateway: RunningGateway) -> Iterator[httpx2.Client]:
    with gateway.client(headers={"authorization": f"Bearer {KEYS[1]}"}) as made:
        yield made


def error_of(response: httpx2.Response, status: int) -> dict[str, Any]:
    """The error, after it was seen to have the one shape that all have."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["message"] and body["error"]["type"]
    if status in (408, 413, 429, 503):
        assert int(response.headers["retry-after"]) >= 1
    return body["error"]


def raw(gateway: RunningGateway, *pieces: bytes, pause: float = 0.0) -> bytes:
    """What comes back when these bytes are sent, with pauses, until the server ends it."""
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as connection:
        received = b""
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(pause)
        while part := connection.recv(65536):
            received += part
    return received


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        (b"{", None, "not JSON"),
        (b"[1]", None, "send one JSON object"),
        (b"", None, "JSON object"),
        (b"\xff\xfe", None, "body"),
        (b'{"model": "\xff"}', None, "it is not UTF-8"),
        (b"[" * 4000, None, "nests too deeply"),
        (json.dumps({**ASKED, "model": 3}).encode(), "model", "not 3"),
        (json.dumps({**ASKED, "prompt": [1, "a"]}).encode(), "prompt", "must be a text, a list"),
        (json.dumps({**ASKED, "prompt": []}).encode(), "prompt", "at least 1 item"),
        (json.dumps({**ASKED, "stop": ["a"] * 20}).encode(), "stop", "at most 16 items"),
        (json.dumps({**ASKED, "stop": 3}).encode(), "stop", "a text or a list of texts, not 3"),
        (json.dumps({**ASKED, "temperature": float("nan")}).encode(), "temperature", "nan"),
        (json.dumps({**ASKED, "seed": 2**70}).encode(), "seed", "seed"),
        (json.dumps({**ASKED, "stop": ""}).encode(), "stop", "stop"),
        (json.dumps({**ASKED, "n": True}).encode(), "n", "True"),
        (b'{"model": "tiny", "prompt": "\\ud800"}', "prompt", "prompt"),
        (b'{"model": "tiny"}', "prompt", "required"),
        (json.dumps({**ASKED, "prompt": ""}).encode(), "prompt", "empty"),
        (json.dumps({**ASKED, "model": "\ud83d"}).encode(), "model", "model"),
        (json.dumps({**ASKED, "tools": "\ud83d"}).encode(), "tools", "tools"),
    ],
)
def test_what_is_no_request_is_refused_in_the_one_shape(
    client: httpx2.Client, body: bytes, param: str | None, said: str
):
    headers = {"content-type": "application/json"}
    error = error_of(client.post("/v1/completions", content=body, headers=headers), 400)
    assert error["param"] == param
    assert said in error["message"]


def test_paths_and_methods_that_are_not_there(client: httpx2.Client):
    assert "/nothing" in error_of(client.get("/nothing"), 404)["message"]
    assert error_of(client.get("/v1/models/none"), 404)["code"] == "model_not_found"
    refused = client.get("/v1/completions")
    assert error_of(refused, 405)["message"].endswith("does not take GET; use POST")
    assert refused.headers["allow"] == "POST"


def test_keys_are_asked_for_under_v1_alone(gateway: RunningGateway):
    with gateway.client() as client:
        for headers in (
            {},
            {"authorization": "Bearer sk-thre"},
            {"authorization": "Basic sk-one"},
            {"authorization": b"Bearer \xe9"},
        ):
            refused = client.post("/v1/completions", json=ASKED, headers=headers)
            assert error_of(refused, 401)["code"] == "invalid_api_key"
            assert refused.headers["www-authenticate"] == "Bearer"
        for key in KEYS:
            headers = {"authorization": f"Bearer {key}"}
            assert client.get("/v1/models", headers=headers).status_code == 200
        for path in ("/health", "/ready", "/metrics", "/openapi.json"):
            assert client.get(path).status_code == 200


def test_a_body_that_is_too_large_is_refused(client: httpx2.Client, gateway: RunningGateway):
    for size in (4097, 50_000, 1_000_000):
        content = json.dumps({**ASKED, "prompt": "x" * size})
        assert error_of(client.post("/v1/completions", content=content), 413)["code"] == (
            "body_too_large"
        )
    head = (
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer sk-one\r\n"
        b"content-length: 99999999\r\nexpect: 100-continue\r\n\r\n"
    )
    assert raw(gateway, head).startswith(b"HTTP/1.1 413")


def test_slow_requests_are_cut(gateway: RunningGateway):
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer sk-one\r\n"
    began = time.perf_counter()
    for pieces, code in (
        ([head], b"head_timeout"),
        ([b""], b"head_timeout"),
        ([head[:9], head[9:20], head[20:40]], b"head_timeout"),
        ([head, b"content-length: 20\r\n\r\n", b'{"model"'], b"body_timeout"),
    ):
        received = raw(gateway, *pieces, pause=0.05)
        assert received.startswith(b"HTTP/1.1 408") and code in received, received
        assert b'"error"' in received and b"retry-after: 1" in received
    assert time.perf_counter() - began < 5
    with gateway.client() as client:
        told = client.get("/health").json()["turned_away"]
    assert told["slow_head"] >= 3 and told["slow_body"] >= 1


def test_what_is_not_http_gets_the_same_shape(gateway: RunningGateway):
    received = raw(gateway, b"\x16\x03\x01 hello\r\n\r\n")
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400") and json.loads(body)["error"]["message"]


def test_figures_tell_what_happened(client: httpx2.Client):
    before = client.get("/metrics").text
    assert client.post("/v1/completions", json=ASKED).status_code == 200
    after = client.get("/metrics").text

    def value(text: str, name: str) -> float:
        lines = [line for line in text.splitlines() if line.startswith(name)]
        return float(lines[0].rpartition(" ")[2]) if lines else 0.0

    for name, more in (
        ('gmpo_gateway_responses_total{route="/v1/completions",status="200"}', 1),
        ('gmpo_gateway_tokens_total{kind="prompt"}', 5),
        ('gmpo_gateway_tokens_total{kind="completion"}', 4),
    ):
        assert value(after, name) - value(before, name) == more
    assert value(after, "gmpo_gateway_running_completions") == 0


class Slow:
    """A backend whose answers take as long as they are told to."""

    name = "tiny"
    model_version = "v"

    def __init__(self) -> None:
        self.num_running = self.num_ended = 0
        self.go_on = threading.Event()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        self.num_running += 1
        try:
            yield Chunk(text="a", model_version="v")
            while not self.go_on.is_set():
                await asyncio.sleep(0.01)
            if request.prompt == "broken":
                raise BackendError("the stream was cut", fault="broken")
            usage = Usage(prompt_tokens=1, completion_tokens=1)
            for index in range(request.n):
                last = usage if index == request.n - 1 else None
                yield Chunk(index=index, text="b", finish_reason="stop", usage=last)
        finally:
            self.num_running -= 1
            self.num_ended += 1

    async def ready(self) -> bool:
        return True

    async def close(self) -> None:
        pass


def wait_for(condition: Any, seconds: float = 5.0) -> None:
    deadline = time.perf_counter() + seconds
    while not condition():
        assert time.perf_counter() < deadline, "it did not happen"
        time.sleep(0.01)


def test_too_many_at_once_wait_in_order_or_are_turned_away():
    backend, records = Slow(), list[AnswerRecord]()
    admission = AdmissionLimits(max_running=2, max_queued=1, queue_seconds=0.6)
    limits = GatewayLimits(admission=admission)
    with (
        running_gateway(lambda: backend, limits=limits, observers=[records.append]) as gateway,
        ThreadPoolExecutor(4) as pool,
        gateway.client() as client,
    ):

        def ask(**more: Any) -> httpx2.Response:
            with gateway.client() as own:
                return own.post("/v1/completions", json={**ASKED, **more})

        running = [pool.submit(ask), pool.submit(ask)]
        wait_for(lambda: backend.num_running == 2)
        waiting = pool.submit(ask)
        wait_for(lambda: client.get("/health").json()["queued_requests"] == 1)
        assert error_of(ask(), 429)["code"] == "queue_full"
        assert error_of(waiting.result(), 429)["code"] == "queue_timeout"
        later = pool.submit(ask, n=50)
        wait_for(lambda: client.get("/health").json()["queued_requests"] == 1)
        backend.go_on.set()
        assert [one.result().status_code for one in (*running, later)] == [200] * 3
        assert client.get("/health").json()["running_completions"] == 0
    assert sorted(record.status for record in records) == [200, 200, 200, 429, 429]
    refused = next(record for record in records if record.status == 429)
    assert not refused.report.backend and "too many requests" in (refused.error or "")


def test_a_client_that_leaves_ends_the_work_and_frees_its_turn():
    backend, records = Slow(), list[AnswerRecord]()
    limits = GatewayLimits(admission=AdmissionLimits(max_running=1))
    with running_gateway(lambda: backend, limits=limits, observers=[records.append]) as gateway:
        for stream in (False, True):
            ended = backend.num_ended
            with gateway.client(timeout=0.3) as client, pytest.raises(httpx2.ReadTimeout):
                asked = {**ASKED, "stream": stream}
                with client.stream("POST", "/v1/completions", json=asked) as response:
                    for _ in response.iter_lines():
                        pass
            wait_for(lambda ended=ended: backend.num_ended == ended + 1)
        wait_for(lambda: len(records) == 2)
        assert [record.status for record in records] == [499, 499]
        # One that waits for its turn leaves the queue.
        backend.go_on.set()
        with gateway.client() as client:
            assert client.post("/v1/completions", json=ASKED).status_code == 200


class Flood(Slow):
    """A backend that says more than any buffer on the way holds."""

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        try:
            for _ in range(100):
                yield Chunk(text="a" * 1_000_000, model_version="v")
        finally:
            self.num_ended += 1


def test_a_client_that_does_not_read_its_stream_loses_it():
    backend, records = Flood(), list[AnswerRecord]()
    limits = GatewayLimits(send_seconds=0.3, admission=AdmissionLimits(max_running=1))
    with running_gateway(lambda: backend, limits=limits, observers=[records.append]) as gateway:
        body = json.dumps({**ASKED, "stream": True}).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", gateway.port)) as connection:
            connection.sendall(head.encode() + body)
            wait_for(lambda: records)
        assert backend.num_ended == 1 and records[0].status == 499
        with gateway.client() as client:
            assert client.get("/health").json()["running_completions"] == 0


def test_an_answer_that_takes_too_long_is_ended():
    backend = Slow()
    limits = GatewayLimits(request_seconds=0.3)
    with running_gateway(lambda: backend, limits=limits) as gateway, gateway.client() as client:
        error_of(client.post("/v1/completions", json=ASKED), 504)
        streamed = client.post("/v1/completions", json={**ASKED, "stream": True})
        assert streamed.status_code == 200 and '"timeout_error"' in streamed.text
        assert "[DONE]" not in streamed.text
        assert backend.num_running == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_backend_that_lets_the_time_run_out_has_failed(stream: bool):
    slow, other = Slow(), BreakingBackend()
    other.name, other.model_version = "other", "w"
    backends: dict[str, Backend] = {"tiny": slow, "other": other}
    rules = BreakerRules(failures=2, open_seconds=60)
    judge = AnswerJudge(QualityRules())
    router = VariantRouter("tiny", backends, order=list(backends), judge=judge, rules=rules)
    limits = GatewayLimits(request_seconds=0.2)
    asked = {**ASKED, "prompt": ["1", "2"], "stream": stream}
    with running_gateway(router=router, limits=limits) as gateway, gateway.client() as client:
        # Who leaves says nothing about it.
        for _ in range(3):
            with pytest.raises(httpx2.ReadTimeout):
                client.post("/v1/completions", json=asked, timeout=0.1)
        wait_for(lambda: slow.num_running == 0)
        assert router.phases == {"tiny": "closed", "other": "closed"}
        assert "took longer" in client.post("/v1/completions", json=asked).text or not stream
        assert router.phases["tiny"] == "open"
        answer = client.post("/v1/completions", json={**asked, "stream": False}).json()
        assert answer["choices"][0]["text"] == "five"


def test_a_cut_stream_is_never_passed_off_as_a_finished_answer():
    backend, records = Slow(), list[AnswerRecord]()
    backend.go_on.set()
    with (
        running_gateway(lambda: backend, observers=[records.append]) as gateway,
        gateway.client() as client,
    ):
        asked = {**ASKED, "prompt": "broken"}
        assert error_of(client.post("/v1/completions", json=asked), 502)["type"] == (
            "upstream_disconnect"
        )
        text = client.post("/v1/completions", json={**asked, "stream": True}).text
        events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        assert json.loads(events[-1])["error"]["type"] == "upstream_disconnect"
        assert "[DONE]" not in text and '"finish_reason":"' not in text
        # Of several prompts one that breaks off breaks the answer.
        several = client.post("/v1/completions", json={**ASKED, "prompt": ["a", "broken", "b"]})
        assert error_of(several, 502)["type"] == "upstream_disconnect"
        assert client.post("/v1/completions", json={**ASKED, "prompt": ["a", "b"]}).is_success
    assert [record.status for record in records] == [502] * 5 + [200] * 2
    assert backend.num_running == 0 and backend.num_ended == 7


def test_drain_lets_running_requests_end_and_turns_new_ones_away():
    backend = Slow()
    with running_gateway(lambda: backend) as gateway, ThreadPoolExecutor(1) as pool:

        def ask() -> str:
            with gateway.client() as client:
                return client.post("/v1/completions", json={**ASKED, "stream": True}).text

        running = pool.submit(ask)
        wait_for(lambda: backend.num_running == 1)
        with gateway.client() as client:
            gateway.drain()
            wait_for(lambda: client.get("/health").json()["status"] == "draining")
            refused = client.post("/v1/completions", json=ASKED)
            assert error_of(refused, 503)["code"] == "draining"
            error_of(client.get("/ready"), 503)
        backend.go_on.set()
        assert running.result().rstrip().endswith("[DONE]")
    assert gateway.server.num_cut == 0


def test_a_change_of_weights_under_load_answers_everybody(
    folder: str, tmp_path: Any, gateway: RunningGateway
):
    other = save_tiny(tmp_path / "other", seed=1)
    backend = gateway.backend
    assert isinstance(backend, EmbeddedBackend)
    versions = [backend.model_version, served(other).version]

    def ask(number: int) -> tuple[str, str]:
        with gateway.client(headers={"authorization": "Bearer sk-one"}) as client:
            answer = client.post(
                "/v1/completions", json={**ASKED, "prompt": f"{number}+1=", "max_tokens": 20}
            )
            assert answer.status_code == 200
            return answer.json()["system_fingerprint"], answer.json()["choices"][0]["text"]

    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(ask, number) for number in range(12)]
        swap = asyncio.run_coroutine_threadsafe(backend.swap(lambda: served(other)), gateway.loop)
        assert swap.result(30).version == versions[1]
        answers += [pool.submit(ask, number) for number in range(12)]
        told = [one.result() for one in answers]
    assert {version for version, _ in told[12:]} == {versions[1]}
    by_version = {(version, number % 12): text for number, (version, text) in enumerate(told)}
    again = [ask(number) for number in range(12)]
    assert all(by_version[version, n] == text for n, (version, text) in enumerate(again))
    asyncio.run_coroutine_threadsafe(backend.swap(lambda: served(folder)), gateway.loop).result(30)


def open_connection(gateway: RunningGateway) -> socket.socket:
    return socket.create_connection(("127.0.0.1", gateway.port), timeout=10)


def test_connections_beyond_the_limit_are_refused_and_then_dropped(folder: str):
    settings = ServerSettings(max_connections=3, head_seconds=30, drain_seconds=1)
    ask = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
    with running_gateway(lambda: tiny_backend(folder), settings=settings) as gateway:
        wait_for(lambda: not gateway.server.server_state.connections)
        idle = [open_connection(gateway) for _ in range(3)]
        wait_for(lambda: len(gateway.server.server_state.connections) == 3)
        refused = raw(gateway, ask)
        assert refused.startswith(b"HTTP/1.1 503 Service Unavailable\r\n"), refused
        assert b"retry-after: 1\r\n" in refused and b"too_many_connections" in refused
        assert json.loads(refused.partition(b"\r\n\r\n")[2])["error"]["type"] == "overloaded_error"
        more = [open_connection(gateway) for _ in range(64)]
        wait_for(lambda: len(gateway.server.server_state.connections) == 3 + 64)
        with open_connection(gateway) as dropped, pytest.raises(ConnectionResetError):
            # The reset may come while this is sent, or instead of an answer.
            dropped.sendall(ask)
            if not dropped.recv(1):
                raise ConnectionResetError
        assert gateway.entrance.turned_away["connections"] == 2
        # Those who have a place keep it, and places that are left are given again.
        idle[0].sendall(ask)
        assert idle[0].recv(65536).startswith(b"HTTP/1.1 200")
        for one in (*idle, *more):
            one.close()
        wait_for(lambda: not gateway.server.server_state.connections)
        with gateway.client() as client:
            assert client.get("/health").json()["turned_away"]["connections"] == 2


def test_an_address_that_guesses_keys_has_to_wait(folder: str):
    limits = GatewayLimits(entrance=EntranceLimits(wrong_keys=3, wrong_key_seconds=1.0))
    right = {"authorization": f"Bearer {KEYS[0]}"}
    wrong = {"authorization": "Bearer sk-guess"}
    with (
        running_gateway(lambda: tiny_backend(folder), limits=limits, keys=KEYS) as gateway,
        gateway.client() as client,
    ):
        for _ in range(5):
            error_of(client.get("/v1/models"), 401)  # no key is no guess
        for _ in range(3):
            assert client.get("/v1/models", headers=right).status_code == 200
            error_of(client.get("/v1/models", headers=wrong), 401)
        for headers in (wrong, right):
            error = error_of(client.get("/v1/models", headers=headers), 429)
            assert error["code"] == "too_many_wrong_keys" and "127.0.0.1" in error["message"]
        # A proxy on this machine is believed: another client's guesses are not this one's.
        forwarded = {**right, "x-forwarded-for": "192.0.2.7"}
        assert client.get("/v1/models", headers=forwarded).status_code == 200
        assert client.get("/health").json()["turned_away"] == {"api_key": 8, "wrong_keys": 2}
        wait_for(lambda: client.get("/v1/models", headers=right).status_code == 200)
