"""HTTP of the gateway: uvicorn's, with limits on connections and how slowly a request begins."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from gmpo.serving.faults import ApiError, error_body

__all__ = ["GatewayProtocol", "protocol_with"]

_PHRASES = {400: "Bad Request", 408: "Request Timeout", 503: "Service Unavailable"}
_ROOM_TO_REFUSE = 64
"""Connections beyond the limit that are told so; those beyond these are dropped without a word."""


class GatewayProtocol(H11Protocol):
    """uvicorn's own, which would wait for the end of a request's head for ever.

    Its limit on connections answers in plain text, and only those that send a request.
    """

    head_seconds = 10.0
    """Longest time from a connection's or a head's first byte to the head's last."""
    max_connections = 512
    """Open connections, idle ones included."""
    turned_away: ClassVar[Counter[str]] = Counter()
    """Connections ended here, by reason."""

    _head_timer: asyncio.TimerHandle | None = None
    _is_beyond = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request, unless there are too many who do."""
        super().connection_made(transport)
        beyond = len(self.connections) - self.max_connections
        self._is_beyond = beyond > 0
        if beyond > _ROOM_TO_REFUSE:
            self.turned_away["connections"] += 1
            transport.abort()
            return
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Take in a piece of a request."""
        if self._is_beyond:
            # Only now: a refusal sent before the request was read would be lost with it.
            self._turn_away()
            return
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._head_timer is None:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_waiting()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP, in the one shape of errors."""
        self.turned_away["not_http"] += 1
        self._refuse(ApiError(400, f"{msg} Send HTTP/1.1."))

    def _turn_away(self) -> None:
        self._stop_waiting()
        self.turned_away["connections"] += 1
        self._refuse(
            ApiError(
                503,
                f"{self.max_connections} connections are open, and more are not taken; close some, "
                "or ask again later",
                code="too_many_connections",
            )
        )

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self.head_seconds, self._head_is_late)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.transport.is_closing() or self.conn.their_state is not h11.IDLE:
            return
        self.turned_away["slow_head"] += 1
        self._refuse(
            ApiError(
                408,
                f"no request came within {self.head_seconds:g} seconds; send it faster",
                code="head_timeout",
            )
        )

    def _refuse(self, error: ApiError) -> None:
        # Written past h11, which after a fault on either side takes no more events.
        body = json.dumps(error_body(error)).encode()
        head = (
            f"HTTP/1.1 {error.status} {_PHRASES[error.status]}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
            + ("retry-after: 1\r\n" if error.status in (408, 503) else "")
            + "connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


def protocol_with(
    *, head_seconds: float, max_connections: int, turned_away: Counter[str]
) -> type[GatewayProtocol]:
    """A protocol with these limits, which counts there: uvicorn takes a class."""
    members: dict[str, Any] = {
        "head_seconds": head_seconds,
        "max_connections": max_connections,
        "turned_away": turned_away,
    }
    return type("GatewayProtocol", (GatewayProtocol,), members)
