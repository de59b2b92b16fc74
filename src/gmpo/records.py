"""The records that stages exchange: plain Python and numpy, ragged, immutable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

__all__ = ["FinishReason", "Group", "Message", "Prompt", "Rollout", "control_token_marker"]

_CONTROL_TOKEN_MARKERS = "\U000f0000\U000f0001"
"""Characters that no turn may hold: transformers puts them around a control token that a turn
spells, and takes them out of the turn first, without a word, so that nobody forges one."""

FinishReason = Literal["stop", "length", "cancelled"]
"""Why sampling ended: a stop token or string, the token limit, or the caller."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


def control_token_marker(content: str) -> str | None:
    """The first character of a turn that none may hold, U+F0000 or U+F0001; None without one."""
    there = (marker for marker in _CONTROL_TOKEN_MARKERS if marker in content)
    return min(there, key=content.index, default=None)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One task item: a chat or a plain text, with the data set's other fields.

    Exactly one of `messages` and `text` is set. `token_ids` is None until the rollout stage has
    rendered the prompt for a model; tasks know no tokenizer. `columns` holds the data set's other
    fields, the reference answer among them (`columns["answer"]`).
    """

    id: str
    messages: tuple[Message, ...] | None = None
    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    media: tuple[Any, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.messages is None) == (self.text is None):
            raise ValueError(
                f"prompt {self.id!r} must have either messages or text, "
                f"got messages={self.messages!r} and text={self.text!r}"
            )

    def with_tokens(self, token_ids: tuple[int, ...]) -> Prompt:
        """The same prompt, rendered for a model."""
        return replace(self, token_ids=token_ids)


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One prompt's completion number `index`, as it was sampled, and what it earned.

    `token_ids` are exactly the sampled ids, the stop token included; text is never re-tokenised.
    `from_policy` is True where the policy sampled the token and False on tool or environment
    tokens. `sampler_logprobs` are log-probabilities (nats) of the distribution that was sampled.
    `rewards` are the components by name, `reward` their combination; both are filled by the reward
    stage, and so are `notes`, what reward functions wrote beside it. A rollout with an `error` is
    counted but never trained on.
    """

    prompt_id: str
    index: int
    token_ids: Int[np.ndarray, " T"]
    from_policy: Bool[np.ndarray, " T"]
    sampler_logprobs: Float[np.ndarray, " T"]
    text: str
    finish_reason: FinishReason
    first_version: int
    last_version: int
    rewards: Mapping[str, float] = field(default_factory=dict)
    reward: float | None = None
    error: str | None = None
    notes: Mapping[str, str | float | None] = field(default_factory=dict)

    @property
    def is_truncated(self) -> bool:
        """Whether the token limit cut the completion."""
        return self.finish_reason == "length"

    @property
    def num_tokens(self) -> int:
        """Completion length in tokens."""
        return len(self.token_ids)


@dataclass(frozen=True, kw_only=True)
class Group:
    """One prompt with its rollouts; advantages are relative to the other rollouts of the group."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
