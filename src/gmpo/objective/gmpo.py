"""Geometric-Mean Policy Optimization and the paper's ablations (arXiv 2507.20673 v3).

Dimensions: **B** sequences (prompts x completions per prompt), **T** completion tokens.

The paper's symbols: rho_{i,t} is `exp(log_ratio)`, A_i `advantages`, |o_i| the number of counted
tokens, (e^-0.4, e^0.4) `clip_low = clip_high = 0.4` in log space.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from gmpo.objective.ratio import (
    ObjectiveTerms,
    count_tokens,
    masked_log_ratio,
    pessimistic_log_ratio,
    token_mean,
)

__all__ = [
    "gmpo_loss",
    "gmpo_no_clip_terms",
    "gmpo_no_norm_terms",
    "gmpo_sequence_clip_terms",
    "gmpo_terms",
]


def gmpo_loss(
    *,
    policy_logprobs: Float[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    clip_low: float = 0.4,
    clip_high: float = 0.4,
    clip_negative_high: float | None = None,
) -> Float[Tensor, " B"]:
    """Per-sequence GMPO loss, to be minimised; `gmpo_terms` says how and returns its parts."""
    return gmpo_terms(
        policy_logprobs=policy_logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        mask=mask,
        clip_low=clip_low,
        clip_high=clip_high,
        clip_negative_high=clip_negative_high,
    ).loss


def gmpo_terms(
    *,
    policy_logprobs: Float[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    clip_low: float = 0.4,
    clip_high: float = 0.4,
    clip_negative_high: float | None = None,
) -> ObjectiveTerms:
    """Per-sequence GMPO loss with its parts.

    With l = log pi_theta - log pi_old and s = sign(A), each counted token contributes
    c = s * min(s * l, s * clamp(l, -clip_low, clip_high)), and

        loss = -A * exp( 1/|o| * sum over counted tokens of c )

    Paper: Eq 4 and Algorithm 1; the token clip comes first, the geometric mean second. The gradient
    with respect to a token's log-probability is -A/|o| * exp(mean c) if its clip is inactive, else
    0 (Eq 6 with clipping).

    Differences from the paper: (1) low and high clip are separate; (2) `clip_negative_high` is an
    optional second clip, off by default; (3) A = 0 gives loss 0 and gradient 0 whatever the ratio.

    Args:
        policy_logprobs: log-probabilities under the current policy, in nats; the only argument that
            carries gradient. May hold -inf or NaN off the mask.
        old_logprobs: the same tokens under the old policy, in nats.
        advantages: one per sequence, already group-centred.
        mask: True on completion tokens that count.
        clip_low: lower half-width in log space; 0.4 keeps ratios >= 0.67 where A < 0.
        clip_high: upper half-width in log space; 0.4 keeps ratios <= 1.49 where A > 0.
        clip_negative_high: upper half-width in log space where A < 0; None leaves that side open.

    Raises:
        ValueError: a sequence has no unmasked token, or a half-width is not positive.
    """
    log_ratio, used = masked_log_ratio(
        policy_logprobs=policy_logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        mask=mask,
    )
    clipped, clipped_low, clipped_high = pessimistic_log_ratio(
        used,
        advantages=advantages,
        low=-clip_low,
        high=clip_high,
        negative_high=clip_negative_high,
    )
    sequence_ratio = token_mean(clipped, mask=mask).exp()
    return ObjectiveTerms(
        loss=-advantages * sequence_ratio,
        log_ratio=log_ratio,
        sequence_ratio=sequence_ratio,
        clipped_low=clipped_low,
        clipped_high=clipped_high,
    )


def gmpo_no_clip_terms(
    *,
    policy_logprobs: Float[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
) -> ObjectiveTerms:
    """GMPO without the clip: loss = -A * exp(mean l) (Eq 3; Table 4, row 2).

    Arguments and errors as in `gmpo_terms`.
    """
    log_ratio, used = masked_log_ratio(
        policy_logprobs=policy_logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        mask=mask,
    )
    sequence_ratio = token_mean(used, mask=mask).exp()
    nothing_clipped = mask & False
    return ObjectiveTerms(
        loss=-advantages * sequence_ratio,
        log_ratio=log_ratio,
        sequence_ratio=sequence_ratio,
        clipped_low=nothing_clipped,
        clipped_high=nothing_clipped,
    )


def gmpo_sequence_clip_terms(
    *,
    policy_logprobs: Float[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    clip_low: float = 0.4,
    clip_high: float = 0.4,
) -> ObjectiveTerms:
    """GMPO that clips the sequence's raw product of ratios instead of its tokens (Table 4, row 3).

    With L = sum of l and the one-sided clip of `gmpo_terms` applied to L, the loss is
    -A * exp(clip(L) / |o|). The clip acts before the 1/|o| exponent, as in the official code, so a
    long sequence is held far closer to ratio 1 than a short one. A clipped sequence counts all its
    tokens as clipped. This is not GSPO, which clips after the exponent.

    Arguments and errors as in `gmpo_terms`.
    """
    log_ratio, used = masked_log_ratio(
        policy_logprobs=policy_logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        mask=mask,
    )
    clipped, low, high = pessimistic_log_ratio(
        used.sum(dim=-1, keepdim=True), advantages=advantages, low=-clip_low, high=clip_high
    )
    sequence_ratio = (clipped[:, 0] / count_tokens(mask).to(clipped.dtype)).exp()
    return ObjectiveTerms(
        loss=-advantages * sequence_ratio,
        log_ratio=log_ratio,
        sequence_ratio=sequence_ratio,
        clipped_low=low & mask,
        clipped_high=high & mask,
    )


def gmpo_no_norm_terms(
    *,
    policy_logprobs: Float[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    clip_low: float = 0.4,
    clip_high: float = 0.4,
) -> ObjectiveTerms:
    """GMPO without the 1/|o| exponent: loss = -A * exp(sum of clipped l) (Table 4, row 4).

    Read literally the paper's row would hold |A|^|o|; like the official code this multiplies by A
    once. The ratio explodes with length, which is the ablation's point.

    Arguments and errors as in `gmpo_terms`.
    """
    count_tokens(mask)
    log_ratio, used = masked_log_ratio(
        policy_logprobs=policy_logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        mask=mask,
    )
    clipped, clipped_low, clipped_high = pessimistic_log_ratio(
        used, advantages=advantages, low=-clip_low, high=clip_high
    )
    sequence_ratio = clipped.sum(dim=-1).exp()
    return ObjectiveTerms(
        loss=-advantages * sequence_ratio,
        log_ratio=log_ratio,
        sequence_ratio=sequence_ratio,
        clipped_low=clipped_low,
        clipped_high=clipped_high,
    )
