"""A training run in a process of its own: started or resumed, ended, and what became of it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gmpo.config import RunConfig
from gmpo.errors import RunFolderError
from gmpo.leash import leashed
from gmpo.locks import try_lock
from gmpo.recipe import dump_recipe
from gmpo.tracking import WEIGHTS_REMOVED, RunFolder, read_lines

__all__ = [
    "MOST_TRIES",
    "Attempt",
    "Outcome",
    "RunProcess",
    "attempts",
    "death",
    "drop_weights",
    "is_trained_in",
]

Outcome = Literal["finished", "diverged", "died", "stopped", "refused"]
"""What became of a process."""

MOST_TRIES = 3
"""Processes that may die on one run in one call, before the others go on without it."""

_OUTCOMES: Mapping[int, Outcome] = {0: "finished", 2: "refused", 3: "diverged", 130: "stopped"}
"""By exit code of `gmpo train`; any other, a signal's among them, is that of a dead process."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One process of one run, as `attempts.jsonl` keeps it.

    Attributes:
        cell: name of the run.
        outcome: "finished" and "diverged" end a run; a process that "died" is followed by another.
        exit_code: of the process; minus the signal's number if one killed it.
        seconds: that it ran.
        message: what it said last, after the signal's name if one killed it; empty if it finished.
    """

    cell: str
    outcome: Outcome
    exit_code: int
    seconds: float
    message: str


def attempts(folder: Path) -> list[Attempt]:
    """Every process that runs below a folder have had, in order of their ends."""
    return [Attempt(**line) for line in read_lines(folder, "attempts.jsonl")]


@dataclass(frozen=True, kw_only=True)
class RunProcess:
    """A process that trains one run.

    Attributes:
        name: of the run.
        process: that trains.
        log: file of its output.
        started: by the monotonic clock, in seconds.
    """

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    started: float

    @classmethod
    def start(
        cls, folder: Path, name: str, recipe: RunConfig, *, run: Path, threads: int
    ) -> RunProcess:
        """Begin a run, or go on with it if its folder has been begun.

        On Linux it ends with the thread that began it, however that ends.

        Args:
            folder: its recipe goes to FOLDER/recipes, its output to FOLDER/logs.
            name: of the run.
            recipe: that is trained.
            run: folder of the run.
            threads: CPU threads.

        Raises:
            RunFolderError: the folder cannot be written.
        """
        file_name = folder / "recipes" / f"{name}.toml"
        log = folder / "logs" / f"{name}.log"
        try:
            for path in (file_name, log):
                path.parent.mkdir(exist_ok=True)
            file_name.write_text(dump_recipe(recipe), encoding="utf-8")
            output = log.open("ab")
        except OSError as error:
            raise RunFolderError(
                f"study folder {folder} cannot be written: {error.strerror}; free space, then give "
                "the same command again"
            ) from None
        command: list[str | Path] = ["train", file_name, "--run", run, "--no-plots"]
        if (run / "recipe.toml").is_file():
            command.append("--resume")
        with output:
            process = subprocess.Popen(
                # Not SIGTERM, which finishes the round first: the folder's lock would keep the next
                # call waiting for minutes. SIGKILL frees it at once, and resuming is exact.
                leashed(command, ended_by=signal.SIGKILL),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, "OMP_NUM_THREADS": str(threads), "NO_COLOR": "1"},
                # Ctrl-C in the terminal is for this process, which passes it on once.
                start_new_session=True,
            )
        return cls(name=name, process=process, log=log, started=time.monotonic())

    @property
    def has_ended(self) -> bool:
        """Whether the process is gone."""
        return self.process.poll() is not None

    def kill(self) -> None:
        """End it at once; a later process goes on from its checkpoints."""
        self.process.kill()
        self.process.wait()

    def interrupt(self) -> None:
        """Let it finish its round and save, as Ctrl-C on it would."""
        self.process.send_signal(signal.SIGINT)

    def attempt(self) -> Attempt:
        """What became of the process, which has ended."""
        code = self.process.returncode
        outcome = _OUTCOMES.get(code, "died")
        return Attempt(
            cell=self.name,
            outcome=outcome,
            exit_code=code,
            seconds=round(time.monotonic() - self.started, 1),
            message="" if outcome == "finished" else _last_words(self.log, code),
        )


def drop_weights(run: Path, *, why: str) -> None:
    """Remove a run's checkpoints and saved rounds, if there are any; its figures stay.

    Args:
        run: its folder.
        why: in one sentence, and what keeps them: whoever asks for the weights is told.

    Raises:
        RunFolderError: the sentence cannot be written.
    """
    had_weights = (run / "checkpoints").is_dir()
    for name in ("checkpoints", "rounds"):
        shutil.rmtree(run / name, ignore_errors=True)
    if had_weights:
        RunFolder(run).write_text(WEIGHTS_REMOVED, why + "\n")


def death(exit_code: int) -> str:
    """Of what a process died."""
    if exit_code < 0:
        return signal.Signals(-exit_code).name
    return f"exit code {exit_code}"


def is_trained_in(run: Path) -> bool:
    """Whether a process holds the run folder."""
    lock = run / ".lock"
    if not lock.exists():
        return False
    with lock.open("a", encoding="utf-8") as file:
        return not try_lock(file.fileno())


def _last_words(log: Path, exit_code: int) -> str:
    """What a process said last; one that was killed had no words for it, so that is said first."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "it said nothing")
    words = last.removeprefix("error: ").strip()
    return f"killed by {death(exit_code)}; before that: {words}" if exit_code < 0 else words
