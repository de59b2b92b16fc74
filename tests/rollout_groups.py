"""Groups of rollouts made by hand, for tests of what comes after sampling."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from gmpo.batch import StepBatch, build_step
from gmpo.records import Group, Prompt, Rollout

VOCABULARY = 101
"""Of the tiny models."""


def rollout(
    token_ids: Sequence[int],
    *,
    index: int = 0,
    prompt_id: str = "p",
    logprobs: Sequence[float] | None = None,
    from_policy: Sequence[bool] | None = None,
    reward: float | None = 0.0,
    error: str | None = None,
    dtype: type[np.floating] = np.float64,
) -> Rollout:
    """A finished rollout; log-probabilities are -1 and every token the policy's unless given."""
    count = len(token_ids)
    return Rollout(
        prompt_id=prompt_id,
        index=index,
        token_ids=np.array(token_ids, dtype=np.int64),
        from_policy=np.array(
            [True] * count if from_policy is None else from_policy, dtype=np.bool_
        ),
        sampler_logprobs=np.array([-1.0] * count if logprobs is None else logprobs, dtype=dtype),
        text="",
        finish_reason="stop",
        first_version=0,
        last_version=0,
        reward=reward,
        error=error,
    )


def group(prompt_ids: Sequence[int], rollouts: Sequence[Rollout]) -> Group:
    """A group whose prompt has the rollouts' prompt id."""
    name = rollouts[0].prompt_id
    return Group(
        prompt=Prompt(id=name, text="x", token_ids=tuple(prompt_ids)), rollouts=tuple(rollouts)
    )


def random_groups(
    prompts: Sequence[Sequence[int]], lengths: Sequence[Sequence[int]], *, seed: int = 0
) -> list[Group]:
    """A group a prompt, with random completions of the given lengths."""
    generator = np.random.default_rng(seed)
    return [
        group(
            prompt_ids,
            [
                rollout(
                    generator.integers(5, VOCABULARY, size=length),
                    index=index,
                    prompt_id=f"p{number}",
                    logprobs=-2.0 * generator.random(length) - 3.0,
                )
                for index, length in enumerate(of_group)
            ],
        )
        for number, (prompt_ids, of_group) in enumerate(zip(prompts, lengths, strict=True))
    ]


def one_step(
    groups: Sequence[Group],
    advantages: Sequence[Sequence[float]],
    *,
    max_tokens: int = 10_000,
    shares_prompts: bool = True,
    skips_dead_rows: bool = False,
    device: str = "cpu",
    least_batches: int = 1,
) -> StepBatch:
    """The groups as one optimizer step; a large budget puts them into one micro-batch."""
    return build_step(
        groups,
        torch.tensor(advantages, dtype=torch.float64),
        max_tokens=max_tokens,
        shares_prompts=shares_prompts,
        skips_dead_rows=skips_dead_rows,
        device=torch.device(device),
        least_batches=least_batches,
    )
