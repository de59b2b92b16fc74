"""Cycles of continual learning whose steps are scripted, so that only their order is at work."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gmpo.continual import ControllerSettings, CycleWaits, run_cycle
from gmpo.continual.records import CycleFacts, CycleResult, StepReport
from gmpo.errors import ChampionMoved, LeaseHeld
from gmpo.store import ModelVersion, Store, open_store

NAME = "bot"
START = "v0"


def begin_champion(store: Store) -> None:
    """A first version that serves."""
    store.put_model_version(version(START, parent=None))
    store.set_champion(NAME, expected=None, version=START, reason={"why": "first"})


def version(digest: str, *, parent: str | None) -> ModelVersion:
    return ModelVersion(
        version=digest,
        created=0.0,
        name=NAME,
        path=f"/models/{digest}",
        parent=parent,
        lineage={},
        metrics={},
    )


@dataclass(kw_only=True)
class ScriptedWork:
    """Steps that pass unless they are named; the champion's changes are real.

    Attributes:
        store: of the champion.
        fails: steps that do not pass.
        during: called in the middle of each step, with its name.
        waits: whether nobody has decided yet.
        done: names of the steps' bodies that came to their end, in order.
    """

    store: Store
    fails: frozenset[str] = frozenset()
    during: Callable[[str], None] = lambda _: None
    waits: bool = False
    done: list[str] = field(default_factory=list)

    def validate(self, facts: CycleFacts, folder: Path) -> StepReport:
        return self._plain("validate", folder)

    def small_update(self, facts: CycleFacts, folder: Path) -> StepReport:
        return self._plain("small_update", folder, {"stability_metrics": {"alarms": 1}})

    def safety_test(self, facts: CycleFacts, folder: Path) -> StepReport:
        return self._plain("safety_test", folder)

    def update(self, facts: CycleFacts, folder: Path) -> StepReport:
        candidate = f"v{facts.number}"
        self.store.put_model_version(version(candidate, parent=facts.champion))
        return self._plain(
            "update",
            folder,
            {"new_model_version": candidate, "stability_metrics": {"alarms": 0}},
        )

    def evaluate(self, facts: CycleFacts, folder: Path) -> StepReport:
        return self._plain("evaluate", folder)

    def gate(self, facts: CycleFacts, folder: Path) -> StepReport:
        return self._plain("gate", folder, {"performance_improvement": 0.03})

    def live_test(self, facts: CycleFacts, folder: Path) -> StepReport:
        return self._plain("live_test", folder)

    def approve(self, facts: CycleFacts, folder: Path) -> StepReport:
        if self.waits:
            raise CycleWaits(f"version {facts.candidate} waits for a person")
        return self._plain("approve", folder)

    def promote(self, facts: CycleFacts, folder: Path) -> StepReport:
        self._change(facts, before=facts.champion, after=facts.candidate, changes_before=0)
        return self._plain("promote", folder)

    def watch(self, facts: CycleFacts, folder: Path) -> StepReport:
        return self._plain("watch", folder)

    def roll_back(self, facts: CycleFacts, folder: Path) -> StepReport:
        self._change(facts, before=facts.candidate, after=facts.champion, changes_before=1)
        return self._plain("roll_back", folder)

    def _change(self, facts: CycleFacts, *, before: str, after: str, changes_before: int) -> None:
        """Set the champion, unless a killed process has done so already."""
        history = self.store.champion_history(NAME)
        if len(history) > facts.champion_revision + changes_before:
            return
        self.store.set_champion(NAME, expected=before, version=after, reason={"why": "cycle"})

    def _plain(
        self, step: str, folder: Path, details: Mapping[str, object] | None = None
    ) -> StepReport:
        (folder / "half").write_text("half of the work")
        self.during(step)
        (folder / "whole").write_text("all of it")
        self.done.append(step)
        return StepReport(
            passed=step not in self.fails, sentence=f"{step} is over", details=details or {}
        )


def run(store: Store, work: ScriptedWork, folder: Path, **settings) -> CycleResult:
    """A cycle by these steps."""
    return run_cycle(
        store,
        NAME,
        work,
        folder=folder,
        request=lambda: {"data": "new.jsonl"},
        settings=ControllerSettings(**settings),
    )


def run_and_die(url: str, folder: str, fails: list[str], step: str, moment: str) -> None:
    """Run a cycle in this process, which kills itself at that moment of that step; no step, none.

    Moments: "begins", "during", "written", "moved".
    """

    def die_at(found_step: str, found_moment: str) -> None:
        if (found_step, found_moment) == (step, moment):
            os.kill(os.getpid(), signal.SIGKILL)

    with open_store(url) as store:
        work = ScriptedWork(
            store=store,
            fails=frozenset(fails),
            during=lambda found_step: die_at(found_step, "during"),
        )
        result = run(
            store,
            work,
            Path(folder),
            lease_seconds=0.3,
            patience_seconds=10.0,
            tell=lambda found_step, found_moment, _: die_at(found_step, found_moment),
        )
    (Path(folder) / "result.json").write_text(json.dumps(result.as_dict()))


def race(url: str, folder: str, number: int) -> None:
    """Run a cycle of slow steps, or write down who runs it."""
    with open_store(url) as store:
        work = ScriptedWork(store=store, during=lambda _: time.sleep(0.1))
        try:
            result = run(store, work, Path(folder), holder=f"controller-{number}")
            said = {"won": True, "outcome": result.outcome}
        except LeaseHeld as error:
            said = {"won": False, "holder": error.holder, "message": str(error)}
        except ChampionMoved as error:
            said = {"won": True, "outcome": str(error)}
    (Path(folder) / f"{number}.json").write_text(json.dumps(said))
