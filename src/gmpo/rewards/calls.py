"""Reward functions called: in turn or together, within a time limit, their faults caught."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

from gmpo.errors import ConfigError, DataError, GmpoError, what_was_raised
from gmpo.grading import Grader
from gmpo.rewards.components import CorrectReward
from gmpo.rewards.convention import (
    RewardCall,
    RewardFault,
    RewardFunction,
    RewardRows,
    is_async,
    missing_columns,
    require_keywords,
)

__all__ = ["RewardFunctions"]

_GRACE_SECONDS = 1.0
"""Beyond the time limit, for coroutines to end after they were cancelled."""


class RewardFunctions:
    """The reward functions of a run by the name of their component.

    Functions run one after the other in the caller's thread, `async def` ones together on one
    event loop that lives in a thread of its own, so that they work inside a running loop too and
    find the same loop in every round. With a time limit the former run in a thread each, because
    Python cannot interrupt a function in the caller's.

    Args:
        functions: at least one.
        time_limits: seconds of a call, by name; a function without one is waited for.

    Raises:
        ConfigError: there is no function, or one cannot be called by the convention.
    """

    def __init__(
        self,
        functions: Mapping[str, RewardFunction],
        *,
        time_limits: Mapping[str, float] | None = None,
    ) -> None:
        if not functions:
            raise ConfigError("there is no reward function; give at least one")
        for name, function in functions.items():
            require_keywords(name, function)
        self.functions = dict(functions)
        self._time_limits = dict(time_limits or {})
        self._abandoned: dict[str, threading.Thread] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_thread: threading.Thread | None = None

    @property
    def graders(self) -> tuple[Grader, ...]:
        """Graders behind the functions, each once."""
        correct = [f for f in self.functions.values() if isinstance(f, CorrectReward)]
        return tuple({id(f.grader): f.grader for f in correct}.values())

    def require_columns(self, columns: Sequence[str]) -> None:
        """Refuse functions that ask for a column that the prompts do not have.

        Raises:
            ConfigError: one does; function and column are named.
        """
        for name, function in self.functions.items():
            missing = missing_columns(function, columns)
            if missing:
                raise ConfigError(
                    f"reward {name!r} asks for column {missing[0]!r}, and the task's prompts have "
                    f"{sorted(columns)}; rename the column or the argument, or give it a default"
                )

    def call(
        self, rows: RewardRows, *, trainer_state: object = None
    ) -> tuple[dict[str, list[float | RewardFault | None]], list[RewardCall]]:
        """Each function's checked values, one a row, and the calls with what they logged.

        Raises:
            GmpoError: a component of ours cannot work at all, or a function of the caller's hangs
                so that it can never be called again.
        """
        calls = {
            name: RewardCall(name=name, function=function, rows=rows, trainer_state=trainer_state)
            for name, function in self.functions.items()
        }
        together = [name for name, function in self.functions.items() if is_async(function)]
        returned = {name: self._returned(c) for name, c in calls.items() if name not in together}
        if together:
            awaited = self._awaited([calls[name] for name in together])
            returned |= dict(zip(together, awaited, strict=True))
        values = {name: _checked(returned[name], len(rows.places)) for name in calls}
        return values, list(calls.values())

    def close(self) -> None:
        """End the event loop, if there is one; the next call of an async function starts another.

        A call that was abandoned goes on until it ends or the process does.
        """
        if self._loop is None or self._loop_thread is None:
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._loop_thread.join(_GRACE_SECONDS)
        self._loop = self._loop_thread = None

    def _returned(self, call: RewardCall) -> Any:
        """What a function returned, or its fault."""
        limit = self._time_limits.get(call.name)
        if limit is None:
            return _unless_ours(_attempt(call.start))
        busy = self._abandoned.get(call.name)
        if busy is not None and busy.is_alive():
            raise DataError(
                f"reward {call.name!r} is still busy with a call that was given up after {limit} "
                "s, and Python cannot end it; give the function a time limit of its own, then "
                "continue with --resume"
            )
        outcomes: list[Any] = []
        # A daemon: a call that never ends must not keep the process alive.
        thread = threading.Thread(
            target=lambda: outcomes.append(_attempt(call.start)),
            name=f"reward {call.name}",
            daemon=True,
        )
        thread.start()
        thread.join(limit)
        if thread.is_alive():
            self._abandoned[call.name] = thread
            return _too_slow(limit)
        if not outcomes:
            return RewardFault(what="ended its thread without returning", of_whole_call=True)
        return _unless_ours(outcomes[0])

    def _awaited(self, calls: Sequence[RewardCall]) -> list[Any]:
        """What async functions returned, or their faults; they ran at the same time."""
        limits = [self._time_limits.get(call.name) for call in calls]
        gathered = _gathered(calls, limits)
        future = asyncio.run_coroutine_threadsafe(gathered, self._running_loop())
        known = [limit for limit in limits if limit is not None]
        longest = max(known) + _GRACE_SECONDS if len(known) == len(limits) else None
        try:
            outcomes = future.result(longest)
        except TimeoutError:
            names = sorted(call.name for call in calls)
            raise DataError(
                f"one of the async rewards {names} blocks their event loop beyond the limit of "
                f"{max(known)} s, and Python cannot end it; await instead of blocking, then "
                "continue with --resume"
            ) from None
        return [_unless_ours(outcome) for outcome in outcomes]

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._loop_thread = threading.Thread(
                target=_serve, args=(self._loop,), name="async rewards", daemon=True
            )
            self._loop_thread.start()
        return self._loop


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    """Run the loop until it is stopped, then let what still runs in it end as cancelled."""
    loop.run_forever()
    loop.run_until_complete(_cancel_the_others())
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()


async def _cancel_the_others() -> None:
    pending = asyncio.all_tasks() - {asyncio.current_task()}
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)


async def _gathered(calls: Sequence[RewardCall], limits: Sequence[float | None]) -> list[Any]:
    return await asyncio.gather(*map(_within, calls, limits))


async def _within(call: RewardCall, limit: float | None) -> Any:
    try:
        async with asyncio.timeout(limit) as scope:
            return _drained(await call.start())
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a user's function may do either
        # The function's own TimeoutError is a fault like any other.
        if isinstance(error, TimeoutError) and scope.expired() and limit is not None:
            return _too_slow(limit)
        return _raised(error)


def _attempt(start: Callable[[], Any]) -> Any:
    try:
        return _drained(start())
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a user's function may do either
        return _raised(error)


def _drained(returned: Any) -> Any:
    """What a function that yields its values raises or waits for is that call's own."""
    return list(returned) if isinstance(returned, Iterator) else returned


def _raised(error: BaseException) -> RewardFault:
    what = f"raised {what_was_raised(error)}"
    return RewardFault(what=what, of_whole_call=True, cause=error)


def _too_slow(limit: float) -> RewardFault:
    return RewardFault(what=f"took longer than {limit} s", of_whole_call=True)


def _unless_ours(outcome: Any) -> Any:
    """The outcome, unless it is an error that this package names itself: that one goes on."""
    if isinstance(outcome, RewardFault) and isinstance(outcome.cause, GmpoError):
        raise outcome.cause
    return outcome


def _checked(returned: Any, count: int) -> list[float | RewardFault | None]:
    """One usable value or fault a row, from whatever a function returned."""
    fault: RewardFault | None = None
    values: list[Any] = []
    if isinstance(returned, RewardFault):
        fault = returned
    elif isinstance(returned, str | bytes | Mapping | Set):  # a set has no order
        fault = _not_a_list(returned)
    else:
        try:
            values = list(returned)
        except TypeError:
            fault = _not_a_list(returned)
    if fault is None and len(values) != count:
        fault = RewardFault(
            what=f"returned {len(values)} values for {count} completions; it must return one a "
            "completion, None where it has none",
            of_whole_call=True,
        )
    return [fault] * count if fault is not None else [_checked_value(value) for value in values]


def _not_a_list(returned: Any) -> RewardFault:
    return RewardFault(
        what=f"returned {_short(returned)}; it must return a list of numbers, one a completion",
        of_whole_call=True,
    )


def _checked_value(value: Any) -> float | RewardFault | None:
    if value is None or isinstance(value, RewardFault):
        return value
    fault = RewardFault(what=f"is {_short(value)}; it must be a finite number or None")
    if isinstance(value, str | bytes):
        return fault
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last: torch, two elements
        return fault
    return number if math.isfinite(number) else fault


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
