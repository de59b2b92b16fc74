"""HTTP of the gateway: uvicorn's, with a limit on how slowly a request may begin."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from gmpo.serving.faults import ApiError, error_body

__all__ = ["GatewayProtocol", "protocol_with"]

_PHRASES = {400: "Bad Request", 408: "Request Timeout"}


class GatewayProtocol(H11Protocol):
    """uvicorn's own, which would wait for the end of a request's head for ever."""

    head_seconds = 10.0
    """Longest time from a connection's or a head's first byte to the head's last."""
    turned_away: ClassVar[Counter[str]] = Counter()
    """Connections ended here, by reason."""

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Take in a piece of a request."""
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
            + ("retry-after: 1\r\n" if error.status == 408 else "")
            + "connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


def protocol_with(*, head_seconds: float, turned_away: Counter[str]) -> type[GatewayProtocol]:
    """A protocol with this limit, which counts there: uvicorn takes a class."""
    members: dict[str, Any] = {"head_seconds": head_seconds, "turned_away": turned_away}
    return type("GatewayProtocol", (GatewayProtocol,), members)
