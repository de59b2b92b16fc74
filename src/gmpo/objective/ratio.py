"""Pieces every objective shares: the masked log-ratio, the one-sided clip, and the result record.

Dimensions: **B** sequences (prompts x completions per prompt), **T** completion tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = [
    "ObjectiveTerms",
    "count_tokens",
    "masked_log_ratio",
    "pessimistic_log_ratio",
    "token_mean",
]


@dataclass(frozen=True, kw_only=True)
class ObjectiveTerms:
    """One objective's loss with the tensors it was made of; metrics come from these alone.

    For every objective `loss = -advantages * sequence_ratio`.

    Attributes:
        loss: per-sequence loss to be minimised; carries gradient.
        log_ratio: log pi_theta - log pi_old in nats, before any clip; exactly 0 off the mask.
        sequence_ratio: what the advantage was multiplied by (for GMPO the geometric mean of the
            sequence's clipped ratios, for GRPO the arithmetic mean).
        clipped_low: tokens whose value the lower clip changed.
        clipped_high: tokens whose value the upper clip changed.
    """

    loss: Float[Tensor, " B"]
    log_ratio: Float[Tensor, "B T"]
    sequence_ratio: Float[Tensor, " B"]
    clipped_low: Bool[Tensor, "B T"]
    clipped_high: Bool[Tensor, "B T"]


def count_tokens(mask: Bool[Tensor, "B T"]) -> Float[Tensor, " B"]:
    """Number of counted tokens of each sequence, |o_i|.

    Raises:
        ValueError: a sequence has no counted token, so its mean is undefined.
    """
    num_tokens = mask.sum(dim=-1)
    if (num_tokens == 0).any():
        empty = torch.nonzero(num_tokens == 0).flatten().tolist()
        raise ValueError(
            f"sequences {empty} have no unmasked token, so their mean is undefined; "
            "drop them (and count the drop) before the loss"
        )
    return num_tokens.to(torch.get_default_dtype())


def masked_log_ratio(
    *,
    policy_logprobs: Float[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """The log-ratio as measured, and as the loss uses it (0 where the advantage is 0), in nats.

    Both are exactly 0 off the mask. The second is also 0 on sequences with advantage 0: they must
    give loss 0 and gradient 0 even where the ratio overflows, because 0 * inf is nan.
    """
    # where, not multiply: padding may hold -inf or nan, and 0 * nan is nan.
    log_ratio = torch.where(mask, policy_logprobs - old_logprobs, 0.0)
    return log_ratio, torch.where((advantages == 0)[:, None], 0.0, log_ratio)


def pessimistic_log_ratio(
    log_ratio: Float[Tensor, "B N"],
    *,
    advantages: Float[Tensor, " B"],
    low: float,
    high: float,
    negative_high: float | None = None,
) -> tuple[Float[Tensor, "B N"], Bool[Tensor, "B N"], Bool[Tensor, "B N"]]:
    """PPO's one-sided clip in log space, and where it changed a value on the low and high side.

    With l the log-ratio and s = sign(A), this is s * min(s * l, s * clamp(l, low, high)): a
    positive advantage caps l from above, a negative one from below, the other side stays open.
    Clipped values carry no gradient.

    Args:
        log_ratio: one value a token, or one a sequence (N = 1), in nats.
        advantages: one per sequence; only the sign matters here.
        low: lower bound in nats, negative.
        high: upper bound in nats, positive.
        negative_high: optional second clip: an upper bound, in nats, for negative advantages,
            whose large ratios the paper leaves unbounded.

    Raises:
        ValueError: a bound has the wrong sign.
    """
    if not (low < 0 < high) or (negative_high is not None and negative_high <= 0):
        raise ValueError(
            f"the clip range must hold low < 0 < high in log space, got low={low}, high={high}, "
            f"negative_high={negative_high}; clip half-widths are positive numbers"
        )
    raises = (advantages > 0)[:, None]
    lowers = (advantages < 0)[:, None]
    clipped_high = raises & (log_ratio > high)
    clipped_low = lowers & (log_ratio < low)
    bounded = torch.where(raises, log_ratio.clamp(max=high), log_ratio.clamp(min=low))
    if negative_high is not None:
        clipped_high = clipped_high | (lowers & (log_ratio > negative_high))
        bounded = torch.where(lowers, bounded.clamp(max=negative_high), bounded)
    return bounded, clipped_low, clipped_high


def token_mean(values: Float[Tensor, "B T"], *, mask: Bool[Tensor, "B T"]) -> Float[Tensor, " B"]:
    """Mean over each sequence's counted tokens; values off the mask have no effect.

    Raises:
        ValueError: a sequence has no counted token.
    """
    num_tokens = count_tokens(mask).to(values.dtype)
    return torch.where(mask, values, 0.0).sum(dim=-1) / num_tokens
