"""Group Relative Policy Optimization and Dr. GRPO.

Dimensions: **B** sequences (prompts x completions per prompt), **T** completion tokens.

GRPO: arXiv 2402.03300, and Eq 2 of arXiv 2507.20673 v3 with PPO's clip. Dr. GRPO: arXiv 2503.20783.
The clip acts on log-ratios at the logarithms of the ratio bounds, which is the same function and
keeps exp from overflowing on the clipped side.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gmpo.objective.ratio import (
    ObjectiveTerms,
    count_tokens,
    masked_log_ratio,
    pessimistic_log_ratio,
    token_mean,
)

__all__ = ["dr_grpo_terms", "grpo_loss", "grpo_terms"]


def grpo_loss(
    *,
    policy_logprobs: Float[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Float[Tensor, " B"]:
    """Per-sequence GRPO loss, to be minimised; `grpo_terms` says how and returns its parts."""
    return grpo_terms(
        policy_logprobs=policy_logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        mask=mask,
        clip_low=clip_low,
        clip_high=clip_high,
    ).loss


def grpo_terms(
    *,
    policy_logprobs: Float[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> ObjectiveTerms:
    """Per-sequence GRPO loss with its parts.

    With r = pi_theta / pi_old,

        loss = - 1/|o| * sum over counted tokens of
                         min( r * A, clamp(r, 1 - clip_low, 1 + clip_high) * A )

    The mean is over each sequence's own tokens, so every sequence weighs the same.

    Args:
        policy_logprobs: log-probabilities under the current policy, in nats; the only argument that
            carries gradient. May hold -inf or NaN off the mask.
        old_logprobs: the same tokens under the old policy, in nats.
        advantages: one per sequence, already group-centred.
        mask: True on completion tokens that count.
        clip_low: lower half-width in ratio space, below 1; 0.2 keeps ratios >= 0.8 where A < 0.
        clip_high: upper half-width in ratio space; 0.2 keeps ratios <= 1.2 where A > 0.

    Raises:
        ValueError: a sequence has no unmasked token, or a half-width is out of range.
    """
    log_ratio, ratio, clipped_low, clipped_high = _clipped_ratio(
        policy_logprobs=policy_logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        mask=mask,
        clip_low=clip_low,
        clip_high=clip_high,
    )
    sequence_ratio = token_mean(ratio, mask=mask)
    return ObjectiveTerms(
        loss=-advantages * sequence_ratio,
        log_ratio=log_ratio,
        sequence_ratio=sequence_ratio,
        clipped_low=clipped_low,
        clipped_high=clipped_high,
    )


def dr_grpo_terms(
    *,
    policy_logprobs: Float[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    max_tokens: int,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> ObjectiveTerms:
    """Per-sequence Dr. GRPO loss: GRPO's token sum over a constant length instead of |o|.

        loss = - 1/max_tokens * sum over counted tokens of min( r * A, clamp(r, ...) * A )

    Dr. GRPO also leaves the advantage undivided: use `group_advantages(..., scale="none")`.

    Args:
        policy_logprobs: as in `grpo_terms`.
        old_logprobs: as in `grpo_terms`.
        advantages: one per sequence, centred but not divided by the standard deviation.
        mask: as in `grpo_terms`.
        max_tokens: the constant normaliser, in tokens: the completion limit of the sampling.
        clip_low: as in `grpo_terms`.
        clip_high: as in `grpo_terms`.

    Raises:
        ValueError: as in `grpo_terms`, or `max_tokens` is below 1.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}; use the sampling limit")
    count_tokens(mask)
    log_ratio, ratio, clipped_low, clipped_high = _clipped_ratio(
        policy_logprobs=policy_logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        mask=mask,
        clip_low=clip_low,
        clip_high=clip_high,
    )
    sequence_ratio = torch.where(mask, ratio, 0.0).sum(dim=-1) / max_tokens
    return ObjectiveTerms(
        loss=-advantages * sequence_ratio,
        log_ratio=log_ratio,
        sequence_ratio=sequence_ratio,
        clipped_low=clipped_low,
        clipped_high=clipped_high,
    )


def _clipped_ratio(
    *,
    policy_logprobs: Float[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    clip_low: float,
    clip_high: float,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"], Bool[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Log-ratio, one-sidedly clipped ratio, and where the clip acted on either side."""
    if not 0 < clip_low < 1:
        raise ValueError(
            f"clip_low must lie between 0 and 1 in ratio space, got {clip_low}; 0.2 is usual"
        )
    if not clip_high > 0:
        raise ValueError(f"clip_high must be above 0 in ratio space, got {clip_high}; 0.2 is usual")
    log_ratio, used = masked_log_ratio(
        policy_logprobs=policy_logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        mask=mask,
    )
    clipped, clipped_low, clipped_high = pessimistic_log_ratio(
        used, advantages=advantages, low=math.log1p(-clip_low), high=math.log1p(clip_high)
    )
    return log_ratio, clipped.exp(), clipped_low, clipped_high
