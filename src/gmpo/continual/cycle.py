"""A cycle, taken through its steps by whoever holds its lease, also after a process was killed.

It is a state machine in the store. Each step writes what it found into a folder that appears
whole, by a rename, and only then does the cycle move to the next step, if its lease is still held
and nobody else moved it. So a process may be killed anywhere: the next one finds the finished
step's folder, or does the step again, and goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from gmpo.continual.lease import HeldLease, held_lease, new_holder
from gmpo.continual.records import (
    ROLL_BACK,
    STEPS,
    CycleFacts,
    CycleResult,
    Outcome,
    StepReport,
    facts_of,
    result_of,
)
from gmpo.errors import ConfigError, RunFolderError, RunStopped, StoreError
from gmpo.flushing import move_whole
from gmpo.store import Champion, Cycle, Store

__all__ = [
    "ControllerSettings",
    "CycleWaits",
    "CycleWork",
    "Moment",
    "abandon_cycle",
    "learning_champion",
    "lease_name",
    "open_cycle",
    "run_cycle",
]

_REPORT = "report.json"

Moment = Literal["begins", "written", "moved"]
"""Of a step: it begins, its folder is there, the cycle has moved past it."""

_Step = Callable[[CycleFacts, Path], StepReport]
_Tell = Callable[[str, Moment, StepReport | None], None]


class CycleWaits(Exception):
    """A step cannot be done yet, because a person has to decide; the message says what."""


class CycleWork(Protocol):
    """What the steps of a cycle do. All take what is known of the cycle, and a folder of their own.

    A step may be called again after its process was killed, with a folder that holds what the
    killed one left, so it goes on from there or begins anew. What it changes outside the folder it
    must find changed and leave alone the second time. A report that did not pass ends the cycle,
    except that of `watch`, which is followed by `roll_back`.

    Keys of the reports' details that the result is made of: `new_model_version` (update),
    `stability_metrics` (update; small_update where the cycle ends before it),
    `performance_improvement` (gate).
    """

    def validate(self, facts: CycleFacts, folder: Path) -> StepReport:
        """Check the new data and keep what may be trained on."""
        ...

    def small_update(self, facts: CycleFacts, folder: Path) -> StepReport:
        """Train a little on a small part of the data."""
        ...

    def safety_test(self, facts: CycleFacts, folder: Path) -> StepReport:
        """Ask what the small update made of the model."""
        ...

    def update(self, facts: CycleFacts, folder: Path) -> StepReport:
        """Train the candidate from the champion, on new and earlier data."""
        ...

    def evaluate(self, facts: CycleFacts, folder: Path) -> StepReport:
        """Ask champion and candidate the items of new and old tasks."""
        ...

    def gate(self, facts: CycleFacts, folder: Path) -> StepReport:
        """Decide whether the candidate may be released."""
        ...

    def live_test(self, facts: CycleFacts, folder: Path) -> StepReport:
        """Hold the candidate against the champion on live traffic."""
        ...

    def approve(self, facts: CycleFacts, folder: Path) -> StepReport:
        """Ask a person, where one is wanted.

        Raises:
            CycleWaits: nobody has decided yet.
        """
        ...

    def promote(self, facts: CycleFacts, folder: Path) -> StepReport:
        """Make the candidate the champion."""
        ...

    def watch(self, facts: CycleFacts, folder: Path) -> StepReport:
        """See how the new champion does where it serves."""
        ...

    def roll_back(self, facts: CycleFacts, folder: Path) -> StepReport:
        """Make the old champion serve again."""
        ...


@dataclass(frozen=True, kw_only=True)
class ControllerSettings:
    """How cycles are run.

    Attributes:
        holder: of the lease: no two processes may have one name.
        lease_seconds: how long the lease outlives a process that was killed.
        patience_seconds: how long to wait for a lease that another process holds.
        goes_on: told an unfinished cycle before it goes on, under the lease.
        tell: told a step, its moment, and its report once there is one.
        should_stop: asked between steps; once it says so, the next call goes on from there.
        warn: told in one sentence what is not as expected and does no harm.
    """

    holder: str = field(default_factory=new_holder)
    lease_seconds: float = 30.0
    patience_seconds: float = 0.0
    goes_on: Callable[[Cycle], None] = lambda _: None
    tell: _Tell = lambda *_: None
    should_stop: Callable[[], bool] = lambda: False
    warn: Callable[[str], None] = lambda _: None

    def held(self, store: Store, name: str) -> AbstractContextManager[HeldLease]:
        """The lease of a model's cycles, held while the block runs."""
        return held_lease(
            store,
            lease_name(name),
            holder=self.holder,
            seconds=self.lease_seconds,
            patience_seconds=self.patience_seconds,
            warn=self.warn,
        )


def lease_name(name: str) -> str:
    """Of the lease under which a model's cycles run."""
    return f"learn/{name}"


def open_cycle(store: Store, name: str) -> Cycle | None:
    """The model's cycle that goes on, or None."""
    return next(iter(store.cycles(name, open_only=True)), None)


def run_cycle(
    store: Store,
    name: str,
    work: CycleWork,
    *,
    folder: Path,
    request: Callable[[], Mapping[str, Any]],
    settings: ControllerSettings | None = None,
) -> CycleResult:
    """Bring the model's unfinished cycle to its end, or begin one and do so.

    Args:
        store: holds the cycles and the champion.
        name: of the model.
        work: what the steps do.
        folder: of all cycles of this model; each has a folder in it.
        request: what a new cycle is to do, JSON; asked under the lease, so that no other process
            begins a cycle meanwhile, and not where an unfinished one goes on. What it raises is
            raised, and no cycle begins.
        settings: of the lease, and who is told.

    Returns:
        What became of the cycle; its outcome is "waiting" where a person has to decide, and the
        next call goes on.

    Raises:
        LeaseHeld: another process runs this model's cycles, or took over from this one.
        CycleMoved: another process moved the cycle.
        ConfigError: the model has no champion to learn from.
        RunStopped: it was asked to stop; the next call goes on.
        gmpo.errors.GmpoError: a step could not be done; the next call tries it again.
    """
    settings = settings or ControllerSettings()
    with settings.held(store, name) as lease:
        cycle = open_cycle(store, name)
        if cycle is None:
            payload = {"request": dict(request()), "reports": {}, **_champion(store, name)}
            cycle = store.begin_cycle(name, state=STEPS[0], payload=payload, lease=lease.lease)
        else:
            settings.goes_on(cycle)
        controller = _Controller(
            store=store, work=work, lease=lease, folder=folder, settings=settings
        )
        return controller.finish(cycle)


def abandon_cycle(
    store: Store, name: str, *, reason: str, settings: ControllerSettings | None = None
) -> CycleResult | None:
    """End the model's unfinished cycle where it is; None if there is none.

    Raises:
        ConfigError: its candidate may serve already, so that the cycle has to be run to its end.
        LeaseHeld: a process runs the cycle.
    """
    settings = settings or ControllerSettings()
    with settings.held(store, name) as lease:
        cycle = open_cycle(store, name)
        if cycle is None:
            return None
        if _is_promoted_already(store, cycle):
            raise ConfigError(
                f"cycle {cycle.number} of {name!r} waits for approval, and its candidate serves "
                "already, because somebody promoted it; run the cycle to its end, so that it is "
                "watched"
            )
        if cycle.state in ("promote", "watch", ROLL_BACK):
            raise ConfigError(
                f"cycle {cycle.number} of {name!r} is at {cycle.state!r}, where its candidate may "
                "serve already; run the cycle to its end"
            )
        result = result_of(
            cycle, outcome="abandoned", reason="Abandoned", sentence=f"abandoned: {reason}"
        )
        payload = {**cycle.payload, "result": result.as_dict()}
        store.move_cycle(cycle, state="abandoned", payload=payload, ends=True, lease=lease.lease)
        return result


def _is_promoted_already(store: Store, cycle: Cycle) -> bool:
    """Whether a person promoted the candidate that waits for approval."""
    champion = store.champion(cycle.name)
    if cycle.state != "approve" or champion is None:
        return False
    return champion.version == facts_of(cycle, folder=Path()).candidate


def learning_champion(store: Store, name: str) -> Champion:
    """The champion that a cycle of the model begins from.

    Raises:
        ConfigError: it has none; what to do is named.
    """
    champion = store.champion(name)
    if champion is not None:
        return champion
    versions = store.model_versions(name)
    digits = versions[-1].version[:8] if versions else "VERSION"
    first = "" if versions else f"gmpo registry add MODEL --name {name} --store STORE, then "
    others = sorted({version.name for version in store.model_versions()} - {name})
    known = f"; other models of this store: {', '.join(others)}" if others else ""
    raise ConfigError(
        f"model {name!r} has no champion to learn from; make a first version one: {first}"
        f"gmpo registry adopt {name} {digits} --store STORE{known}"
    )


def _champion(store: Store, name: str) -> dict[str, Any]:
    champion = learning_champion(store, name)
    return {"champion": champion.version, "champion_revision": champion.revision}


@dataclass(frozen=True, kw_only=True)
class _Controller:
    """Moves one cycle."""

    store: Store
    work: CycleWork
    lease: HeldLease
    folder: Path
    settings: ControllerSettings

    def finish(self, cycle: Cycle) -> CycleResult:
        """Do the steps that are left."""
        while True:
            if self.settings.should_stop():
                raise RunStopped(
                    f"cycle {cycle.number} of {cycle.name!r} was stopped before "
                    f"{cycle.state!r}; give the same command again to go on"
                )
            self.lease.require()
            step = cycle.state
            self.settings.tell(step, "begins", None)
            try:
                report = self._report(step, facts_of(cycle, folder=self.folder))
            except CycleWaits as waits:
                return result_of(cycle, outcome="waiting", sentence=str(waits))
            self.settings.tell(step, "written", report)
            cycle = self._moved(cycle, step, report)
            self.settings.tell(step, "moved", report)
            if cycle.ended is not None:
                return CycleResult(**cycle.payload["result"])

    def _report(self, step: str, facts: CycleFacts) -> StepReport:
        """What a step found: as its folder says, or by doing it."""
        kept = facts.files(step)
        if (kept / _REPORT).is_file():
            return _read(kept / _REPORT)
        partial = facts.folder / f"{step}.partial"
        try:
            partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(
                f"cycle folder {partial} cannot be made: {error.strerror}; free space or mend its "
                "rights, then give the same command again"
            ) from None
        report = self._steps()[step](facts, partial)
        _keep(report, partial, kept)
        return report

    def _steps(self) -> Mapping[str, _Step]:
        work = self.work
        return {
            "validate": work.validate,
            "small_update": work.small_update,
            "safety_test": work.safety_test,
            "update": work.update,
            "evaluate": work.evaluate,
            "gate": work.gate,
            "live_test": work.live_test,
            "approve": work.approve,
            "promote": work.promote,
            "watch": work.watch,
            ROLL_BACK: work.roll_back,
        }

    def _moved(self, cycle: Cycle, step: str, report: StepReport) -> Cycle:
        """The cycle with that report, at the step that follows or at its end."""
        told = {**cycle.payload["reports"], step: report.as_dict()}
        payload = {**cycle.payload, "reports": told}
        state, outcome = _next(step, report)
        if outcome is not None:
            reported = Cycle(**{**vars(cycle), "payload": payload})
            payload["result"] = result_of(reported, outcome=outcome).as_dict()
        return self.store.move_cycle(
            cycle,
            state=state,
            payload=payload,
            ends=outcome is not None,
            lease=self.lease.lease,
        )


def _next(step: str, report: StepReport) -> tuple[str, Outcome | None]:
    """The state after a step, and what became of the cycle if that is its end."""
    if step == ROLL_BACK:
        return "rolled_back", "rolled_back"
    if step == "watch":
        return ("promoted", "promoted") if report.passed else (ROLL_BACK, None)
    if not report.passed:
        return "refused", "refused"
    return STEPS[STEPS.index(step) + 1], None


def _keep(report: StepReport, partial: Path, kept: Path) -> None:
    """Write the report and give the step's folder its name, so that it is there whole or not."""
    try:
        told = json.dumps(report.as_dict(), allow_nan=False)
        (partial / _REPORT).write_text(told, encoding="utf-8")
        # What the step wrote beside its report is what the next steps go by.
        move_whole(partial, kept)
    except OSError as error:
        raise RunFolderError(
            f"cycle folder {kept} cannot be written: {error.strerror}; free space, then give the "
            "same command again"
        ) from None


def _read(path: Path) -> StepReport:
    try:
        return StepReport(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise StoreError(
            f"report {path} cannot be read: {error}; remove its folder, then give the same command "
            "again, and the step is done anew"
        ) from None
