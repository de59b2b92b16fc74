"""The gateway on a port: signals, drain, end."""

from __future__ import annotations

import asyncio
import math
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn

from gmpo.errors import ConfigError
from gmpo.serving.entrance import Entrance
from gmpo.serving.protocol import protocol_with

__all__ = ["GatewayServer", "ServerSettings", "bound_socket"]

_TICK_SECONDS = 0.02
_CUT_SECONDS = 1
_ENDING = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Attributes:
    max_connections: open connections; 503 beyond them.
    head_seconds: longest time for the head of a request.
    keep_alive_seconds: how long a connection may be idle between requests.
    drain_seconds: how long running requests may go on after SIGTERM.
    """

    max_connections: int = 512
    head_seconds: float = 10.0
    keep_alive_seconds: int = 15
    drain_seconds: float = 30.0


def bound_socket(host: str, port: int) -> socket.socket:
    """A listening place; port 0 takes a free one.

    Raises:
        ConfigError: the address is not ours, or the port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"--host {host} cannot be used: {error.strerror}") from None
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise ConfigError(
            f"cannot listen at {host}:{port}: {error.strerror}; choose another --port, or 0 for a "
            "free one"
        ) from None
    return bound


class GatewayServer(uvicorn.Server):
    """uvicorn's server, which on SIGTERM or SIGINT first lets running requests end.

    Meanwhile new ones get 503. What runs when the time for that is over, or when a second signal
    comes, is cut: its client is told so. Beyond the second, signals have their default effect,
    which is to kill the process, whatever it still waits for.

    Args:
        entrance: the application.
        settings: time limits.
        reload: called on SIGHUP.
        started: called once it listens.
        beside: work that runs while it serves, and is cancelled when it ends.
    """

    def __init__(
        self,
        entrance: Entrance,
        *,
        settings: ServerSettings,
        reload: Callable[[], Awaitable[None]] | None = None,
        started: Callable[[], None] = lambda: None,
        beside: Sequence[Callable[[], Awaitable[None]]] = (),
    ) -> None:
        super().__init__(
            uvicorn.Config(
                entrance,
                http=protocol_with(
                    head_seconds=settings.head_seconds,
                    max_connections=settings.max_connections,
                    turned_away=entrance.turned_away,
                ),
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=settings.keep_alive_seconds,
                timeout_graceful_shutdown=_CUT_SECONDS,
            )
        )
        self._entrance = entrance
        self._settings = settings
        self._reload = reload
        self._started = started
        self._beside = beside
        self._tasks: set[asyncio.Task[None]] = set()
        self._deadline = math.inf
        self.ended_by: int | None = None
        """Signal that ended it."""
        self.hurried_by: int | None = None
        """Second signal, if one came, after which nothing was waited for."""
        self.num_cut = 0
        """Requests that had not ended by the end of the drain, or by a second signal."""

    def new_loop(self) -> asyncio.AbstractEventLoop:
        """A loop to serve on: uvloop's where that is installed, or asyncio's own."""
        return (self.config.get_loop_factory() or asyncio.new_event_loop)()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        for work in self._beside:
            self._soon(work())
        self._started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End what runs beside, then serve no more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Take signals on the event loop, in place of uvicorn, which would raise them again.

        After the loop a second signal is still only noted, so that what was recorded is written.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in _ENDING:
            loop.add_signal_handler(number, self.drain, number)
        if self._reload is not None:
            loop.add_signal_handler(signal.SIGHUP, self._reload_soon)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                loop.remove_signal_handler(number)
            if self.hurried_by is None:
                for number in _ENDING:
                    signal.signal(number, lambda number, _frame: self._hurry(number))

    def drain(self, number: int | None = None) -> None:
        """Take no new requests, let running ones end, then end; without them if asked twice."""
        if self._entrance.is_draining:
            self._hurry(number)
            return
        self.ended_by = number
        self._entrance.is_draining = True
        self._deadline = asyncio.get_running_loop().time() + self._settings.drain_seconds
        self._soon(self._end_when_idle())

    def _hurry(self, number: int | None) -> None:
        self._deadline = -math.inf
        if number is not None:
            self.hurried_by = number
            for one in _ENDING:
                signal.signal(one, signal.SIG_DFL)

    async def _end_when_idle(self) -> None:
        loop = asyncio.get_running_loop()
        while self._entrance.num_active and loop.time() < self._deadline:
            await asyncio.sleep(_TICK_SECONDS)
        self.num_cut = self._entrance.cut()
        cut_until = loop.time() + _CUT_SECONDS
        while self._entrance.num_active and loop.time() < cut_until:
            await asyncio.sleep(_TICK_SECONDS)
        self.should_exit = True

    def _reload_soon(self) -> None:
        if self._reload is not None:
            self._soon(self._reload())

    def _soon(self, work: Awaitable[None]) -> None:
        async def done() -> None:
            await work

        task = asyncio.get_running_loop().create_task(done())
        # The loop alone would let go of a task that nobody holds.
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
