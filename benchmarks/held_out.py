"""Greedy accuracy of saved weights on a fixed held-out set, asked the same way for every side."""

from __future__ import annotations

from pathlib import Path

from benchmarks.exchange import load_weights
from benchmarks.options import BenchmarkError
from gmpo.assembly import build_parts
from gmpo.config import RunConfig


class HeldOut:
    """A model that takes on weights and answers the held-out items of a recipe.

    Args:
        recipe: its task, model and evaluation.
        num_items: of the held-out set.

    Raises:
        BenchmarkError: the task does not hold out so many.
    """

    def __init__(self, recipe: RunConfig, *, num_items: int) -> None:
        self._parts = build_parts(recipe, warn=print)
        self._items = self._parts.held_out[:num_items]
        self._version = 0
        if len(self._items) < num_items:
            self._parts.close()
            raise BenchmarkError(
                f"--items is {num_items}, and the task holds out {len(self._items)}; lower it"
            )

    def accuracy(self, weights: Path) -> float:
        """Share of items that the weights answer, each item once at temperature 0."""
        parts = self._parts
        parts.policy.load_weights(load_weights(weights).items())
        self._version += 1
        parts.publish_weights(self._version)
        return parts.evaluator.greedy(self._items).mean

    def close(self) -> None:
        self._parts.close()
