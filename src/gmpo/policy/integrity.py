"""Whether anything but the trainer's own steps has written into the weights that it trains."""

from __future__ import annotations

import math

import torch

from gmpo.policy.score import Policy

__all__ = ["WeightsWatch"]


class WeightsWatch:
    """Remembers how the trained weights were left, and tells which are no longer so.

    A function of the user's that writes into the model, a faulty memory, or a bug: training repairs
    much of what is broken so, and figures of a round, which scatter, show it late or never. The
    weights show it at once. What is compared is the Euclidean norm of each tensor in fp32, which
    any disturbance of some size changes, and which costs one pass over the weights. It cannot tell
    values that changed places or signs.

    Args:
        policy: whose `trained_weights` are watched. Frozen weights are not.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._left: dict[str, float] = {}

    def note(self) -> None:
        """The weights are as they should be."""
        self._left = self._norms()

    def disturbed(self) -> tuple[str, ...]:
        """Names of the weights that have changed since `note`; none before the first one."""
        if not self._left:
            return ()
        # A run that has diverged may have noted NaN, which is not another value for being NaN.
        return tuple(
            name
            for name, norm in self._norms().items()
            if norm != self._left[name] and not (math.isnan(norm) and math.isnan(self._left[name]))
        )

    def _norms(self) -> dict[str, float]:
        weights = self._policy.trained_weights()
        norms = torch.stack([torch.linalg.vector_norm(weight) for weight in weights.values()])
        return dict(zip(weights, norms.tolist(), strict=True))
