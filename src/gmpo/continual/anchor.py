"""The anchor of a cycle: earlier versions, so that small losses do not add up unseen.

Each cycle may lose less than the margin against its champion. The candidate is therefore held
against an earlier version too, by what that one once made of the same items.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gmpo.continual.plan import LearnPlan, suites_of
from gmpo.continual.records import CycleFacts
from gmpo.continual.suites import ModelAsked, success_shares
from gmpo.errors import DataError
from gmpo.gate import drop_p_value
from gmpo.gate.records import AnchorSuites, PairedSuite
from gmpo.registry import serving_line
from gmpo.store import Store

__all__ = [
    "Shares",
    "anchor_suites",
    "best_versions",
    "earlier_champions",
    "find_anchor",
    "require_anchor",
]

Shares = Mapping[str, NDArray[np.float64]]
"""Share of right completions of each item of each suite that a version was asked."""


def best_versions(earlier: Mapping[str, Shares], *, alpha: float) -> dict[str, str]:
    """Of each suite, the earliest version that no later one was shown to beat.

    The highest of many noisy figures is mostly luck, and a candidate held against luck fails. So a
    later version takes the place of the best one only where a gain is shown: at level
    alpha / (k (k + 1)) for the k-th one tried, which adds up to alpha however many there are, and
    does not change by versions that come later.

    Args:
        earlier: what each version made of the suites, in the order in which they served.
        alpha: chance that a version which is no better takes the place of the best one.
    """
    best: dict[str, str] = {}
    num_tried: dict[str, int] = {}
    for version, shares in earlier.items():
        for suite, found in shares.items():
            if suite not in best:
                best[suite], num_tried[suite] = version, 0
                continue
            num_tried[suite] += 1
            before = earlier[best[suite]][suite]
            # A drop from the later one to the best one so far is a gain of the later one.
            gain_p = drop_p_value(PairedSuite(suite=suite, champion=found, candidate=before))
            if gain_p < alpha / (num_tried[suite] * (num_tried[suite] + 1)):
                best[suite], num_tried[suite] = version, 0
    return best


def anchor_suites(
    suites: Sequence[PairedSuite],
    earlier: Mapping[str, Shares],
    *,
    versions: Mapping[str, str],
    champion: str,
) -> AnchorSuites | None:
    """The candidate's outcomes beside those of earlier versions; None if that is the champion.

    Args:
        suites: outcomes of champion and candidate.
        earlier: of the earlier versions, on the same items.
        versions: which of them each suite is held against; others have none.
        champion: version that serves, which the candidate is held against in any case.
    """
    if set(versions.values()) <= {champion}:
        return None
    held = [suite for suite in suites if suite.suite in versions]
    return AnchorSuites(
        suites=tuple(
            replace(suite, champion=earlier[versions[suite.suite]][suite.suite]) for suite in held
        ),
        versions={suite.suite: versions[suite.suite] for suite in held},
    )


def earlier_champions(store: Store, name: str) -> list[str]:
    """Versions that served and were not taken back, in the order in which they first did."""
    return list(dict.fromkeys(serving_line(store.champion_history(name))))


def find_anchor(
    store: Store,
    facts: CycleFacts,
    plan: LearnPlan,
    *,
    asked: ModelAsked,
    suites: Sequence[PairedSuite],
    folder_of: Callable[[str], str],
) -> AnchorSuites | None:
    """The earlier versions that the plan wants the candidate held against, with their outcomes.

    The best ones are looked for among outcomes that were kept. A pinned version is asked what it
    was not asked yet.

    Args:
        store: knows who served.
        facts: of the cycle.
        plan: says which anchor is wanted.
        asked: keeps outcomes by version.
        suites: of champion and candidate.
        folder_of: a version's weights.
    """
    if plan.anchor == "none":
        return None
    items = suites_of(plan)
    if plan.anchor == "best":
        found = {one: asked.stored(one, items) for one in earlier_champions(store, facts.name)}
    else:
        pinned = _pinned(store, facts.name, plan.anchor)
        found = {pinned: asked.stored(pinned, items)}
        if found[pinned].keys() != items.keys():
            found[pinned] = asked.outcomes(pinned, Path(folder_of(pinned)), items)
    shares = {
        version: {name: success_shares(one) for name, one in outcomes.items()}
        for version, outcomes in found.items()
    }
    versions = best_versions(shares, alpha=plan.alpha)
    return anchor_suites(suites, shares, versions=versions, champion=facts.champion)


def require_anchor(
    store: Store,
    plan: LearnPlan,
    *,
    name: str,
    asked: ModelAsked,
    folder_of: Callable[[str], str],
) -> None:
    """Refuse a pinned version before anything is trained, if nothing can be held against it.

    Args:
        store: knows the versions.
        plan: that may pin one.
        name: of the model.
        asked: keeps outcomes by version.
        folder_of: a version's weights; raises where they are not there.

    Raises:
        DataError: there is no such version.
        ModelError: it was not asked the suites yet, and its files are gone.
    """
    if plan.anchor in ("best", "none"):
        return
    pinned, items = _pinned(store, name, plan.anchor), suites_of(plan)
    if asked.stored(pinned, items).keys() != items.keys():
        folder_of(pinned)


def _pinned(store: Store, name: str, digits: str) -> str:
    """The version of a model that begins with these digits."""
    found = [one for one in store.model_versions(name) if one.version.startswith(digits)]
    if len(found) != 1:
        raise DataError(
            f"the plan's anchor is {digits!r}, and {len(found)} versions of {name!r} begin with "
            "it; write the first digits of one that gmpo registry list shows, best, or none"
        )
    return found[0].version
