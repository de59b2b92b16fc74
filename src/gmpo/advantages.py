"""Group-relative advantages: each rollout's reward against the other rollouts of its prompt.

Dimensions: **P** prompts, **G** completions per prompt.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["group_advantages"]

_EQUAL_SPREAD = 1e-9
"""A group whose rewards differ by no more than this, relative to max(1, |r|), counts as equal."""


def group_advantages(
    rewards: Float[Tensor, "P G"],
    *,
    valid: Bool[Tensor, "P G"] | None = None,
    scale: Literal["std", "none"] = "std",
    eps: float = 0.0,
) -> Float[Tensor, "P G"]:
    """A_i = (r_i - mean(r)) / (std(r) + eps) within each group (arXiv 2507.20673 v3, section 2.2).

    The standard deviation is the unbiased one. A group of equal rewards gives exactly 0, not
    rounding noise over rounding noise: with eps = 1e-8 a group of eight 0.1s would otherwise get an
    advantage of 0.41. Entries that are not valid give 0 and do not enter mean or deviation.

    Args:
        rewards: one reward a rollout; invalid entries may hold NaN.
        valid: False on rollouts that failed or were never sampled; None means all are valid.
        scale: "std" divides by the standard deviation (GRPO, GMPO), "none" only centres (Dr. GRPO).
        eps: added to the deviation; TRL uses 1e-4, the official code 1e-8.

    Raises:
        ValueError: a valid reward is not finite; the group and its rewards are named.
    """
    if valid is None:
        valid = torch.ones_like(rewards, dtype=torch.bool)
    broken = (valid & ~rewards.isfinite()).any(dim=-1)
    if broken.any():
        group = int(torch.nonzero(broken)[0])
        raise ValueError(
            f"rewards must be finite, but group {group} has {rewards[group].tolist()}; "
            "mark failed rollouts as not valid instead"
        )
    kept = torch.where(valid, rewards, 0.0)
    num_valid = valid.sum(dim=-1, keepdim=True)
    centered = torch.where(
        valid, kept - kept.sum(dim=-1, keepdim=True) / num_valid.clamp(min=1), 0.0
    )
    if scale == "std":
        variance = centered.square().sum(dim=-1, keepdim=True) / (num_valid - 1).clamp(min=1)
        centered = centered / (variance.sqrt() + eps)
    spread = torch.where(valid, kept, -torch.inf).amax(dim=-1, keepdim=True) - torch.where(
        valid, kept, torch.inf
    ).amin(dim=-1, keepdim=True)
    magnitude = kept.abs().amax(dim=-1, keepdim=True).clamp(min=1.0)
    is_equal = spread <= _EQUAL_SPREAD * magnitude
    return torch.where(is_equal | ~valid, 0.0, centered)
