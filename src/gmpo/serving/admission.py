"""How much is asked of the backends at once: the rest waits in order, or is turned away."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

from gmpo.serving.faults import ApiError

__all__ = ["Admission", "AdmissionLimits"]


@dataclass(frozen=True, kw_only=True)
class AdmissionLimits:
    """Attributes:
    max_running: completions asked of the backends at once.
    max_queued: requests that wait for their turn.
    queue_seconds: longest wait.
    """

    max_running: int = 64
    max_queued: int = 256
    queue_seconds: float = 30.0


@dataclass(eq=False)
class _Waiter:
    cost: int
    turn: asyncio.Future[None]


class Admission:
    """Turns are given in the order in which they were asked for."""

    def __init__(self, limits: AdmissionLimits) -> None:
        self._limits = limits
        self._waiters: deque[_Waiter] = deque()
        self.num_running = 0
        """Completions being made."""

    @property
    def num_queued(self) -> int:
        """Requests waiting."""
        return len(self._waiters)

    async def enter(self, num_completions: int) -> int:
        """Wait for so many completions' turn; what is to be given back at its end.

        A request for more than may run at once runs alone.

        Raises:
            ApiError: 429, the queue is full, or the turn did not come in time.
        """
        cost = min(num_completions, self._limits.max_running)
        await self._wait(cost)
        return cost

    def leave(self, cost: int) -> None:
        """Give a turn back."""
        self.num_running -= cost
        self._wake()

    async def _wait(self, cost: int) -> None:
        if not self._waiters and self.num_running + cost <= self._limits.max_running:
            self.num_running += cost
            return
        limits = self._limits
        if len(self._waiters) >= limits.max_queued:
            raise _overloaded(
                f"{limits.max_queued} requests are waiting already", code="queue_full"
            )
        waiter = _Waiter(cost, asyncio.get_running_loop().create_future())
        self._waiters.append(waiter)
        try:
            await asyncio.wait_for(asyncio.shield(waiter.turn), limits.queue_seconds)
        except TimeoutError:
            self._give_up(waiter)
            raise _overloaded(
                f"this request has waited for {limits.queue_seconds:g} seconds",
                code="queue_timeout",
            ) from None
        except asyncio.CancelledError:
            self._give_up(waiter)
            raise

    def _give_up(self, waiter: _Waiter) -> None:
        """Give up a place in the queue, or a turn that came at the same moment."""
        if waiter.turn.done():
            self.num_running -= waiter.cost
        else:
            self._waiters.remove(waiter)
        self._wake()

    def _wake(self) -> None:
        limit = self._limits.max_running
        while self._waiters and self.num_running + self._waiters[0].cost <= limit:
            waiter = self._waiters.popleft()
            self.num_running += waiter.cost
            waiter.turn.set_result(None)


def _overloaded(what: str, *, code: str) -> ApiError:
    return ApiError(
        429, f"too many requests: {what}; ask again later", code=code, retry_after_seconds=1.0
    )
