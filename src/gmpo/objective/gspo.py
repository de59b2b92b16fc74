"""Group Sequence Policy Optimization (arXiv 2507.18071).

Dimensions: **B** sequences (prompts x completions per prompt), **T** completion tokens.
"""

from __future__ import annotations

import math

from jaxtyping import Bool, Float
from torch import Tensor

from gmpo.objective.ratio import (
    ObjectiveTerms,
    masked_log_ratio,
    pessimistic_log_ratio,
    token_mean,
)

__all__ = ["gspo_loss", "gspo_terms"]


def gspo_loss(
    *,
    policy_logprobs: Float[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> Float[Tensor, " B"]:
    """Per-sequence GSPO loss, to be minimised; `gspo_terms` says how and returns its parts."""
    return gspo_terms(
        policy_logprobs=policy_logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        mask=mask,
        clip_low=clip_low,
        clip_high=clip_high,
    ).loss


def gspo_terms(
    *,
    policy_logprobs: Float[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> ObjectiveTerms:
    """Per-sequence GSPO loss with its parts.

    With s = exp(mean over counted tokens of l), loss = -min( s * A, clamp(s, 1-low, 1+high) * A ).
    Without the clip this is GMPO without the clip; GMPO clips tokens and then averages, GSPO
    averages and then clips, which drops a whole sequence at once. A clipped sequence counts all its
    tokens as clipped.

    Args:
        policy_logprobs: log-probabilities under the current policy, in nats; the only argument that
            carries gradient. May hold -inf or NaN off the mask.
        old_logprobs: the same tokens under the old policy, in nats.
        advantages: one per sequence, already group-centred.
        mask: True on completion tokens that count.
        clip_low: lower half-width of the sequence ratio, in ratio space, below 1.
        clip_high: upper half-width of the sequence ratio, in ratio space.

    Raises:
        ValueError: a sequence has no unmasked token, or a half-width is out of range.
    """
    if not 0 < clip_low < 1:
        raise ValueError(
            f"clip_low must lie between 0 and 1 in ratio space, got {clip_low}; 3e-4 is usual"
        )
    if not clip_high > 0:
        raise ValueError(
            f"clip_high must be above 0 in ratio space, got {clip_high}; 4e-4 is usual"
        )
    log_ratio, used = masked_log_ratio(
        policy_logprobs=policy_logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        mask=mask,
    )
    mean_log_ratio = token_mean(used, mask=mask)[:, None]
    clipped, low, high = pessimistic_log_ratio(
        mean_log_ratio,
        advantages=advantages,
        low=math.log1p(-clip_low),
        high=math.log1p(clip_high),
    )
    sequence_ratio = clipped[:, 0].exp()
    return ObjectiveTerms(
        loss=-advantages * sequence_ratio,
        log_ratio=log_ratio,
        sequence_ratio=sequence_ratio,
        clipped_low=low & mask,
        clipped_high=high & mask,
    )
