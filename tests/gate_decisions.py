"""Decisions of the gate on simulated answers, whose true change is known."""

from __future__ import annotations

import numpy as np

from gmpo.gate import decide_gate
from gmpo.gate.policy import GatePolicy
from gmpo.gate.records import GateDecision, PairedSuite

SEED = 20260101


# Items differ in difficulty, evenly from never solved to always, and both models answer each once:
# an unchanged model then answers a third of them differently. Coin flips are solved every other
# time, all of them; half is then answered differently.


def simulated(
    changes: tuple[float, ...],
    *,
    repeats: int,
    items: int = 1000,
    samples: int = 1,
    coin_flips: bool = False,
) -> list[GateDecision]:
    """Decisions on suites of equal size whose true accuracies change by `changes`."""
    generator = np.random.default_rng(SEED)

    def suites() -> list[PairedSuite]:
        found = []
        for place, change in enumerate(changes):
            champion, candidate = answers(
                change, items // len(changes), samples, generator, coin_flips=coin_flips
            )
            found.append(
                PairedSuite(
                    suite=f"s{place}", champion=champion, candidate=candidate, samples=samples
                )
            )
        return found

    return [
        decide_gate(suites(), policy=GatePolicy(), champion="old", candidate="new")
        for _ in range(repeats)
    ]


def answers(
    change: float,
    items: int,
    samples: int,
    generator: np.random.Generator,
    *,
    coin_flips: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Shares solved by champion and candidate, [items] each."""
    chance = np.full(items, 0.5) if coin_flips else generator.random(items)
    # Towards 0 or 1 in proportion to the room there is: a half on the mean.
    room = chance if change < 0 else 1 - chance
    moved = chance + 2 * change * room
    return (
        generator.binomial(samples, chance) / samples,
        generator.binomial(samples, moved) / samples,
    )
