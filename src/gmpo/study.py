"""A study's runs: each cell a `gmpo train` run in a process of its own, resumed, never repeated."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from gmpo.errors import RunFolderError, RunStopped, StudyError
from gmpo.recipe import dump_recipe
from gmpo.study_plan import Cell, StudyPlan, load_plan, plan_differences, resolve_plan
from gmpo.tracking import RunFolder, provenance, read_lines

__all__ = [
    "MOST_TRIES",
    "Attempt",
    "attempts",
    "cell_folder",
    "ended_cells",
    "open_study",
    "run_study",
]

_Outcome = Literal["finished", "diverged", "died", "stopped", "refused"]

MOST_TRIES = 3
"""Processes that may die on one cell in one call, before the study goes on without the cell."""

_OUTCOMES: Mapping[int, _Outcome] = {0: "finished", 2: "refused", 3: "diverged", 130: "stopped"}
"""By exit code of `gmpo train`; any other, a signal's among them, is that of a dead process."""

_POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One process of one cell, as `attempts.jsonl` keeps it.

    Attributes:
        cell: name of the cell.
        outcome: "finished" and "diverged" end a cell; a process that "died" is followed by another.
        exit_code: of the process; minus the signal's number if one killed it.
        seconds: that it ran.
        message: what it said last on stderr; empty if it finished.
    """

    cell: str
    outcome: _Outcome
    exit_code: int
    seconds: float
    message: str


def cell_folder(study: Path, cell: Cell) -> Path:
    """The run folder of a cell."""
    return study / "runs" / cell.name


def ended_cells(study: Path) -> dict[str, Attempt]:
    """The cells that have their result, finished or diverged, by name."""
    return {a.cell: a for a in attempts(study) if a.outcome in ("finished", "diverged")}


def attempts(study: Path) -> list[Attempt]:
    """Every process that the study has had, in order of their ends."""
    return [Attempt(**line) for line in read_lines(study, "attempts.jsonl")]


def open_study(study: Path, plan: StudyPlan | None, *, warn: Callable[[str], None]) -> StudyPlan:
    """The plan of the study folder, which is begun if it is new.

    Args:
        study: the folder.
        plan: as asked for; None goes on with the folder's own.
        warn: told in one sentence what is not as expected.

    Raises:
        StudyError: the folder is of another study, which differs in the keys named; or there is
            neither a plan nor a study.
        RunFolderError: the folder cannot be read or written.
    """
    there = load_plan(study)
    if there is None and plan is None:
        raise StudyError(f"{study} holds no study to go on with; name a recipe")
    if there is None:
        assert plan is not None
        if (study / "runs").exists():
            raise StudyError(
                f"{study} holds runs but no study.json; bring it back, or choose another --study"
            )
        resolved = resolve_plan(plan, warn=warn)
        record = {**resolved.as_dict(), "made_with": provenance()}
        RunFolder(study).write_text("study.json", json.dumps(record, indent=1) + "\n")
        return resolved
    differences = plan_differences(there, plan) if plan is not None else []
    if differences:
        raise StudyError(
            f"study folder {study} is of another study; {'; '.join(differences)}. Choose another "
            f"--study folder, or go on with its own plan: gmpo compare --study {study}"
        )
    return there


def run_study(
    study: Path,
    plan: StudyPlan,
    *,
    jobs: int = 1,
    keep_checkpoints: bool = False,
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
        say: told in one sentence what happens.
        should_stop: asked a few times a second; once it says so, running cells save and end.

    Raises:
        RunStopped: `should_stop` said so.
        StudyError: a cell refused to train: each process would; its message is named.
        RunFolderError: another process runs this study.
    """
    folder = RunFolder(study)
    with _only_one(folder):
        ended = ended_cells(study)
        waiting = [cell for cell in plan.cells() if cell.name not in ended]
        if ended:
            say(f"{len(ended)} of {len(plan.arms) * len(plan.seeds)} runs are done already")
        crew = _Crew(folder, plan, say=say, keep_checkpoints=keep_checkpoints)
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
    ) -> None:
        self._folder = folder
        self._plan = plan
        self._say = say
        self._keeps = keep_checkpoints
        self._running: dict[str, _Worker] = {}
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
                if _is_trained_in(cell_folder(self._folder.path, cell)):
                    # Left by a call that was killed: its work counts, so let it finish.
                    if cell.name not in announced:
                        self._say(
                            f"{cell.name} is still trained by an earlier call; waiting for it"
                        )
                        announced.add(cell.name)
                    continue
                waiting.remove(cell)
                self._start(cell)
            time.sleep(_POLL_SECONDS)
            for worker in [w for w in self._running.values() if w.process.poll() is not None]:
                if self._ended(worker):
                    waiting.insert(0, worker.cell)

    def kill(self) -> None:
        """End what is still running at once; a later call goes on from its checkpoints."""
        for worker in self._running.values():
            worker.process.kill()
            worker.process.wait()

    def _start(self, cell: Cell) -> None:
        number = list(self._plan.cells()).index(cell) + 1
        total = len(self._plan.arms) * len(self._plan.seeds)
        self._running[cell.name] = _Worker.start(self._folder.path, cell, self._plan.threads)
        self._say(f"run {number} of {total}: {cell.arm}, seed {cell.seed}")

    def _ended(self, worker: _Worker) -> bool:
        """Write down how a process ended; whether its cell has to be tried again."""
        del self._running[worker.cell.name]
        attempt = worker.attempt()
        self._folder.log_record("attempts.jsonl", asdict(attempt))
        cell = worker.cell
        if attempt.outcome in ("finished", "diverged"):
            run = cell_folder(self._folder.path, cell)
            if not self._keeps:
                for name in ("checkpoints", "rounds"):
                    shutil.rmtree(run / name, ignore_errors=True)
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
            f"{cell.name}'s process died ({_death(attempt.exit_code)}) after {attempt.seconds:.0f} "
            f"s, {deaths} of at most {MOST_TRIES} times; "
            + ("it is started again from its newest checkpoint" if again else "given up for now")
        )
        if not again:
            self.given_up.append(cell.name)
        return again

    def _stop(self) -> None:
        """Let every running process finish its round and save, as Ctrl-C on it would."""
        for worker in self._running.values():
            worker.process.send_signal(signal.SIGINT)
        for worker in self._running.values():
            worker.process.wait()
            attempt = worker.attempt()
            if attempt.outcome == "died":  # before it could listen, and at our own request
                attempt = replace(attempt, outcome="stopped")
            self._folder.log_record("attempts.jsonl", asdict(attempt))
        self._running.clear()
        raise RunStopped(f"the study was stopped; {_go_on(self._folder.path)}")


@dataclass(frozen=True, kw_only=True)
class _Worker:
    """A process that trains one cell."""

    cell: Cell
    process: subprocess.Popen[bytes]
    log: Path
    started: float

    @classmethod
    def start(cls, study: Path, cell: Cell, threads: int) -> _Worker:
        recipe, log = study / "recipes" / f"{cell.name}.toml", study / "logs" / f"{cell.name}.log"
        run = cell_folder(study, cell)
        try:
            for path in (recipe, log):
                path.parent.mkdir(exist_ok=True)
            recipe.write_text(dump_recipe(cell.recipe), encoding="utf-8")
            file = log.open("ab")
        except OSError as error:
            raise RunFolderError(
                f"study folder {study} cannot be written: {error.strerror}; free space, then give "
                "the same command again"
            ) from None
        command = [sys.executable, "-m", "gmpo.cli", "train", recipe, "--run", run, "--no-plots"]
        if (run / "recipe.toml").is_file():
            command.append("--resume")
        with file:
            process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**os.environ, "OMP_NUM_THREADS": str(threads), "NO_COLOR": "1"},
                # Ctrl-C in the terminal is for this process, which passes it on once.
                start_new_session=True,
            )
        return cls(cell=cell, process=process, log=log, started=time.monotonic())

    def attempt(self) -> Attempt:
        """What became of the process, which has ended."""
        code = self.process.returncode
        outcome = _OUTCOMES.get(code, "died")
        return Attempt(
            cell=self.cell.name,
            outcome=outcome,
            exit_code=code,
            seconds=round(time.monotonic() - self.started, 1),
            message="" if outcome == "finished" else _last_line(self.log),
        )


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "it said nothing")
    return last.removeprefix("error: ").strip()


def _death(exit_code: int) -> str:
    if exit_code < 0:
        return signal.Signals(-exit_code).name
    return f"exit code {exit_code}"


def _go_on(study: Path) -> str:
    return f"what is done is kept; go on with: gmpo compare --study {study}"


@contextmanager
def _only_one(folder: RunFolder) -> Iterator[None]:
    """Keep a second process off the study."""
    with (folder.path / ".lock").open("a", encoding="utf-8") as file:
        if not _try_lock(file.fileno()):
            raise RunFolderError(
                f"study {folder.path} is being run by another process; wait for it or stop it"
            )
        yield


def _is_trained_in(run: Path) -> bool:
    """Whether a process holds the run folder."""
    lock = run / ".lock"
    if not lock.exists():
        return False
    with lock.open("a", encoding="utf-8") as file:
        return not _try_lock(file.fileno())


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
