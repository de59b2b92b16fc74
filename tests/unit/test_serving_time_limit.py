"""A time limit that many waits share: what takes too long is ended, and nothing else."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Awaitable, Callable

import pytest

from gmpo.serving.time_limit import TimeLimit


async def soon(limit: TimeLimit, awaited: Awaitable[object], seconds: float) -> object:
    return await limit.wait(awaited, until=asyncio.get_running_loop().time() + seconds)


def ran(work: Callable[[TimeLimit], Awaitable[None]]) -> None:
    async def run() -> None:
        limit = TimeLimit()
        try:
            await work(limit)
        finally:
            limit.end()
        task = asyncio.current_task()
        assert task is not None and not task.cancelling(), "nobody else has cancelled it"

    asyncio.run(run())


def test_what_is_ready_is_given_and_what_takes_too_long_is_ended():
    async def work(limit: TimeLimit) -> None:
        assert await soon(limit, asyncio.sleep(0, "one"), 5) == "one"
        for _ in range(2):
            with pytest.raises(TimeoutError):
                await soon(limit, asyncio.sleep(5), 0.02)
        assert await soon(limit, asyncio.sleep(0.05, "two"), 5) == "two"

    ran(work)


def test_many_waits_may_last_longer_together_than_each_may():
    async def work(limit: TimeLimit) -> None:
        for _ in range(10):
            await soon(limit, asyncio.sleep(0.02), 0.1)
        with pytest.raises(TimeoutError):
            await soon(limit, asyncio.sleep(5), 0.1)

    ran(work)


def test_nothing_is_ended_between_two_waits():
    async def work(limit: TimeLimit) -> None:
        await soon(limit, asyncio.sleep(0), 0.02)
        await asyncio.sleep(0.1)
        with pytest.raises(TimeoutError):
            await soon(limit, asyncio.sleep(5), 0.02)

    ran(work)


def test_a_later_wait_may_have_an_earlier_end():
    async def work(limit: TimeLimit) -> None:
        await soon(limit, asyncio.sleep(0), 60)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await soon(limit, asyncio.sleep(30), 0.02)
                raise AssertionError("it was not ended")

    ran(work)


def test_waits_may_be_of_different_tasks():
    async def work(limit: TimeLimit) -> None:
        await asyncio.create_task(soon(limit, asyncio.sleep(0), 0.05))  # type: ignore[arg-type]
        with pytest.raises(TimeoutError):
            await soon(limit, asyncio.sleep(5), 0.05)

    ran(work)


def test_who_cancels_the_task_gets_a_cancellation_and_no_time_out():
    async def work(limit: TimeLimit) -> None:
        task = asyncio.ensure_future(soon(limit, asyncio.sleep(5), 5))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    ran(work)


def test_a_cancellation_beside_the_time_out_is_not_lost():
    async def work(limit: TimeLimit) -> None:
        loop = asyncio.get_running_loop()

        async def cancelled_at_once() -> None:
            task = asyncio.current_task()
            assert task is not None
            # In the same turn of the loop: whichever comes first, the other is there too.
            loop.call_at(loop.time() + 0.02, task.cancel)
            await soon(limit, _busy_until_both_are_due(), 0.02)

        task = asyncio.create_task(cancelled_at_once())
        with pytest.raises(asyncio.CancelledError):
            await task

    async def _busy_until_both_are_due() -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + 0.05
        await asyncio.sleep(0)
        while loop.time() < until:
            pass
        await asyncio.sleep(5)

    ran(work)


def test_an_error_that_the_ending_calls_forth_is_told_and_the_task_goes_on():
    async def fails_when_ended() -> None:
        try:
            await asyncio.sleep(5)
        finally:
            raise ValueError("while ending")

    async def work(limit: TimeLimit) -> None:
        with pytest.raises(ValueError, match="while ending"):
            await soon(limit, fails_when_ended(), 0.02)
        await asyncio.sleep(0)

    ran(work)


def test_a_limit_that_has_ended_is_let_go_of_before_its_time():
    async def run() -> None:
        limit = TimeLimit()
        await soon(limit, asyncio.sleep(0), 3600)
        limit.end()
        kept = weakref.ref(limit)
        del limit
        gc.collect()
        assert kept() is None

    asyncio.run(run())
