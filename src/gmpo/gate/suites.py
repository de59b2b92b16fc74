"""What two models made of the same suites, item by item, as the gate takes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gmpo.errors import ConfigError, DataError
from gmpo.gate.records import Guardrail, PairedSuite
from gmpo.outcomes import (
    ItemOutcome,
    SuiteOutcomes,
    refuse_other_question,
    told_of_answering,
    what_chooses_items,
)

__all__ = ["ComparedSuites", "compared_suites"]


@dataclass(frozen=True, kw_only=True)
class ComparedSuites:
    """Two models on the same items.

    Attributes:
        suites: shares of right completions, suite by suite.
        lengths: mean tokens of each item's completions, over all suites.
    """

    suites: tuple[PairedSuite, ...]
    lengths: Guardrail


def compared_suites(
    champion: Sequence[SuiteOutcomes],
    candidate: Sequence[SuiteOutcomes],
    *,
    warn: Callable[[str], None] = lambda _: None,
) -> ComparedSuites:
    """Pair two models' outcomes: sampled ones where both have them, else the greedy ones.

    Args:
        champion: outcomes of the model that serves.
        candidate: of the one that would.
        warn: told what only one of them was asked, and so does not count, and what differs in how
            they answered.

    Raises:
        ConfigError: they share no suite, or were asked in different ways.
        DataError: they share no item of a suite, or were put one differently, by its text or what
            their recipes add.
    """
    way = _way(champion, candidate)
    before = {one.suite: one for one in champion if one.way.name == way}
    after = {one.suite: one for one in candidate if one.way.name == way}
    for name in sorted(before.keys() ^ after.keys()):
        warn(f"suite {name} was asked of one model alone and does not count")
    pairs = {
        name: list(_pairs(before[name], after[name], warn=warn)) for name in before if name in after
    }
    suites = tuple(
        PairedSuite(
            suite=name,
            champion=np.array([_share(one) for one, _ in found]),
            candidate=np.array([_share(other) for _, other in found]),
            samples=before[name].way.num_samples,
            items=tuple(f"{name}/{one.id}" for one, _ in found),
        )
        for name, found in pairs.items()
    )
    everything = [pair for found in pairs.values() for pair in found]
    lengths = Guardrail(
        name="length",
        champion=np.array([_length(one) for one, _ in everything]),
        candidate=np.array([_length(other) for _, other in everything]),
    )
    return ComparedSuites(suites=suites, lengths=lengths)


def _way(champion: Sequence[SuiteOutcomes], candidate: Sequence[SuiteOutcomes]) -> str:
    for way in ("sampled", "greedy"):
        asked = [
            {one.suite: one.way for one in outcomes if one.way.name == way}
            for outcomes in (champion, candidate)
        ]
        shared = asked[0].keys() & asked[1].keys()
        for name in sorted(shared):
            if asked[0][name] != asked[1][name]:
                raise ConfigError(
                    f"suite {name} was asked with {asked[0][name].num_samples} samples at "
                    f"temperature {asked[0][name].temperature:g} of one model and with "
                    f"{asked[1][name].num_samples} at {asked[1][name].temperature:g} of the other; "
                    "ask both alike"
                )
        if shared:
            return way
    raise ConfigError(
        "the two models share no suite that was asked of both in the same way; evaluate both with "
        "the same --suite and --samples"
    )


def _pairs(
    before: SuiteOutcomes, after: SuiteOutcomes, *, warn: Callable[[str], None]
) -> Iterator[tuple[ItemOutcome, ItemOutcome]]:
    refuse_other_question(before, after)
    for told in told_of_answering(before, after):
        warn(told)
    others = {item.id: item for item in after.items}
    shared = [item for item in before.items if item.id in others]
    if not shared:
        raise DataError(
            f"the two models share no item of {before.suite}; evaluate both with "
            f"{what_chooses_items(before.suite)}"
        )
    alone = len(before.items) + len(after.items) - 2 * len(shared)
    if alone:
        warn(f"{alone} items of {before.suite} were asked of one model alone and do not count")
    for item in shared:
        other = others[item.id]
        if item.digest != other.digest:
            raise DataError(
                f"item {item.id!r} of {before.suite} was put differently to the two models; "
                "evaluate both on the same data with the same --instruction"
            )
        yield item, other


def _share(item: ItemOutcome) -> float:
    return item.num_correct / len(item.completions)


def _length(item: ItemOutcome) -> float:
    return float(np.mean([completion.num_tokens for completion in item.completions]))
