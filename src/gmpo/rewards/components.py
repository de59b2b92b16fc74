"""The components that come with the package: `correct`, `format` and `length`."""

from __future__ import annotations

import re
from typing import Any

from gmpo.errors import ConfigError, DataError
from gmpo.grading import Grader
from gmpo.rewards.convention import RewardFault, RewardFunction, completion_text

__all__ = ["CorrectReward", "correct_reward", "format_reward", "length_reward"]


class CorrectReward:
    """1.0 for a right final answer, 0.0 for any other; see `correct_reward`."""

    def __init__(self, grader: Grader) -> None:
        self.grader = grader

    def __call__(
        self,
        *,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: object = None,
        trainer_state: object = None,
        log_extra: object = None,
        log_metric: object = None,
        **columns: list[Any],
    ) -> list[float | RewardFault]:
        """The rewards, in the order of the completions; a fault where there is no answer."""
        rewards: list[float | RewardFault] = []
        for row, completion in enumerate(completions):
            item = {name: values[row] for name, values in columns.items()}
            try:
                verdict = self.grader.grade_item(completion_text(completion), item)
            except DataError as error:
                rewards.append(RewardFault(what=f"cannot be given: {error}", cause=error))
            else:
                rewards.append(1.0 if verdict.is_correct else 0.0)
        return rewards


def correct_reward(grader: Grader) -> CorrectReward:
    """A reward function: 1.0 where the final answer is right, else 0.0.

    `Grader.grade_item` says which columns are read. A time-out is 0.0, and is counted in
    `ScoredGroups.num_timeouts`.

    Args:
        grader: stays the caller's to close.
    """
    return CorrectReward(grader)


def format_reward(pattern: str) -> RewardFunction:
    """A reward function: 1.0 where the whole completion matches the pattern, else 0.0.

    Args:
        pattern: a regular expression; put (?s) first to let the dot match line ends.

    Raises:
        ConfigError: it is not a regular expression.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{pattern!r} is not a regular expression: {error}") from error

    def reward(*, prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float]:
        texts = [completion_text(completion) for completion in completions]
        return [1.0 if compiled.fullmatch(text) else 0.0 for text in texts]

    return reward


def length_reward(*, full_tokens: int, zero_tokens: int) -> RewardFunction:
    """A reward function of the completion's n tokens: 1 up to a, 0 from b on, linear between.

    r(n) = min(1, max(0, (b - n) / (b - a))) with a = full_tokens and b = zero_tokens. This is 1
    plus DAPO's soft over-long penalty (arXiv 2503.14476, Eq 13) with L_max = b and
    L_cache = b - a; shifted to [0, 1] so that it can be combined geometrically.

    Args:
        full_tokens: longest completion with the whole reward; the stop token and tokens that a
            tool put in count.
        zero_tokens: shortest completion without any, above `full_tokens`.

    Raises:
        ConfigError: the limits are not 0 <= full_tokens < zero_tokens.
    """
    if not 0 <= full_tokens < zero_tokens:
        raise ConfigError(
            f"full_tokens is {full_tokens} and zero_tokens {zero_tokens}; they must satisfy "
            "0 <= full_tokens < zero_tokens"
        )

    def reward(*, completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        width = zero_tokens - full_tokens
        return [min(1.0, max(0.0, (zero_tokens - len(ids)) / width)) for ids in completion_ids]

    return reward
