"""What of a run's tensors is exchanged between its processes, and how records of them travel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gmpo.batch import MicroBatch, StepBatch
from gmpo.objective import ObjectiveTerms
from gmpo.policy.score import Policy
from gmpo.update import StepMeasures

__all__ = ["exchanged_weights", "gradients", "moved", "one_step", "sum_of_bits"]


def one_step(batches: tuple[MicroBatch, ...]) -> StepBatch:
    """Micro-batches of any steps, to be scored together."""
    return StepBatch(micro_batches=batches, num_rollouts=0, num_skipped_rows=0)


def exchanged_weights(policy: Policy) -> list[Tensor]:
    """What of the weights moves, in one order: the adapters', or all, as masters hold them."""
    return list(policy.trained_weights().values())


def sum_of_bits(weight: Tensor) -> Tensor:
    """A number that any change of a weight changes, but for changes that cancel bit by bit."""
    kind = torch.int32 if weight.element_size() == 4 else torch.int64
    return weight.view(kind).sum(dtype=torch.int64)


def gradients(policy: Policy) -> list[Tensor]:
    """Gradients of all trained weights, in one order; zeros where there was nothing to do."""
    policy.widen_gradients()
    found = []
    for weight in policy.masters.values():
        if weight.requires_grad:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            found.append(weight.grad)
    return found


def moved(value: Any, device: torch.device | str) -> Any:
    """The same record, its tensors on another device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(moved(part, device) for part in value)
    if isinstance(value, MicroBatch | StepBatch | StepMeasures | ObjectiveTerms):
        parts = {name: moved(part, device) for name, part in vars(value).items()}
        return replace(value, **parts)
    return value
