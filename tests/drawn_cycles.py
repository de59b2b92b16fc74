"""Cycles with the real gate, registry and store, and accuracies in place of models."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tests.learning import NAME
from tests.registries import model_folder

from gmpo.continual import ControllerSettings, open_cycle, run_cycle
from gmpo.continual.anchor import anchor_suites, best_versions, earlier_champions
from gmpo.continual.records import CycleFacts, CycleResult, StepReport
from gmpo.continual.release import (
    Compared,
    approve_step,
    gate_step,
    promote_step,
    roll_back_step,
    write_compared,
)
from gmpo.errors import StoreLocked
from gmpo.gate.policy import GatePolicy
from gmpo.gate.records import PairedSuite
from gmpo.registry import Registry
from gmpo.store import Store

MARGIN = 0.05
SIZES = {"old": 600, "new": 400}
DELTAS = (0.05, 0.0, -MARGIN, -2 * MARGIN)
"""What an update does to every item's chance."""


class Killed(BaseException):
    """The process died here, as far as the cycle is concerned."""


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
        is_automatic: whether nobody has to approve.
        changes: of which one is drawn for each update: added to every item's chance.
        outcomes: what each version made of the suites.
        seen: how often the process died and a step broke.
    """

    store: Store
    registry: Registry
    faults: random.Random
    fault_rate: float
    skills: dict[str, float]
    deltas: dict[str, float] = field(default_factory=dict)
    watch_fails: float = 0.1
    is_automatic: bool = True
    changes: Sequence[float] = DELTAS
    outcomes: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    seen: Counter[str] = field(default_factory=Counter)

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
        delta = draw.choice([d for d in self.changes if abs(skill + d) <= 0.2])
        self.risk()
        made = self.registry.add(
            model_folder(folder / "model", float(facts.number)), name=NAME, parent=facts.champion
        )
        name = made.version
        self.skills[name], self.deltas[name] = skill + delta, delta
        self.risk()
        return StepReport(passed=True, sentence="drawn", details={"new_model_version": name})

    def evaluate(self, facts: CycleFacts, folder: Path) -> StepReport:
        before, after = self._asked(facts.champion), self._asked(facts.candidate)
        suites = [
            PairedSuite(suite=name, champion=before[name], candidate=after[name]) for name in SIZES
        ]
        earlier = {one: self._asked(one) for one in earlier_champions(self.store, NAME)}
        versions = best_versions(earlier, alpha=0.05)
        anchor = anchor_suites(suites, earlier, versions=versions, champion=facts.champion)
        write_compared(folder, Compared(suites=suites, anchor=anchor))
        self.risk()
        return StepReport(passed=True, sentence="drawn")

    def gate(self, facts: CycleFacts, folder: Path) -> StepReport:
        self.risk()
        return gate_step(facts, self.registry, policy=GatePolicy(degradation_limit=MARGIN))

    def live_test(self, facts: CycleFacts, folder: Path) -> StepReport:
        return self._passes()

    def approve(self, facts: CycleFacts, folder: Path) -> StepReport:
        return approve_step(facts, self.store, is_automatic=self.is_automatic)

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

    def _asked(self, version: str) -> dict[str, np.ndarray]:
        """What a version made of the suites when it was asked first."""
        if version not in self.outcomes:
            draw = np.random.default_rng([int(version, 16), 7])
            self.outcomes[version] = {
                name: (draw.random(size) < self._chances(name, size, version)).astype(float)
                for name, size in SIZES.items()
            }
        return self.outcomes[version]

    def _chances(self, name: str, size: int, version: str) -> np.ndarray:
        base = np.random.default_rng([len(name), size]).uniform(0.3, 0.7, size)
        return base + self.skills[version]

    def _passes(self) -> StepReport:
        self.risk()
        return StepReport(passed=True, sentence="it passes")


def finish_cycle(store: Store, work: DrawnWork, folder: Path, *, number: int) -> CycleResult:
    """The cycle of that number, begun and, however often it breaks or dies, brought to its end."""

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
        except (Killed, StoreLocked) as fault:
            work.seen[type(fault).__name__] += 1
            if open_cycle(store, NAME) is not None:
                continue
            ended = store.cycles(NAME)[number - 1 :]
            if ended:  # it died between its end and telling it
                return CycleResult(**ended[0].payload["result"])
    raise AssertionError("a cycle did not end within 1,000 tries")


def adopted(store: Store, folder: Path) -> tuple[Registry, str]:
    """A registry with a first champion, and its version."""
    registry = Registry(store, folder / "models")
    first = registry.add(model_folder(folder / "first", 0.0), name=NAME)
    registry.adopt(NAME, first.version, reason="first")
    return registry, first.version
