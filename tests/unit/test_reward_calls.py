"""Reward functions of the user's: TRL's convention, what they get and give, async ones."""

from __future__ import annotations

import asyncio
import threading
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from tests.reward_rows import (
    Judge,
    chat,
    errors_of,
    functions,
    plain,
    refusal,
    rewards_of,
    score,
)
from transformers import TrainerState
from trl.rewards import (
    accuracy_reward,
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
    think_format_reward,
)

from gmpo.errors import ConfigError
from gmpo.rewards import RewardFunctions, ScoredGroups, joined, length_reward

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
    with pytest.raises(ConfigError, match=r"reward 'r' takes \[\] only"):
        RewardFunctions({"r": lambda: [0.0]})
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
        where = f"({__file__}, line {broken.__code__.co_firstlineno + 1})"
        assert errors_of(scored) == [f"reward 'b' raised KeyError: 'judge' {where}"] * 2
        assert scored.component_errors == {"a": 0, "b": 2}
        assert "reward 'b' raised KeyError: 'judge'" in refusal([plain("1")], rewards)


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
