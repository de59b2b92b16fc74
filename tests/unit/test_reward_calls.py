"""Reward functions of the user's: TRL's convention, async ones, faults by the stated rule."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerState
from trl.rewards import (
    accuracy_reward,
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
    think_format_reward,
)

from gmpo.errors import ConfigError, DataError
from gmpo.records import Group, Message, Prompt, Rollout
from gmpo.rewards import (
    RewardFunctions,
    RewardRule,
    ScoredGroups,
    joined,
    length_reward,
    score_groups,
)


def rollout(text: str, index: int = 0, *, prompt_id: str = "p", tokens: int = 1) -> Rollout:
    return Rollout(
        prompt_id=prompt_id,
        index=index,
        token_ids=np.arange(tokens),
        from_policy=np.ones(tokens, dtype=np.bool_),
        sampler_logprobs=np.full(tokens, -1.0),
        text=text,
        finish_reason="stop",
        first_version=0,
        last_version=0,
    )


def chat(*texts: str, prompt_id: str = "p", **columns: Any) -> Group:
    turns = (Message(role="user", content="12 + 7?"),)
    prompt = Prompt(id=prompt_id, messages=turns, columns=columns)
    return Group(
        prompt=prompt,
        rollouts=tuple(rollout(t, n, prompt_id=prompt_id) for n, t in enumerate(texts)),
    )


def plain(*texts: str, prompt_id: str = "q", **columns: Any) -> Group:
    prompt = Prompt(id=prompt_id, text="12 + 7 =", columns=columns)
    return Group(
        prompt=prompt,
        rollouts=tuple(rollout(t, n, prompt_id=prompt_id) for n, t in enumerate(texts)),
    )


@contextmanager
def functions(
    *, time_limit_seconds: float | None = None, **named: Any
) -> Iterator[RewardFunctions]:
    made = RewardFunctions(named, time_limit_seconds=time_limit_seconds)
    try:
        yield made
    finally:
        made.close()


def score(
    groups: list[Group],
    rewards: RewardFunctions,
    *,
    trainer_state: object = None,
    **rule: Any,
) -> ScoredGroups:
    return score_groups(groups, rewards, rule=RewardRule(**rule), trainer_state=trainer_state)


def rewards_of(scored: ScoredGroups) -> list[float | None]:
    return [r.reward for group in scored.groups for r in group.rollouts]


def errors_of(scored: ScoredGroups) -> list[str | None]:
    return [r.error for group in scored.groups for r in group.rollouts]


def refusal(groups: list[Group], rewards: RewardFunctions, **rule: Any) -> str:
    with pytest.raises(DataError) as caught:
        score(groups, rewards, **rule)
    return str(caught.value)


# The convention


def test_functions_that_come_with_trl_run_unchanged():
    right, wrong = r"<think>12 and 7</think>\boxed{19}", r"\boxed{18}"
    group = chat(right, wrong, solution=r"\boxed{19}")
    with functions(
        accuracy=accuracy_reward,
        think=think_format_reward,
        # a completion of 1 token: 1 of the 2 tokens of the soft zone below 2
        overlong=get_soft_overlong_punishment(2, 2),
        repetition=get_repetition_penalty_reward(2),
    ) as rewards:
        scored = score([group], rewards)
    assert [r.rewards for r in scored.groups[0].rollouts] == [
        {"accuracy": 1.0, "think": 1.0, "overlong": -0.5, "repetition": 0.0},
        {"accuracy": 0.0, "think": 0.0, "overlong": -0.5, "repetition": 0.0},
    ]
    # what accuracy_reward logs beside each rollout with log_extra
    assert set(scored.groups[0].rollouts[0].notes) == {"solution", "gold_parsed", "answer_parsed"}


def test_a_trl_function_says_none_where_it_does_not_apply():
    group = chat(r"\boxed{19}", solution="words")
    with functions(accuracy=accuracy_reward, one=lambda **kwargs: [1.0]) as rewards:
        scored = score([group], rewards, weights={"accuracy": 3.0, "one": 1.0})
    # accuracy is missing, so its weight goes to `one`: (3 + 1) * 1
    assert scored.groups[0].rollouts[0].rewards == {"one": 1.0}
    assert rewards_of(scored) == [4.0]


def test_a_function_gets_what_trl_hands_over():
    seen: dict[str, Any] = {}

    def reward(**kwargs: Any) -> list[float]:
        seen.update(kwargs)
        return [0.0, 0.0]

    state = TrainerState(global_step=8, max_steps=40, epoch=0.5)
    with functions(r=reward) as rewards:
        score([chat("a", "b", level=3)], rewards, trainer_state=state)
    assert set(seen) == {
        "prompts",
        "completions",
        "completion_ids",
        "trainer_state",
        "log_extra",
        "log_metric",
        "level",
    }
    assert seen["prompts"] == [[{"role": "user", "content": "12 + 7?"}]] * 2
    assert seen["completions"] == [
        [{"role": "assistant", "content": "a"}],
        [{"role": "assistant", "content": "b"}],
    ]
    assert seen["completion_ids"] == [[0], [0]]
    assert seen["level"] == [3, 3]
    assert (seen["trainer_state"].global_step, seen["trainer_state"].max_steps) == (8, 40)


def test_a_mixture_of_chats_and_plain_texts_loses_no_row_and_keeps_the_order():
    forms: list[tuple[type, int]] = []

    def reward(completions: list[Any], **kwargs: Any) -> list[float]:
        # As functions written for TRL do, it tells the form by the first row.
        is_chat = isinstance(completions[0], list)
        forms.append((type(completions[0]), len(completions)))
        return [float(c[0]["content"] if is_chat else c) for c in completions]

    groups = [plain("1", "2"), chat("3", "4"), plain("5", prompt_id="r")]
    with functions(r=reward) as rewards:
        assert rewards_of(score(groups, rewards)) == [1, 2, 3, 4, 5]
    assert forms == [(list, 2), (str, 3)]


def test_two_prompts_of_one_id_are_both_rewarded():
    with functions(r=lambda completions, **kwargs: [float(c) for c in completions]) as rewards:
        scored = score([plain("1", "2"), plain("3", "4")], rewards)
    assert rewards_of(scored) == [1, 2, 3, 4]


def test_an_empty_completion_is_a_row_like_any_other():
    with functions(r=lambda completions, **kwargs: [len(c) for c in completions]) as rewards:
        assert rewards_of(score([plain("", "ab")], rewards)) == [0.0, 2.0]


def test_a_function_that_spoils_its_arguments_spoils_nothing_for_the_next():
    def spoil(prompts: list[Any], completions: list[Any], level: list[int], **kw: Any) -> list[int]:
        prompts[0][0]["content"] = "spoilt"
        completions.reverse()
        level.clear()
        return [0, 0]

    seen: dict[str, Any] = {}

    def look(**kwargs: Any) -> list[float]:
        seen.update(kwargs)
        return [1.0, 1.0]

    with functions(a=spoil, b=look) as rewards:
        score([chat("a", "b", level=3)], rewards)
    assert seen["prompts"][0][0]["content"] == "12 + 7?"
    assert seen["completions"][0][0]["content"] == "a"
    assert seen["level"] == [3, 3]


@pytest.mark.parametrize(
    "values",
    [
        [1, 0.5],
        (True, 0.5),
        np.array([1.0, 0.5], dtype=np.float32),
        torch.tensor([1.0, 0.5]),
        [np.float64(1), torch.tensor(0.5)],
        iter([1, 0.5]),
    ],
)
def test_numbers_of_every_kind_are_numbers(values: Any):
    with functions(r=lambda **kwargs: values) as rewards:
        assert rewards_of(score([plain("a", "b")], rewards)) == [1.0, 0.5]


def test_what_functions_log_is_kept_beside_each_rollout_and_for_the_round():
    def reward(completions: list[str], log_extra: Any, log_metric: Any, **kwargs: Any) -> list[int]:
        log_extra("words", [len(c.split()) for c in completions])
        log_extra("seen", [{"as": c} for c in completions])
        log_metric("longest", max(len(c) for c in completions))
        return [0] * len(completions)

    with functions(r=reward) as rewards:
        first = score([plain("a", "b b")], rewards)
        second = score([plain("c" * 5)], rewards)
    assert [r.notes for r in first.groups[0].rollouts] == [
        {"words": 1, "seen": "{'as': 'a'}"},
        {"words": 2, "seen": "{'as': 'b b'}"},
    ]
    assert first.metrics == {"longest": [3.0]}
    both = joined(first, second)
    assert both.metrics == {"longest": [3.0, 5.0]}
    assert (both.num_rollouts, len(both.groups)) == (3, 2)


def test_notes_of_another_number_are_the_functions_fault():
    def reward(log_extra: Any, **kwargs: Any) -> list[int]:
        log_extra("a", [1])
        return [0, 0]

    with functions(r=reward) as rewards:
        assert "raised ValueError: log_extra('a') got 1 values for 2 completions" in refusal(
            [plain("a", "b")], rewards
        )


# Before anything runs


def test_a_function_that_takes_no_further_keywords_is_refused():
    with pytest.raises(ConfigError) as caught:
        RewardFunctions({"r": lambda completions, answer: [0.0]})
    assert str(caught.value) == (
        "reward 'r' takes ['completions', 'answer'] only, and it is also called with ['prompts', "
        "'completions', 'completion_ids', 'trainer_state', 'log_extra', 'log_metric'] and the "
        "prompts' columns; let it take **kwargs"
    )
    with pytest.raises(ConfigError, match="reward 'r' is 3; it must be a function"):
        RewardFunctions({"r": 3})  # type: ignore[dict-item]


def test_a_column_that_the_prompts_do_not_have_is_named():
    with functions(r=accuracy_reward) as rewards:
        rewards.require_columns(["solution"])
        with pytest.raises(ConfigError) as caught:
            rewards.require_columns(["answer", "level"])
    assert str(caught.value) == (
        "reward 'r' asks for column 'solution', and the task's prompts have ['answer', 'level']; "
        "rename the column or the argument, or give it a default"
    )


def test_a_column_with_the_name_of_an_argument_is_refused():
    with functions(r=lambda **kwargs: [0.0]) as rewards:
        assert "a prompt has a column 'log_metric'" in refusal([plain("a", log_metric=1)], rewards)


# Async functions


class Judge:
    """An async callable object, as of a client that keeps its connection."""

    def __init__(self) -> None:
        self.loops: set[int] = set()

    async def __call__(self, completions: list[str], **kwargs: Any) -> list[float]:
        self.loops.add(id(asyncio.get_running_loop()))
        await asyncio.sleep(0.01)
        return [float(c) for c in completions]


def test_async_functions_run_at_the_same_time():
    meeting = threading.Barrier(2, timeout=5)

    async def reward(scale: float, completions: list[str], **kwargs: Any) -> list[float]:
        # Each waits for the other: one after the other they would never meet.
        await asyncio.to_thread(meeting.wait)
        return [scale * float(c) for c in completions]

    with functions(a=partial(reward, 1.0), b=partial(reward, 2.0)) as rewards:
        scored = score([plain("1", "2")], rewards)
    assert [r.rewards for r in scored.groups[0].rollouts] == [
        {"a": 1.0, "b": 2.0},
        {"a": 2.0, "b": 4.0},
    ]


def test_sync_and_async_functions_keep_their_names():
    with functions(a=Judge(), b=lambda **kwargs: [7.0]) as rewards:
        scored = score([plain("1")], rewards)
    assert scored.groups[0].rollouts[0].rewards == {"a": 1.0, "b": 7.0}


def test_async_functions_work_inside_a_running_loop():
    async def notebook() -> ScoredGroups:
        with functions(a=Judge()) as rewards:
            return score([plain("1", "2")], rewards)

    assert rewards_of(asyncio.run(notebook())) == [1.0, 2.0]


def test_every_round_has_the_same_event_loop():
    judge = Judge()
    with functions(a=judge) as rewards:
        for _ in range(3):
            score([plain("1")], rewards)
    assert len(judge.loops) == 1


def test_an_async_functions_fault_names_it_and_spares_the_others():
    async def broken(**kwargs: Any) -> list[float]:
        raise KeyError("judge")

    with functions(a=Judge(), b=broken) as rewards:
        scored = score([plain("1", "2")], rewards, on_error="drop")
        assert errors_of(scored) == ["reward 'b' raised KeyError: 'judge'"] * 2
        assert scored.component_errors == {"a": 0, "b": 2}
        assert "reward 'b' raised KeyError: 'judge'" in refusal([plain("1")], rewards)


# Faults


def boom(**kwargs: Any) -> list[float]:
    raise ValueError("no connection")


def test_an_exception_stops_the_run_with_function_and_rows_named():
    with functions(r=boom) as rewards, pytest.raises(DataError) as caught:
        score([plain("a", "b"), plain("c", prompt_id="r")], rewards)
    assert str(caught.value) == (
        "reward 'r' raised ValueError: no connection; it was called with 3 rollouts, prompt 'q', "
        "rollout 0 to prompt 'r', rollout 0; mend it, or set reward.on_error = 'drop' to leave "
        "such rollouts out of training and count them"
    )
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ([0.1], "returned 1 values for 2 completions; it must return one a completion, None"),
        (0.5, "returned 0.5; it must return a list of numbers, one a completion"),
        (None, "returned None; it must return a list of numbers"),
        ("ab", "returned 'ab'; it must return a list of numbers"),
        ({"a": 1, "b": 2}, "returned {'a': 1, 'b': 2}; it must return a list of numbers"),
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
    assert (only.reward, only.error) == (None, "reward 'bad' raised ValueError: no connection")


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


# Length


def test_the_length_reward_falls_linearly_between_its_limits():
    reward = length_reward(full_tokens=4, zero_tokens=8)
    # 8 - n of the 4 tokens between the limits are left
    by_length = {0: 1.0, 4: 1.0, 5: 0.75, 6: 0.5, 7: 0.25, 8: 0.0, 20: 0.0}
    ids = [[0] * count for count in by_length]
    assert reward(prompts=[], completions=[], completion_ids=ids) == list(by_length.values())


def test_the_length_reward_is_one_plus_the_soft_over_long_penalty():
    ours = length_reward(full_tokens=12, zero_tokens=20)
    theirs = get_soft_overlong_punishment(max_completion_len=20, soft_punish_cache=8)
    ids = [[0] * count for count in range(25)]
    assert ours(completion_ids=ids) == pytest.approx([1 + r for r in theirs(completion_ids=ids)])


@pytest.mark.parametrize(("full", "zero"), [(4, 4), (5, 4), (-1, 4)])
def test_length_limits_out_of_order_are_refused(full: int, zero: int):
    with pytest.raises(ConfigError, match="0 <= full_tokens < zero_tokens"):
        length_reward(full_tokens=full, zero_tokens=zero)
