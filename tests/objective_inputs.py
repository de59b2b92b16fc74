"""Inputs of an objective made by hand, and what is asked of its result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gmpo.objective import OBJECTIVES, ObjectiveTerms

F64 = torch.float64
every_objective = pytest.mark.parametrize("name", sorted(OBJECTIVES))


def batch(log_ratio: Any, advantages: Any, mask: Any = None, old: Any = None) -> dict[str, Tensor]:
    """Keyword arguments of an objective, with the policy's log-probabilities as the leaf."""
    log_ratio = torch.as_tensor(log_ratio, dtype=F64)
    old = torch.zeros_like(log_ratio) if old is None else torch.as_tensor(old, dtype=F64)
    if mask is None:
        mask = torch.ones_like(log_ratio, dtype=torch.bool)
    return {
        "policy_logprobs": (old + log_ratio).requires_grad_(),
        "old_logprobs": old,
        "advantages": torch.as_tensor(advantages, dtype=F64),
        "mask": torch.as_tensor(mask),
    }


def gradient(loss: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """Of the summed loss, by the policy's log-probabilities."""
    return torch.autograd.grad(loss.sum(), inputs["policy_logprobs"])[0]


def assert_values(actual: Tensor, expected: Any) -> None:
    """Equal to 1e-12: GSPO's clip is 3e-4 wide, which a tolerance of 1e-7 would hardly see."""
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=F64), rtol=1e-12, atol=1e-12)


def terms_of(
    name: str, *, policy: Tensor, old: Tensor, advantages: Tensor, mask: Tensor
) -> ObjectiveTerms:
    """Any objective by name, with its defaults."""
    # Dr. GRPO alone needs a length; it is the sampling limit, whatever the width of the batch.
    extra = {"max_tokens": 32} if name == "dr_grpo" else {}
    return OBJECTIVES[name](
        policy_logprobs=policy, old_logprobs=old, advantages=advantages, mask=mask, **extra
    )
