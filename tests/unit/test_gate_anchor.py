"""The anchor: losses that are each within the margin do not add up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmpo.continual.anchor import Shares, anchor_suites, best_versions
from gmpo.errors import ConfigError
from gmpo.gate import decide_gate, with_anchor
from gmpo.gate.policy import GatePolicy
from gmpo.gate.records import AnchorSuites, GateDecision, PairedSuite

MARGIN = 0.05
POLICY = GatePolicy(degradation_limit=MARGIN)


def solved(count: int, items: int = 1000) -> np.ndarray:
    """A model that solves the first so many items."""
    return (np.arange(items) < count).astype(float)


def pair(before: np.ndarray, after: np.ndarray, name: str = "old") -> PairedSuite:
    return PairedSuite(suite=name, champion=before, candidate=after)


def decided(*suites: PairedSuite) -> GateDecision:
    return decide_gate(suites, policy=POLICY, champion="v1", candidate="v2")


def test_a_drop_that_the_champion_hides_is_shown_by_the_anchor():
    # The anchor solves 560, the champion 530, the candidate 510: 2 points down, and 5.
    against_champion = decided(pair(solved(530), solved(510)))
    assert against_champion.passed
    anchor = AnchorSuites(suites=(pair(solved(560), solved(510)),), versions={"old": "v0"})
    both = with_anchor(against_champion, anchor)
    assert both.outcome == "fail"
    assert both.sentence.endswith("against anchor v0, overall: a drop is shown (p 8.9e-16)")
    assert both.anchor is not None
    assert both.anchor.overall.difference == pytest.approx(-0.05)
    assert both.anchor.overall.margin == MARGIN
    assert both.overall == against_champion.overall
    assert both.as_dict()["anchor"]["versions"] == {"old": "v0"}
    assert replace(both, anchor=None, outcome="pass", sentence="") == replace(
        against_champion, sentence=""
    )


def test_an_anchor_within_reach_lets_pass_and_is_named():
    anchor = AnchorSuites(suites=(pair(solved(535), solved(530)),), versions={"old": "v0"})
    both = with_anchor(decided(pair(solved(530), solved(530))), anchor)
    assert both.passed
    assert "a drop of 5 points is ruled out, against the anchor too, and every" in both.sentence


def test_an_anchor_that_decides_nothing_keeps_the_gate_shut():
    few = (pair(np.tile([0.0, 1.0], 30), np.tile([1.0, 0.0], 30)),)
    both = with_anchor(
        decided(pair(solved(530), solved(530))), AnchorSuites(suites=few, versions={"old": "v0"})
    )
    assert both.outcome == "inconclusive"
    assert "against anchor v0, overall: a drop of 5 points is not ruled out" in both.sentence


def test_suites_are_held_against_the_version_that_was_best_at_each():
    earlier = {
        "v0": {"old": solved(560), "new": solved(100)},
        "v1": {"old": solved(530), "new": solved(300)},
    }
    assert best_versions(earlier, alpha=0.05) == {"old": "v0", "new": "v1"}
    suites = [
        pair(solved(530), solved(510), "old"),
        replace(pair(solved(300), solved(310), "new"), items=tuple(map(str, range(1000)))),
        pair(solved(1), solved(1), "newest"),  # that no earlier version was asked
    ]
    versions = best_versions(earlier, alpha=0.05)
    held = anchor_suites(suites, earlier, versions=versions, champion="v1")
    assert held is not None
    assert held.versions == {"old": "v0", "new": "v1"}
    old, new = held.suites
    assert (old.champion.mean(), old.candidate.mean()) == (0.56, 0.51)
    assert (new.champion.mean(), new.items[:2]) == (0.3, ("0", "1"))
    # Where the champion is the best at all of them, it is held against already.
    assert anchor_suites(suites, earlier, versions={"old": "v1"}, champion="v1") is None
    assert anchor_suites(suites, {}, versions={}, champion="v1") is None


def test_outcomes_and_versions_belong_together():
    with pytest.raises(ConfigError, match="give both for each"):
        AnchorSuites(suites=(pair(solved(1), solved(1)),), versions={"new": "v0"})


@pytest.mark.parametrize(
    ("gains", "best"),
    [
        ((0,), "v0"),
        ((5,), "v0"),  # 5 of 5 won: p 0.031, and the first one tried has half of 0.05
        ((6,), "v1"),  # 0.016
        ((0, 6), "v0"),  # the second one tried has a sixth of it, 0.0083
        ((0, 7), "v2"),  # 0.0078
        ((6, 12), "v2"),  # after each change the count begins anew
    ],
)
def test_a_later_version_is_the_best_once_its_gain_is_shown(gains: tuple[int, ...], best: str):
    earlier = {"v0": {"old": solved(500)}}
    earlier |= {f"v{at}": {"old": solved(500 + gain)} for at, gain in enumerate(gains, start=1)}
    assert best_versions(earlier, alpha=0.05) == {"old": best}


def drawn(skill: float, noise: float, generator: np.random.Generator) -> np.ndarray:
    """Items of evenly spread difficulty; what lies near a model's reach comes out by chance."""
    difficulty = (np.arange(1000) + 0.5) / 1000
    return (difficulty + generator.normal(0, noise, 1000) < 0.7 + skill).astype(float)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 12))
def test_the_best_version_does_not_depend_on_those_that_come_later(seed: int, count: int):
    generator = np.random.default_rng(seed)
    earlier = {
        f"v{at:02}": {"old": drawn(generator.uniform(-0.1, 0.1), 0.1, generator)}
        for at in range(count)
    }
    names = list(earlier)
    chosen = [
        best_versions({name: earlier[name] for name in names[:end]}, alpha=0.05)["old"]
        for end in range(1, count + 1)
    ]
    for before, after, newest in zip(chosen, chosen[1:], names[1:], strict=False):
        assert after in (before, newest)


def test_luck_makes_no_version_the_best():
    generator = np.random.default_rng(7)
    raised = 0
    for _ in range(60):
        earlier = {f"v{at}": {"old": drawn(0.0, 0.3, generator)} for at in range(30)}
        raised += best_versions(earlier, alpha=0.05)["old"] != "v0"
    # At most one time in twenty; more than 7 of 60 would be 2 % likely then.
    assert raised <= 7


def walked(
    change: Callable[[int], float], *, cycles: int, seed: int, noise: float, anchored: bool
) -> SimpleNamespace:
    """Cycles whose updates change the skill by so much each; what passes serves."""
    generator = np.random.default_rng(seed)
    skills, serving = {"v0": 0.0}, ["v0"]
    asked: dict[str, Shares] = {"v0": {"old": drawn(0.0, noise, generator)}}
    for number in range(1, cycles + 1):
        champion, candidate = serving[-1], f"v{number}"
        skills[candidate] = skills[champion] + change(number)
        asked[candidate] = {"old": drawn(skills[candidate], noise, generator)}
        suites = [pair(asked[champion]["old"], asked[candidate]["old"])]
        decision = decided(*suites)
        earlier = {version: asked[version] for version in serving}
        anchor = anchor_suites(
            suites, earlier, versions=best_versions(earlier, alpha=0.05), champion=champion
        )
        if anchored and anchor is not None:
            decision = with_anchor(decision, anchor)
        if decision.passed:
            serving.append(candidate)
    levels = [skills[version] for version in serving]
    return SimpleNamespace(end=levels[-1], peak=max(levels), num_promoted=len(serving) - 1)


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 2**32), st.floats(0.35, 0.6), st.floats(0.0, 0.03))
def test_two_hundred_small_losses_end_about_a_margin_below_the_anchor(
    seed: int, share: float, noise: float
):
    end = walked(lambda _: -share * MARGIN, cycles=200, seed=seed, noise=noise, anchored=True).end
    # Whole steps: the last one that passes lies within a margin, or a step below it by chance.
    assert end >= -(1 + share) * MARGIN


def test_without_an_anchor_they_add_up():
    loss = -MARGIN / 2
    drift = walked(lambda _: loss, cycles=60, seed=1, noise=0.02, anchored=False)
    assert drift.end < -10 * MARGIN
    held = walked(lambda _: loss, cycles=60, seed=1, noise=0.02, anchored=True)
    assert -1.5 * MARGIN <= held.end < 0


def test_the_anchor_rises_with_what_was_gained():
    gained = walked(
        lambda number: MARGIN if number <= 4 else -MARGIN / 2,
        cycles=80,
        seed=2,
        noise=0.02,
        anchored=True,
    )
    assert gained.peak == pytest.approx(4 * MARGIN)
    assert gained.end >= gained.peak - 1.5 * MARGIN


def test_updates_that_change_nothing_still_pass():
    same = walked(lambda _: 0.0, cycles=60, seed=3, noise=0.02, anchored=True)
    assert same.num_promoted >= 57
    assert all(abs(b - a) == 0 for a, b in pairwise([same.end, same.peak]))
