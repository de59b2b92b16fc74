"""A small real HTTP server that plays a model's server, well or badly, as a test tells it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Body = dict[str, Any]


class Reply:
    """One response, written piece by piece."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def start(self) -> None:
        """The head of a stream of events."""
        await self.raw(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )

    async def event(self, content: Body | str) -> None:
        text = content if isinstance(content, str) else json.dumps(content)
        await self.data(f"data: {text}\n\n".encode())

    async def data(self, data: bytes) -> None:
        await self.raw(b"%x\r\n%s\r\n" % (len(data), data))

    async def end(self) -> None:
        await self.raw(b"0\r\n\r\n")

    async def raw(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def whole(self, status: int, content: Body, **headers: str) -> None:
        data = json.dumps(content).encode()
        lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        head = [f"HTTP/1.1 {status} X", f"content-length: {len(data)}", *lines, "", ""]
        await self.raw("\r\n".join(head).encode() + data)

    def cut(self) -> None:
        """Break the connection without an end."""
        self._writer.transport.abort()

    def close(self) -> None:
        """Close the connection once what was written is sent."""
        self._writer.close()

    async def client_gone(self) -> None:
        """Wait until the other side closes the connection."""
        await self._reader.read()


Behaviour = Callable[[Reply, Body], Awaitable[None]]


@dataclass
class Upstream:
    """Where it listens and what it was asked; its behaviour can be changed meanwhile."""

    url: str
    behave: Behaviour
    bodies: list[Body] = field(default_factory=list)
    headers: list[str] = field(default_factory=list)
    gone: threading.Event = field(default_factory=threading.Event)
    """Set by a behaviour that saw its client leave."""


@contextmanager
def running_upstream(behave: Behaviour, *, port: int = 0) -> Iterator[Upstream]:
    """Serve on a thread of its own until the block ends; port 0 takes a free one."""
    loop = asyncio.new_event_loop()
    upstream = Upstream("", behave)
    tasks: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            while await _answer(upstream, reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the other side may leave at any time
        finally:
            writer.close()
            tasks.discard(task)

    server = loop.run_until_complete(asyncio.start_server(connected, "127.0.0.1", port))
    upstream.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def stop() -> None:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    try:
        yield upstream
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _answer(
    upstream: Upstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> bool:
    """Answer one request; False if none came."""
    head = await reader.read(1)
    if not head:
        return False
    head += await reader.readuntil(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    reply = Reply(reader, writer)
    if lines[0].startswith("GET"):
        await reply.whole(200, {"object": "list", "data": []})
        return True
    named = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
    body = json.loads(await reader.readexactly(int(named["content-length"])))
    upstream.bodies.append(body)
    upstream.headers.append(head.decode())
    await upstream.behave(reply, body)
    return not writer.is_closing()


def text_event(text: str, *, logprob: float | None = -0.5, finish: str | None = None) -> Body:
    logprobs = {"tokens": [text], "token_logprobs": [logprob]} if text else None
    choice = {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": finish}
    return {"object": "text_completion", "choices": [choice]}


def chat_event(text: str, *, logprob: float = -0.5, finish: str | None = None) -> Body:
    told = {"content": [{"token": text, "logprob": logprob, "top_logprobs": []}]} if text else None
    delta = {"content": text} if text else {}
    choice = {"index": 0, "delta": delta, "logprobs": told, "finish_reason": finish}
    return {"object": "chat.completion.chunk", "choices": [choice]}


def usage_event(prompt: int, completion: int) -> Body:
    usage = {"prompt_tokens": prompt, "completion_tokens": completion}
    return {"choices": [], "usage": usage}


def says(
    *words: str,
    logprob: float = -0.5,
    finish: str = "stop",
    seconds: float = 0.0,
    fingerprint: str | None = None,
) -> Behaviour:
    """A good answer of these words, on either route."""

    async def behave(reply: Reply, body: Body) -> None:
        event = chat_event if "messages" in body else text_event
        await reply.start()
        for word in words:
            await asyncio.sleep(seconds)
            told = event(word, logprob=logprob)
            await reply.event(told | ({"system_fingerprint": fingerprint} if fingerprint else {}))
        await reply.event(event("", finish=finish))
        await reply.event(usage_event(3, len(words)))
        await reply.event("[DONE]")
        await reply.end()

    return behave


def refuses(status: int, message: str = "no", **headers: str) -> Behaviour:
    async def behave(reply: Reply, body: Body) -> None:
        error = {"message": message, "type": "t", "param": "p", "code": "c"}
        await reply.whole(status, {"error": error}, **headers)

    return behave


def in_turn(*behaviours: Behaviour) -> Behaviour:
    """One behaviour a request, the last one for all that follow."""
    left = list(behaviours)

    async def behave(reply: Reply, body: Body) -> None:
        await (left.pop(0) if len(left) > 1 else left[0])(reply, body)

    return behave
