"""What every request passes before it is looked at: drain, key, size and speed of its body."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gmpo.serving.access import ApiKeys, WrongKeys
from gmpo.serving.faults import ApiError, error_body, error_response

__all__ = ["Entrance", "EntranceLimits"]

_PROTECTED = "/v1/"
_BREAK_OFF_SECONDS = 0.5
_ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/feedback")


@dataclass(frozen=True, kw_only=True)
class EntranceLimits:
    """Attributes:
    max_body_bytes: longest body.
    body_seconds: longest time that a body may take to arrive.
    wrong_keys: that an address may send within `wrong_key_seconds`; beyond them it is not listened
        to until they are over.
    wrong_key_seconds: from the first of them.
    """

    max_body_bytes: int = 1 << 20
    body_seconds: float = 20.0
    wrong_keys: int = 20
    wrong_key_seconds: float = 60.0


class Entrance:
    """Middleware that turns requests away, or hands them on with their whole body.

    Args:
        app: what comes behind.
        keys: who may ask; without any, everybody.
        limits: of bodies and wrong keys.
    """

    def __init__(self, app: ASGIApp, *, keys: ApiKeys, limits: EntranceLimits) -> None:
        self._app = app
        self._keys = keys
        self._limits = limits
        self.wrong_keys = WrongKeys(most=limits.wrong_keys, seconds=limits.wrong_key_seconds)
        """Of each address."""
        self.is_draining = False
        """Whether new requests are turned away because the server is about to end."""
        self.num_active = 0
        """Requests being answered, the last byte of their responses included."""
        self.turned_away: Counter[str] = Counter()
        """Requests turned away here, by reason."""
        self.statuses: Counter[tuple[str, int]] = Counter()
        """Responses begun, by route and status; paths that are no routes count as "other"."""
        self._running: set[asyncio.Timeout] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or have it answered."""
        if scope["type"] != "http" or not scope["path"].startswith(_PROTECTED):
            await self._app(scope, receive, send)
            return
        self.num_active += 1
        begun: list[Headers] = []

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                begun.append(Headers(raw=message["headers"]))
                path = scope["path"]
                route = path if path in _ROUTES else "other"
                self.statuses[route, message["status"]] += 1
            await send(message)

        try:
            await self._answer(scope, receive, counted)
        except ApiError as error:
            if begun:
                await _break_off(error, begun[0], send)
                return
            headers = {"connection": "close"} if error.status in (408, 413, 503) else {}
            if error.status == 401:
                headers["www-authenticate"] = "Bearer"
            await error_response(error, headers)(scope, receive, counted)
        except _ClientGone:
            self.turned_away["client_gone"] += 1
        finally:
            self.num_active -= 1

    def cut(self) -> int:
        """End all requests with an error; how many there were."""
        now = asyncio.get_running_loop().time()
        for one in self._running:
            one.reschedule(now)
        return len(self._running)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Have it answered, unless `cut` comes first."""
        until_cut = asyncio.timeout(None)
        try:
            async with until_cut:
                self._running.add(until_cut)
                body = await self._admit(scope, receive)
                await self._app(scope, _replayed(body, receive), send)
        except TimeoutError:
            if not until_cut.expired():
                raise
            self.turned_away["cut"] += 1
            raise ApiError(
                503,
                "the server is ending and waits for this answer no longer; ask another server",
                code="draining",
                retry_after_seconds=5.0,
            ) from None
        finally:
            self._running.discard(until_cut)

    async def _admit(self, scope: Scope, receive: Receive) -> bytes:
        headers = Headers(scope=scope)
        if self.is_draining:
            self.turned_away["draining"] += 1
            raise ApiError(
                503,
                "the server is ending and takes no new requests; ask again, or another server",
                code="draining",
                retry_after_seconds=5.0,
            )
        if self._keys:
            self._check_key(_key(headers), scope["client"])
        return await self._body(headers, receive)

    def _check_key(self, key: bytes, client: tuple[str, int] | None) -> None:
        address, now = "" if client is None else client[0], time.monotonic()
        left = self.wrong_keys.seconds_left(address, now=now)
        if left:
            self.turned_away["wrong_keys"] += 1
            raise ApiError(
                429,
                f"{self._limits.wrong_keys} wrong API keys came from {address}, which is not "
                f"listened to for {left:.0f} seconds; then send a right one",
                code="too_many_wrong_keys",
                retry_after_seconds=left,
            )
        if self._keys.accept(key):
            return
        self.turned_away["api_key"] += 1
        if key:  # without one nobody guesses
            self.wrong_keys.note(address, now=now)
        raise ApiError(
            401,
            "the API key is missing or wrong; send Authorization: Bearer KEY",
            code="invalid_api_key",
        )

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        limit = self._limits.max_body_bytes
        announced = headers.get("content-length", "0")
        waits_for_leave = headers.get("expect", "").lower() == "100-continue"
        if waits_for_leave and announced.isdigit() and int(announced) > limit:
            raise self._too_large(announced)
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                return await self._read(receive)
        except TimeoutError:
            self.turned_away["slow_body"] += 1
            raise ApiError(
                408,
                f"the body did not arrive within {self._limits.body_seconds:g} seconds; send it "
                "faster",
                code="body_timeout",
                retry_after_seconds=1.0,
            ) from None

    async def _read(self, receive: Receive) -> bytes:
        """The body; one that is too large is read a little further before it is refused.

        A client that is still sending would lose the refusal with its connection.
        """
        limit, parts, size = self._limits.max_body_bytes, list[bytes](), 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _ClientGone
            size += len(message.get("body", b""))
            if size <= limit:
                parts.append(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if size > limit and (is_whole or size > 16 * limit):
                raise self._too_large(f"{size} or more")
            if is_whole:
                return b"".join(parts)

    def _too_large(self, size: str) -> ApiError:
        self.turned_away["body_too_large"] += 1
        return ApiError(
            413,
            f"the body has {size} bytes, and at most {self._limits.max_body_bytes} are taken; "
            "send less",
            code="body_too_large",
            retry_after_seconds=1.0,
        )


async def _break_off(error: ApiError, begun: Headers, send: Send) -> None:
    """End a response that has begun; a stream ends with the error and without [DONE]."""
    if not begun.get("content-type", "").startswith("text/event-stream"):
        return
    event = f"data: {json.dumps(error_body(error))}\n\n"
    # A client that does not read keeps nobody who is about to end.
    with suppress(TimeoutError):
        async with asyncio.timeout(_BREAK_OFF_SECONDS):
            await send({"type": "http.response.body", "body": event.encode()})


class _ClientGone(Exception):
    """Nobody is left to answer."""


def _key(headers: Headers) -> bytes:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip().encode("latin-1") if scheme.lower() == "bearer" else b""


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body in one message; after it whatever the server says, as that the client left."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
