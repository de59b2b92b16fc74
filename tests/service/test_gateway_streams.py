"""In how many pieces a stream is sent: each costs a server and its reader as much as a token."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from starlette.types import Message
from tests.gateways import router_of

from gmpo.serving.access import ApiKeys
from gmpo.serving.app import GatewayLimits, build_gateway
from gmpo.serving.backend import BackendError, Chunk, GenerationRequest, Usage

USAGE = Usage(prompt_tokens=3, completion_tokens=2)
WHOLE = (Chunk(text="4"), Chunk(text="2", finish_reason="stop", usage=USAGE))


class Says:
    """A backend that gives these chunks, and then breaks off if they are no whole answer."""

    name = "bot"
    model_version = "v1"

    def __init__(self, *chunks: Chunk) -> None:
        self._chunks = chunks

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        for chunk in self._chunks:
            await asyncio.sleep(0)
            yield chunk
        if self._chunks[-1].finish_reason is None:
            raise BackendError("its stream was cut; ask again", fault="broken")

    async def ready(self) -> bool:
        return True

    async def close(self) -> None:
        pass


def pieces_of(backend: Says, **more: Any) -> list[Message]:
    """The pieces of the body of a streamed answer, as they are handed to the server."""
    gateway = build_gateway(router_of(backend), limits=GatewayLimits(), keys=ApiKeys(()))
    body = json.dumps({"model": "bot", "prompt": "6 * 7 =", "stream": True, **more}).encode()
    sent: list[Message] = []

    async def run() -> None:
        requests = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if requests:
                return requests.pop()
            return await asyncio.Future()  # the client stays

        async def send(message: Message) -> None:
            sent.append(message)

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
        await gateway({**scope, "query_string": b"", "client": ("127.0.0.1", 1)}, receive, send)

    asyncio.run(run())
    return [message for message in sent if message["type"] == "http.response.body"]


def events_of(piece: Message) -> list[str]:
    return piece["body"].decode().removesuffix("\n\n").split("\n\n")


@pytest.mark.parametrize("usage", [False, True])
def test_all_that_follows_the_last_token_goes_with_it(usage: bool):
    first, last = pieces_of(Says(*WHOLE), stream_options={"include_usage": usage})
    (event,) = events_of(first)
    assert json.loads(event.removeprefix("data: "))["choices"][0]["text"] == "4"
    assert first["more_body"] and not last["more_body"]
    told = [event.removeprefix("data: ") for event in events_of(last)]
    assert told.pop() == "[DONE]"
    token, *rest = map(json.loads, told)
    assert token["choices"][0]["text"] == "2" and token["gmpo"]["model_version"] == "v1"
    assert [one["usage"]["total_tokens"] for one in rest] == [5] * usage


def test_a_stream_that_breaks_off_ends_with_the_error():
    first, last = pieces_of(Says(Chunk(text="4")))
    assert first["more_body"] and not last["more_body"]
    (event,) = events_of(last)
    assert "was cut" in json.loads(event.removeprefix("data: "))["error"]["message"]
