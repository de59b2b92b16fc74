"""Supervision of work beside the gateway: what fails begins anew, with a back-off."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import NoReturn

from gmpo.errors import what_was_raised

__all__ = ["Outage", "SupervisedTask"]


class SupervisedTask:
    """Work without an end, which begins anew after it failed, each time twice as long afterwards.

    Args:
        name: of the work, for what is told.
        work: ends only when it is cancelled, or by an error.
        tell: told in one sentence each time it failed.
        first_seconds: until it begins anew after its first failure, and after one that came once
            it had gone on for longer than `last_seconds`.
        last_seconds: longest time until it begins anew.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[], Awaitable[None]],
        *,
        tell: Callable[[str], None],
        first_seconds: float = 1.0,
        last_seconds: float = 60.0,
    ) -> None:
        self._name = name
        self._work = work
        self._tell = tell
        self._first_seconds = first_seconds
        self._last_seconds = last_seconds
        self.num_failures = 0
        """Times it failed and began anew."""

    async def run(self) -> NoReturn:
        """Go on until cancelled."""
        delay = self._first_seconds
        while True:
            began = time.monotonic()
            try:
                await self._work()
            except Exception as error:  # noqa: BLE001  (told and counted; nobody else would)
                if time.monotonic() - began > self._last_seconds:
                    delay = self._first_seconds
                self.num_failures += 1
                self._tell(
                    f"{self._name} failed: {what_was_raised(error)}; it begins anew in {delay:g} s"
                )
            await asyncio.sleep(delay)
            delay = min(2 * delay, self._last_seconds)


class Outage:
    """Whether something can be read; told when that changes, however often it is looked at.

    Args:
        tell: told in one sentence.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self.num_failures = 0
        """Times it could not be read."""
        self.reason: str | None = None
        """Why it cannot be read; None while it can."""

    def goes_on(self, reason: str) -> None:
        """Note that it cannot be read."""
        if self.reason is None:
            self._tell(reason)
        self.reason = reason
        self.num_failures += 1

    def is_over(self, news: str) -> None:
        """Note that it can be read, which is news only after it could not."""
        if self.reason is not None:
            self._tell(news)
        self.reason = None
