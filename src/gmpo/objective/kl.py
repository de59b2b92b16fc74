"""Estimators of KL(p || q) from tokens **drawn from p**, one value a token.

Dimensions: **B** sequences, **T** completion tokens. Callers mask and average.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["kl_k1", "kl_k3"]


def kl_k1(
    *, p_logprobs: Float[Tensor, "B T"], q_logprobs: Float[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """k1 = log p - log q, in nats: unbiased, but single values may be negative.

    Args:
        p_logprobs: log-probabilities of the drawn tokens under p, which drew them.
        q_logprobs: the same tokens under q.
    """
    return p_logprobs - q_logprobs


def kl_k3(
    *, p_logprobs: Float[Tensor, "B T"], q_logprobs: Float[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """k3 = q/p - 1 - log(q/p), in nats: unbiased and never negative; overflows where q >> p.

    Args:
        p_logprobs: log-probabilities of the drawn tokens under p, which drew them.
        q_logprobs: the same tokens under q.
    """
    log_q_over_p = q_logprobs - p_logprobs
    return torch.expm1(log_q_over_p) - log_q_over_p
