"""A study's runs: each cell a `gmpo train` run in a process of its own, resumed, never repeated."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from gmpo.errors import RunFolderError, RunStopped, StudyError
from gmpo.locks import try_lock
from gmpo.run_process import (
    MOST_TRIES,
    Attempt,
    RunProcess,
    attempts,
    death,
    drop_weights,
    is_trained_in,
)
from gmpo.study.fairness import guard_fault
from gmpo.study.plan import (
    Cell,
    StudyPlan,
    load_plan,
    plan_differences,
    refuse_another_study,
    refuse_used_folder,
    resolve_plan,
)
from gmpo.study.wait import WAIT_MINUTES, Held, Patience, signs_of_runs
from gmpo.tracking import RunFolder, provenance

__all__ = ["cell_folder", "ended_cells", "open_study", "patience_of", "run_study"]

_POLL_SECONDS = 0.2
_DROPPED = (
    "a study drops the weights of runs that have ended; gmpo compare --keep-checkpoints with a new "
    "--study folder keeps them"
)


def cell_folder(study: Path, cell: Cell) -> Path:
    """The run folder of a cell."""
    return study / "runs" / cell.name


def ended_cells(study: Path) -> dict[str, Attempt]:
    """The cells that have their result, finished or diverged, by name."""
    return {a.cell: a for a in attempts(study) if a.outcome in ("finished", "diverged")}


def open_study(study: Path, plan: StudyPlan | None, *, warn: Callable[[str], None]) -> StudyPlan:
    """The plan of the study folder, which is begun if it is new, and given more seeds if asked to.

    Args:
        study: the folder.
        plan: as asked for; None goes on with the folder's own. It may have more seeds behind those
            of the folder.
        warn: told in one sentence what is not as expected.

    Raises:
        StudyError: the folder is of another study, which differs in the keys named, or is a run,
            or has a guard that no study may have; or there is neither a plan nor a study.
        RunFolderError: the folder cannot be read or written, or it is given more seeds while
            another process runs it.
    """
    there = load_plan(study)
    if there is None and plan is None:
        raise StudyError(f"{study} holds no study to go on with; name a recipe")
    if there is None:
        assert plan is not None
        refuse_used_folder(study, work="runs", record="study.json")
        resolved = resolve_plan(plan, warn=warn)
        record = {**resolved.as_dict(), "made_with": provenance()}
        folder = RunFolder(study, option="--study")
        folder.write_text("study.json", json.dumps(record, indent=1) + "\n")
        return resolved
    differences = plan_differences(there, plan) if plan is not None else []
    refuse_another_study(study, differences, command="compare")
    fault = guard_fault(there.recipe.guard)
    if fault is not None:  # begun by a version that did not refuse it
        raise StudyError(f"study {study}: {fault}, name the recipe, and another --study folder")
    if plan is None or plan.seeds == there.seeds:
        return there
    return _with_more_seeds(study, plan)


def patience_of(study: Path, *, minutes: float, say: Callable[[str], None]) -> Patience:
    """How long a call waits for runs of a study that an earlier call left to a process.

    Args:
        study: the folder.
        minutes: without a sign of such a run, after which the call gives up; 0 does not wait.
        say: told once a minute for what it waits.
    """
    return Patience(minutes=minutes, say=say, go_on=_go_on(study))


def run_study(  # noqa: PLR0913 - all by keyword but the first two, and each is its own concern
    study: Path,
    plan: StudyPlan,
    *,
    jobs: int = 1,
    keep_checkpoints: bool = False,
    patience: Patience | None = None,
    say: Callable[[str], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[str]:
    """Run every cell that has not ended yet; the names of those that could not be run to an end.

    A cell whose process dies is started again from its newest checkpoint, until `MOST_TRIES`
    processes of one call have died on it. Every end of a process is a line of `attempts.jsonl`.

    Args:
        study: the folder, as `open_study` left it.
        plan: of the folder.
        jobs: processes at a time.
        keep_checkpoints: whether weights and saved rounds of ended cells stay.
        patience: with cells that a process of an earlier call still trains, once nothing else is
            left to do; that of `patience_of` with `WAIT_MINUTES` by default.
        say: told in one sentence what happens.
        should_stop: asked a few times a second; once it says so, running cells save and end.

    Raises:
        RunStopped: `should_stop` said so.
        StudyError: a cell refused to train: each process would; its message is named. Or the plan
            is not the folder's any more.
        StillHeld: a process of an earlier call holds a cell and nothing comes of it.
        RunFolderError: another process runs this study.
    """
    folder = RunFolder(study, option="--study")
    with _only_one(folder):
        _require_own(study, plan)
        ended = ended_cells(study)
        waiting = [cell for cell in plan.cells() if cell.name not in ended]
        if ended:
            say(f"{len(ended)} of {len(plan.arms) * len(plan.seeds)} runs are done already")
        if patience is None:
            patience = patience_of(study, minutes=WAIT_MINUTES, say=say)
        crew = _Crew(folder, plan, say=say, keep_checkpoints=keep_checkpoints, patience=patience)
        try:
            crew.run(waiting, jobs=jobs, should_stop=should_stop)
        finally:
            crew.kill()
    return crew.given_up


class _Crew:
    """The processes that are training, and what became of them."""

    def __init__(
        self,
        folder: RunFolder,
        plan: StudyPlan,
        *,
        say: Callable[[str], None],
        keep_checkpoints: bool,
        patience: Patience,
    ) -> None:
        self._folder = folder
        self._plan = plan
        self._say = say
        self._keeps = keep_checkpoints
        self._patience = patience
        self._cells = {cell.name: cell for cell in plan.cells()}
        self._running: dict[str, RunProcess] = {}
        self._deaths: dict[str, int] = {}
        self.given_up: list[str] = []

    def run(self, waiting: list[Cell], *, jobs: int, should_stop: Callable[[], bool]) -> None:
        """Train the cells, a few at a time."""
        announced: set[str] = set()
        while waiting or self._running:
            if should_stop():
                self._stop()
            for cell in [cell for cell in waiting if len(self._running) < jobs]:
                if len(self._running) >= jobs:
                    break
                if is_trained_in(cell_folder(self._folder.path, cell)):
                    # Left by a call that was killed, where no leash ends it: let it finish.
                    if cell.name not in announced:
                        self._say(
                            f"{cell.name} is still trained by an earlier call; waiting for it"
                        )
                        announced.add(cell.name)
                    continue
                waiting.remove(cell)
                self._start(cell)
            self._patience.wait_for(self._held(waiting))
            time.sleep(_POLL_SECONDS)
            for worker in [w for w in self._running.values() if w.has_ended]:
                if self._ended(worker):
                    waiting.insert(0, self._cells[worker.name])

    def kill(self) -> None:
        """End what is still running at once; a later call goes on from its checkpoints."""
        for worker in self._running.values():
            worker.kill()

    def _held(self, waiting: list[Cell]) -> list[Held]:
        """The cells that other processes train, while this call has nothing else to do."""
        if self._running:
            return []
        study = self._folder.path
        return [
            Held(
                what=f"run {cell.name}",
                holder=None,
                signs=signs_of_runs(study, study / "runs", cell.name),
            )
            for cell in waiting
        ]

    def _start(self, cell: Cell) -> None:
        number = list(self._cells).index(cell.name) + 1
        self._running[cell.name] = RunProcess.start(
            self._folder.path,
            cell.name,
            cell.recipe,
            run=cell_folder(self._folder.path, cell),
            threads=self._plan.threads,
        )
        self._say(f"run {number} of {len(self._cells)}: {cell.arm}, seed {cell.seed}")

    def _ended(self, worker: RunProcess) -> bool:
        """Write down how a process ended; whether its cell has to be tried again."""
        del self._running[worker.name]
        attempt = worker.attempt()
        self._folder.log_record("attempts.jsonl", asdict(attempt))
        cell = self._cells[worker.name]
        if attempt.outcome in ("finished", "diverged"):
            if not self._keeps:
                drop_weights(cell_folder(self._folder.path, cell), why=_DROPPED)
            ended = "" if attempt.outcome == "finished" else f": diverged ({attempt.message})"
            self._say(f"{cell.name} took {attempt.seconds:.0f} s{ended}")
            return False
        if attempt.outcome == "refused":
            raise StudyError(
                f"run {cell.name} cannot be trained: {attempt.message}. Its output is in "
                f"{worker.log}; the other runs are kept"
            )
        if attempt.outcome == "stopped":
            raise RunStopped(f"run {cell.name} was asked to stop; {_go_on(self._folder.path)}")
        deaths = self._deaths[cell.name] = self._deaths.get(cell.name, 0) + 1
        again = deaths < MOST_TRIES
        self._say(
            f"{cell.name}'s process died ({death(attempt.exit_code)}) after {attempt.seconds:.0f} "
            f"s, {deaths} of at most {MOST_TRIES} times; "
            + ("it is started again from its newest checkpoint" if again else "given up for now")
        )
        if not again:
            self.given_up.append(cell.name)
        return again

    def _stop(self) -> None:
        """Let every running process finish its round and save, as Ctrl-C on it would."""
        for worker in self._running.values():
            worker.interrupt()
        for worker in self._running.values():
            worker.process.wait()
            attempt = worker.attempt()
            if attempt.outcome == "died":  # before it could listen, and at our own request
                attempt = replace(attempt, outcome="stopped")
            self._folder.log_record("attempts.jsonl", asdict(attempt))
        self._running.clear()
        raise RunStopped(f"the study was stopped; {_go_on(self._folder.path)}")


def _with_more_seeds(study: Path, asked: StudyPlan) -> StudyPlan:
    """The folder's plan with the seeds asked for, which replaces it in one step."""
    folder = RunFolder(study, option="--study")
    # Nobody runs the study meanwhile: its report would be of a plan that is not there any more.
    with _only_one(folder):
        there = load_plan(study)
        assert there is not None, "it was there a moment ago, and no call removes it"
        refuse_another_study(study, plan_differences(there, asked), command="compare")
        if asked.seeds == there.seeds:
            return there  # another call was faster
        before = there.num_seeds_before
        if (study / "runs").exists():
            before = (*before, len(there.seeds))
        more = replace(there, seeds=asked.seeds, num_seeds_before=before)
        record = json.loads((study / "study.json").read_text(encoding="utf-8"))
        record |= {"seeds": list(more.seeds), "num_seeds_before": list(before)}
        folder.write_text("study.json", json.dumps(record, indent=1) + "\n")
    return more


def _require_own(study: Path, plan: StudyPlan) -> None:
    """Keep a call that read the plan before another one changed it from running the old one."""
    there = load_plan(study)
    if there is None:  # the last comparison of gmpo tune, whose plan is not in the folder
        return
    if there.seeds != plan.seeds or plan_differences(there, plan):
        raise StudyError(
            f"another call changed the plan of study {study} since this one read it; give the same "
            "command again"
        )


def _go_on(study: Path) -> str:
    return f"what is done is kept; go on with: gmpo compare --study {study}"


@contextmanager
def _only_one(folder: RunFolder) -> Iterator[None]:
    """Keep a second process off the study."""
    with (folder.path / ".lock").open("a", encoding="utf-8") as file:
        if not try_lock(file.fileno()):
            raise RunFolderError(
                f"study {folder.path} is being run by another process; wait for it or stop it"
            )
        yield
