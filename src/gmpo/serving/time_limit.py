"""A limit on waits that come as often as tokens, at the cost of one timer rather than one each."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

__all__ = ["TimeLimit"]

_Result = TypeVar("_Result")


class TimeLimit:
    """Ends what is waited for too long, as `asyncio.timeout_at` does; one wait at a time.

    Nearly every token comes long before its limit, and a timer set and taken back for each costs
    several times what is left of the wait. This one's timer stays, and looks when it is due whether
    the wait of that moment is too long. Waits may be of different tasks. `end` takes it back.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[object] | None = None
        self._until = 0.0
        self._has_expired = False

    async def wait(self, awaited: Awaitable[_Result], *, until: float) -> _Result:
        """What is waited for.

        Args:
            awaited: ended, where it takes too long, by a cancellation.
            until: by when, in the event loop's time.

        Raises:
            TimeoutError: it took too long.
        """
        task = asyncio.current_task()
        assert task is not None
        self._task, self._until = task, until
        num_cancelled = task.cancelling()
        if self._timer is None or self._timer.when() > until:
            self._set()
        try:
            return await awaited
        except asyncio.CancelledError:
            # Whoever else has cancelled the task meanwhile is told so, as by asyncio.timeout.
            if self._has_expired and task.cancelling() - 1 <= num_cancelled:
                raise TimeoutError from None
            raise
        finally:
            self._task = None
            if self._has_expired:
                self._has_expired = False
                task.uncancel()

    def end(self) -> None:
        """Take the timer back."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set(self) -> None:
        self.end()
        self._timer = self._loop.call_at(self._until, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._task is None:
            return
        if self._loop.time() < self._until:
            self._set()
            return
        self._has_expired = True
        self._task.cancel()
