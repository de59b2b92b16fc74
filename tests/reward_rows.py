"""Rollouts of chats and of plain texts made by hand, and reward functions run on them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from gmpo.errors import DataError
from gmpo.records import Group, Message, Prompt, Rollout
from gmpo.rewards import RewardFunctions, RewardRule, ScoredGroups, score_groups


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
    limits = {} if time_limit_seconds is None else dict.fromkeys(named, time_limit_seconds)
    made = RewardFunctions(named, time_limits=limits)
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


class Judge:
    """An async callable object, as of a client that keeps its connection."""

    def __init__(self) -> None:
        self.loops: set[int] = set()

    async def __call__(self, completions: list[str], **kwargs: Any) -> list[float]:
        self.loops.add(id(asyncio.get_running_loop()))
        await asyncio.sleep(0.01)
        return [float(c) for c in completions]
