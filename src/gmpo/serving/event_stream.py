"""Responses that end when their client does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import Request, Response
from starlette.types import Message, Receive, Scope, Send

from gmpo.serving.answering import RunningAnswer

__all__ = ["EventStream", "unless_client_leaves"]

_Result = TypeVar("_Result")


async def unless_client_leaves(
    request: Request, work: Coroutine[Any, Any, _Result]
) -> _Result | None:
    """What the work gives, or None if the client left first, which cancels it."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_left(request.receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)


class EventStream(Response):
    """Server-sent events; a client that leaves ends what they are made of.

    Args:
        events: text of one or more, and whether they are the last.
        answer: what they are made of.
        headers: sent besides.
        send_seconds: how long the client may leave a piece unread before it counts as gone.
    """

    def __init__(
        self,
        events: AsyncGenerator[tuple[str, bool], None],
        answer: RunningAnswer,
        headers: Mapping[str, str],
        *,
        send_seconds: float,
    ) -> None:
        self.status_code = 200
        self.background = None
        self._events = events
        self._answer = answer
        self._send_seconds = send_seconds
        self.body = b""
        self.init_headers({**headers, "cache-control": "no-store"})
        del self.headers["content-length"]
        self.headers["content-type"] = "text/event-stream; charset=utf-8"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events as they come."""
        sending = asyncio.create_task(self._send(send))
        leaving = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                with suppress(TimeoutError):
                    sending.result()
        finally:
            sending.cancel()
            leaving.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
            await self._events.aclose()
            await self._answer.close()

    async def _send(self, send: Send) -> None:
        start = {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }
        await self._send_in_time(send, start)
        async for text, is_last in self._events:
            body = {"type": "http.response.body", "body": text.encode(), "more_body": not is_last}
            await self._send_in_time(send, body)

    async def _send_in_time(self, send: Send, message: Message) -> None:
        # Without a limit a client that stops reading would keep its turn for ever.
        async with asyncio.timeout(self._send_seconds):
            await send(message)


async def _left(receive: Receive) -> None:
    """Return when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
