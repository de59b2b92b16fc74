"""Reward functions that fail: never a silent 0, the rows named or dropped and counted."""

from __future__ import annotations

import asyncio
import json
import math
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.reward_rows import (
    Judge,
    errors_of,
    functions,
    plain,
    refusal,
    rewards_of,
    score,
)

from gmpo.errors import DataError
from gmpo.rewards import RewardFunctions


def boom(**kwargs: Any) -> list[float]:
    raise ValueError("no connection")


WHERE = f"({__file__}, line {boom.__code__.co_firstlineno + 1})"


def test_an_exception_stops_the_run_with_function_and_rows_named():
    with functions(r=boom) as rewards, pytest.raises(DataError) as caught:
        score([plain("a", "b"), plain("c", prompt_id="r")], rewards)
    assert str(caught.value) == (
        f"reward 'r' raised ValueError: no connection {WHERE}; it was called with 3 rollouts, "
        "prompt 'q', rollout 0 to prompt 'r', rollout 0; mend it, or set reward.on_error = 'drop' "
        "to leave such rollouts out of training and count them"
    )
    assert isinstance(caught.value.__cause__, ValueError)


def test_the_line_that_is_named_is_the_users_not_that_of_a_library():
    def parses(**kwargs: Any) -> list[float]:
        return [json.loads("{")]

    with functions(r=parses) as rewards:
        said = refusal([plain("a")], rewards)
    assert f"({__file__}, line {parses.__code__.co_firstlineno + 1});" in said


@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
@pytest.mark.parametrize("limit", [None, 30.0], ids=["no limit", "limit"])
def test_a_function_that_exits_is_a_fault_and_the_process_lives(
    is_async: bool, limit: float | None
):
    def exits(**kwargs: Any) -> list[float]:
        sys.exit(3)

    async def exits_later(**kwargs: Any) -> list[float]:
        sys.exit(3)

    function = exits_later if is_async else exits
    with functions(time_limit_seconds=limit, r=function) as rewards:
        assert "reward 'r' raised SystemExit: 3 (" in refusal([plain("a")], rewards)


def yields_and_fails(**kwargs: Any) -> Iterator[float]:
    yield 1.0
    raise TypeError("second")


def test_a_function_that_yields_its_values_fails_like_one_that_returns_them():
    with functions(r=yields_and_fails) as rewards:
        assert "reward 'r' raised TypeError: second (" in refusal([plain("a", "b")], rewards)
        dropped = score([plain("a", "b")], rewards, on_error="drop")
    assert (dropped.num_errors, dropped.component_errors) == (2, {"r": 2})
    with functions(r=lambda **kwargs: (float(n) for n in range(2))) as rewards:
        assert rewards_of(score([plain("a", "b")], rewards)) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ([0.1], "returned 1 values for 2 completions; it must return one a completion, None"),
        (0.5, "returned 0.5; it must return a list of numbers, one a completion"),
        (None, "returned None; it must return a list of numbers"),
        ("ab", "returned 'ab'; it must return a list of numbers"),
        ({"a": 1, "b": 2}, "returned {'a': 1, 'b': 2}; it must return a list of numbers"),
        ({1.0, 2.0}, "returned {1.0, 2.0}; it must return a list of numbers"),
    ],
)
def test_what_is_no_list_of_the_right_length_is_refused(values: Any, what: str):
    with functions(r=lambda **kwargs: values) as rewards:
        said = refusal([plain("a", "b")], rewards)
        assert said.startswith(f"reward 'r' {what}")
        assert "it was called with 2 rollouts, prompt 'q', rollout 0 to prompt 'q'" in said
        dropped = score([plain("a", "b")], rewards, on_error="drop")
    assert (dropped.num_errors, dropped.component_errors) == (2, {"r": 2})


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        ("1.0", "'1.0'"),
        ([1.0], "[1.0]"),
        (torch.tensor([1.0, 2.0]), "tensor([1., 2.])"),
        (10**400, "1" + "0" * 76 + "..."),
    ],
)
def test_a_value_that_is_no_finite_number_stops_the_run_or_drops_its_row(value: Any, shown: str):
    with functions(r=lambda **kwargs: [0.5, value, None]) as rewards:
        groups = [plain("a", "b", "c")]
        said = refusal(groups, rewards)
        scored = score(groups, rewards, on_error="drop")
    assert said == (
        f"prompt 'q', rollout 1: reward 'r' is {shown}; it must be a finite number or None; mend "
        "it, or set reward.on_error = 'drop' to leave such rollouts out of training and count them"
    )
    # The fault costs its own row only, and the row is no zero.
    assert rewards_of(scored) == [0.5, None, None]
    assert errors_of(scored) == [
        None,
        f"reward 'r' is {shown}; it must be a finite number or None",
        None,
    ]
    assert (scored.num_errors, scored.num_unrewarded, scored.component_errors) == (1, 1, {"r": 1})


def test_a_dropped_rollout_keeps_its_other_components():
    with functions(good=lambda **kwargs: [0.25], bad=boom) as rewards:
        scored = score([plain("a")], rewards, on_error="drop")
    (only,) = scored.groups[0].rollouts
    assert only.rewards == {"good": 0.25}
    said = f"reward 'bad' raised ValueError: no connection {WHERE}"
    assert (only.reward, only.error) == (None, said)


# Too slow


def test_a_function_beyond_its_time_is_a_fault_and_is_not_called_while_it_is_busy():
    release = threading.Event()
    calls: list[int] = []

    def slow(completions: list[str], **kwargs: Any) -> list[float]:
        calls.append(len(completions))
        if len(calls) == 1:
            release.wait(10)
        return [1.0] * len(completions)

    with functions(time_limit_seconds=0.05, r=slow) as rewards:
        scored = score([plain("a", "b")], rewards, on_error="drop")
        assert errors_of(scored) == ["reward 'r' took longer than 0.05 s"] * 2
        said = refusal([plain("a")], rewards, on_error="drop")
        assert said == (
            "reward 'r' is still busy with a call that was given up after 0.05 s, and Python "
            "cannot end it; give the function a time limit of its own, then continue with --resume"
        )
        assert calls == [2]
        release.set()
        deadline = time.monotonic() + 5
        while threading.active_count() > 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert rewards_of(score([plain("a")], rewards)) == [1.0]


def test_an_async_function_beyond_its_time_is_cancelled_and_works_again():
    ended: list[str] = []

    async def slow(completions: list[str], **kwargs: Any) -> list[float]:
        try:
            await asyncio.sleep(10 if not ended else 0)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise
        return [1.0] * len(completions)

    with functions(time_limit_seconds=0.05, r=slow, quick=Judge()) as rewards:
        scored = score([plain("1")], rewards, on_error="drop")
        assert errors_of(scored) == ["reward 'r' took longer than 0.05 s"]
        assert scored.groups[0].rollouts[0].rewards == {"quick": 1.0}
        assert ended == ["cancelled"]
        assert rewards_of(score([plain("1")], rewards)) == [2.0]


def test_a_timeout_of_the_functions_own_is_named_as_what_it_raised():
    async def asks(**kwargs: Any) -> list[float]:
        raise TimeoutError("judge did not answer")

    with functions(time_limit_seconds=5, r=asks) as rewards:
        assert "raised TimeoutError: judge did not answer" in refusal([plain("a")], rewards)


def test_an_async_function_that_blocks_the_loop_stops_the_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gmpo.rewards.calls._GRACE_SECONDS", 0.05)
    release = threading.Event()

    async def blocks(**kwargs: Any) -> list[float]:
        release.wait(10)
        return [1.0]

    with functions(time_limit_seconds=0.05, r=blocks) as rewards:
        said = refusal([plain("a")], rewards, on_error="drop")
        release.set()
    assert said.startswith(
        "one of the async rewards ['r'] blocks their event loop beyond the limit"
    )


def test_without_a_limit_a_function_runs_in_the_callers_thread():
    seen: list[threading.Thread] = []

    def reward(**kwargs: Any) -> list[float]:
        seen.append(threading.current_thread())
        return [0.0]

    with functions(r=reward) as rewards:
        score([plain("a")], rewards)
    with functions(time_limit_seconds=5, r=reward) as rewards:
        score([plain("a")], rewards)
    assert seen[0] is threading.current_thread()
    assert seen[1] is not threading.current_thread()


def test_a_function_without_a_limit_is_waited_for_beside_one_that_has_one():
    async def slow(**kwargs: Any) -> list[float]:
        await asyncio.sleep(0.1)
        return [1.0]

    rewards = RewardFunctions({"slow": slow, "quick": Judge()}, time_limits={"quick": 5.0})
    try:
        assert rewards_of(score([plain("2")], rewards)) == [3.0]
    finally:
        rewards.close()
