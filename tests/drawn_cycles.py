"""Cycles with the real gate and store whose models are drawn: accuracies in place of weights."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tests.learning import NAME, version

from gmpo.continual import ControllerSettings, run_cycle
from gmpo.continual_records import CycleFacts, CycleResult, StepReport
from gmpo.continual_release import (
    Compared,
    VersionRegistry,
    approve_step,
    gate_step,
    promote_step,
    roll_back_step,
    write_compared,
)
from gmpo.errors import ChampionMoved, DataError, StoreLocked
from gmpo.gate_policy import GatePolicy
from gmpo.gate_records import GateDecision, PairedSuite
from gmpo.store import Champion, ModelVersion, Store

MARGIN = 0.05
SIZES = {"old": 600, "new": 400}
DELTAS = (0.05, 0.0, -MARGIN, -2 * MARGIN)
"""What an update does to every item's chance."""


class Killed(BaseException):
    """The process died here, as far as the cycle is concerned."""


class StoreRegistry:
    """A registry of versions without files; evidence has to pass, and to be about the pair."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def add(
        self,
        path: Path,
        *,
        name: str,
        parent: str | None,
        lineage: dict[str, Any],
        metrics: dict[str, Any],
    ) -> ModelVersion:
        made = version(path.name, parent=parent)
        self._store.put_model_version(made)
        return made

    def promote(
        self,
        name: str,
        *,
        expected_champion: str | None,
        candidate: str,
        evidence: GateDecision | Mapping[str, Any],
    ) -> Champion:
        told = evidence.as_dict() if isinstance(evidence, GateDecision) else dict(evidence)
        pair = (told["champion"], told["candidate"])
        if told["outcome"] != "pass" or pair != (expected_champion, candidate):
            raise DataError(f"the evidence is {told['outcome']!r} about {pair}")
        return self._store.set_champion(
            name, expected=expected_champion, version=candidate, reason={"evidence": told}
        )

    def rollback(self, name: str, *, expected_champion: str, reason: dict[str, Any]) -> Champion:
        now = self._store.champion(name)
        if now is None or now.version != expected_champion or now.previous is None:
            raise ChampionMoved(name, expected=expected_champion, found=now and now.version)
        return self._store.set_champion(
            name, expected=expected_champion, version=now.previous, reason=dict(reason)
        )


@dataclass(kw_only=True)
class DrawnWork:
    """`CycleWork` whose models are how much better than the first one they are.

    Attributes:
        store: real.
        registry: of its versions.
        faults: decides when a step breaks or the process dies.
        fault_rate: chance of each, at each place where it may happen.
        skills: of versions: added to every item's chance.
        deltas: of candidates over their champions.
        watch_fails: chance that a released version disappoints where it serves.
    """

    store: Store
    registry: VersionRegistry
    faults: random.Random
    fault_rate: float
    skills: dict[str, float]
    deltas: dict[str, float] = field(default_factory=dict)
    watch_fails: float = 0.1

    def risk(self) -> None:
        """Break or die, now and then."""
        drawn = self.faults.random()
        if drawn < self.fault_rate / 2:
            raise Killed
        if drawn < self.fault_rate:
            raise StoreLocked("the store was locked, for once")

    def validate(self, facts: CycleFacts, folder: Path) -> StepReport:
        return self._passes()

    def small_update(self, facts: CycleFacts, folder: Path) -> StepReport:
        return self._passes()

    def safety_test(self, facts: CycleFacts, folder: Path) -> StepReport:
        return self._passes()

    def update(self, facts: CycleFacts, folder: Path) -> StepReport:
        draw = random.Random(f"update {facts.number}")
        skill = self.skills[facts.champion]
        # Chances stay where every delta can be had.
        delta = draw.choice([d for d in DELTAS if abs(skill + d) <= 0.2])
        name = f"v{facts.number}"
        self.skills[name], self.deltas[name] = skill + delta, delta
        self.risk()
        self.registry.add(folder / name, name=NAME, parent=facts.champion, lineage={}, metrics={})
        self.risk()
        return StepReport(passed=True, sentence="drawn", details={"new_model_version": name})

    def evaluate(self, facts: CycleFacts, folder: Path) -> StepReport:
        draw = np.random.default_rng([facts.number, 7])
        suites = []
        for name, size in SIZES.items():
            chance = np.random.default_rng([len(name), size]).uniform(0.3, 0.7, size)
            suites.append(
                PairedSuite(
                    suite=name,
                    champion=draw.random(size) < chance + self.skills[facts.champion],
                    candidate=draw.random(size) < chance + self.skills[facts.candidate],
                )
            )
        write_compared(folder, Compared(suites=suites))
        self.risk()
        return StepReport(passed=True, sentence="drawn")

    def gate(self, facts: CycleFacts, folder: Path) -> StepReport:
        self.risk()
        return gate_step(facts, policy=GatePolicy(degradation_limit=MARGIN))

    def live_test(self, facts: CycleFacts, folder: Path) -> StepReport:
        return self._passes()

    def approve(self, facts: CycleFacts, folder: Path) -> StepReport:
        return approve_step(facts, self.store, is_automatic=True)

    def promote(self, facts: CycleFacts, folder: Path) -> StepReport:
        self.risk()
        report = promote_step(facts, self.store, self.registry)
        self.risk()
        return report

    def watch(self, facts: CycleFacts, folder: Path) -> StepReport:
        disappoints = random.Random(f"watch {facts.number}").random() < self.watch_fails
        return StepReport(passed=not disappoints, sentence="drawn")

    def roll_back(self, facts: CycleFacts, folder: Path) -> StepReport:
        self.risk()
        report = roll_back_step(facts, self.store, self.registry)
        self.risk()
        return report

    def _passes(self) -> StepReport:
        self.risk()
        return StepReport(passed=True, sentence="it passes")


def finish_cycle(store: Store, work: DrawnWork, folder: Path) -> CycleResult:
    """A cycle begun and, however often it breaks or dies, brought to its end."""

    def tell(step: str, moment: str, _: StepReport | None) -> None:
        if moment != "begins" and work.faults.random() < work.fault_rate / 2:
            raise Killed

    for _ in range(1000):
        try:
            return run_cycle(
                store,
                NAME,
                work,
                folder=folder,
                request=lambda: {"data": "drawn"},
                settings=ControllerSettings(tell=tell, lease_seconds=600.0),
            )
        except (Killed, StoreLocked):
            continue
    raise AssertionError("a cycle did not end within 1,000 tries")
