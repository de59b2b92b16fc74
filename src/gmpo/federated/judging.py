"""Is a new model no worse than the one before? Asked of the server's own items, by the gate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from gmpo.config import RunConfig
from gmpo.continual.plan import suite_prompts
from gmpo.continual.suites import ModelAsked, require_apart, some_items, success_shares
from gmpo.errors import DataError
from gmpo.federated.plan import Federation
from gmpo.gate import AnchorSuites, GateDecision, decide_gate, with_anchor
from gmpo.gate.suites import compared_suites
from gmpo.outcomes import SuiteOutcomes
from gmpo.records import Prompt
from gmpo.task_table import build_task

__all__ = ["Judge", "server_suites"]

_HELD_OUT = "held_out"
"""Name of the suite that the recipe's own task holds out."""
_LEAST_ITEMS = 10
"""Of a suite: with fewer than five wrong answers more, chance explains them at any usual level."""


class Judge:
    """Asks models the server's items, each once, and compares what they answered.

    Args:
        folder: outcomes are kept there, by version.
        federation: whose items and margins these are.
        recipe: how models are asked, device and precision settled.
        suites: the items, by name.
        start: version that the federation began with.
        warn: told in one sentence what is not as expected.
    """

    def __init__(
        self,
        folder: Path,
        *,
        federation: Federation,
        recipe: RunConfig,
        suites: Mapping[str, Sequence[Prompt]],
        start: str,
        warn: Callable[[str], None],
    ) -> None:
        judging = federation.plan.judging
        self._policy = judging.policy()
        self._takes_doubt = judging.in_doubt == "accept"
        self._asked = ModelAsked(folder, recipe, samples=judging.samples, warn=warn)
        self._suites = suites
        self._start = start
        self._warn = warn

    def ask(self, version: str, model: Path) -> dict[str, SuiteOutcomes]:
        """What a model answers, by suite; a version is asked once.

        Raises:
            gmpo.errors.GmpoError: the model cannot be loaded, or an item does not fit its context.
        """
        return self._asked.outcomes(version, model, self._suites)

    def accuracy(self, version: str, model: Path) -> dict[str, float]:
        """Share of right completions, by suite."""
        found = self.ask(version, model)
        return {name: float(success_shares(one).mean()) for name, one in found.items()}

    def mean_accuracy(self, version: str, model: Path) -> float:
        """Share of right completions over all items."""
        shares = [success_shares(one) for one in self.ask(version, model).values()]
        return float(np.concatenate(shares).mean())

    def decide(
        self, *, before: tuple[str, Path], after: tuple[str, Path], start: Path
    ) -> GateDecision:
        """The gate's answer about a new model, against the one before and the starting one.

        Many rounds that each lose less than the margin would add up otherwise.

        Args:
            before: version and folder of the round's model.
            after: of the new one.
            start: folder of the model that the federation began with.
        """
        champion, candidate = self.ask(*before), self.ask(*after)
        compared = compared_suites(
            list(champion.values()), list(candidate.values()), warn=self._warn
        )
        decision = decide_gate(
            compared.suites, policy=self._policy, champion=before[0], candidate=after[0]
        )
        if self._start in (before[0], after[0]):
            return decision
        first = self.ask(self._start, start)
        anchored = compared_suites(list(first.values()), list(candidate.values()), warn=self._warn)
        versions = {suite.suite: self._start for suite in anchored.suites}
        return with_anchor(decision, AnchorSuites(suites=anchored.suites, versions=versions))

    def accepts(self, decision: GateDecision) -> bool:
        """Whether the next round begins with the new model."""
        return decision.passed or (self._takes_doubt and decision.outcome == "inconclusive")


def server_suites(federation: Federation) -> dict[str, tuple[Prompt, ...]]:
    """The items that the server asks, by suite.

    Raises:
        ConfigError: an item stands in two suites.
        DataError: a file is missing, a row is not usable, or a suite has too few items.
    """
    from gmpo.inputs import held_out_items

    judging = federation.plan.judging
    if judging.suites:
        suites = {name: suite_prompts(path) for name, path in judging.suites.items()}
    else:
        recipe = federation.recipe
        suites = {_HELD_OUT: held_out_items(recipe, build_task(recipe.task))}
    if judging.items is not None:
        suites = {
            name: some_items(items, judging.items, seed="federated")
            for name, items in suites.items()
        }
    require_apart(suites)
    needed = judging.policy().min_items if judging.in_doubt == "keep" else _LEAST_ITEMS
    for name, items in suites.items():
        if len(items) < needed:
            raise DataError(
                f"suite {name} has {len(items)} items, and {needed} are needed: "
                + (
                    "with fewer nothing passes, so judging.in_doubt = 'keep' would keep the model "
                    "as it is for ever"
                    if judging.in_doubt == "keep"
                    else "with fewer no drop can be shown, so any model would be accepted"
                )
            )
    return suites
