"""A long-lived process that holds one model and answers requests, one JSON line each."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.options import BenchmarkError

REPOSITORY = Path(__file__).resolve().parents[1]
LOG_LINES = 25

Command = Callable[..., dict[str, Any]]


class WorkerFailed(BenchmarkError):
    """A worker ended where an answer was due."""


class TookTooLong(WorkerFailed):
    """A worker was ended because it had not answered in time."""


class Worker:
    """A module of this folder, run as a process of its own.

    Only one worker computes at a time, because `ask` waits for the answer.

    Args:
        module: e.g. "benchmarks.trl_side"; its `main` calls `serve`.
        settings: first argument of the module, as JSON.
    """

    def __init__(self, module: str, settings: Mapping[str, Any]) -> None:
        self.module = module
        self._log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 - closed with the worker
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=REPOSITORY,
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"},
        )

    def ask(self, command: str, *, within: float | None = None, **arguments: Any) -> dict[str, Any]:
        """The command's answer.

        Args:
            command: a name.
            within: seconds after which the process is ended unless it has answered; None waits.
            arguments: of the command.

        Raises:
            TookTooLong: it did not answer in time.
            WorkerFailed: the process ended; the end of its log is in the message.
        """
        if within is None:
            return self._ask(command, arguments)
        was_late = threading.Event()

        def end() -> None:
            was_late.set()
            self._process.kill()

        timer = threading.Timer(within, end)
        timer.start()
        try:
            return self._ask(command, arguments)
        except WorkerFailed as failure:
            if not was_late.is_set():
                raise
            raise TookTooLong(
                f"{self.module} had not answered {command!r} after {within:.0f} s and was ended"
            ) from failure
        finally:
            timer.cancel()

    def _ask(self, command: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerFailed(self._obituary(command))
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process: its input ends."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended, and what it was sent is of no use
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _obituary(self, command: str) -> str:
        code = self._process.wait()
        if code == -signal.SIGKILL:  # its log says nothing about it
            return f"{self.module} was killed at {command!r}, as where memory runs out"
        self._log.seek(0)
        last = "".join(self._log.readlines()[-LOG_LINES:])
        return f"{self.module} ended with exit code {code} at {command!r}; its log ends:\n{last}"


def serve(commands: Mapping[str, Command]) -> None:
    """Answer requests from the input until it ends.

    Every module also answers "give_back", which returns freed memory to the system.

    A command that raises ends the process, and the parent shows the traceback.
    """
    commands = {**commands, "give_back": give_back}
    # Libraries print as they like; the answers get a channel of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        answer = commands[request.pop("command")](**request)
        print(json.dumps(answer), file=answers, flush=True)


def give_back() -> dict[str, Any]:
    """Return freed memory of the host to the system, so that another process can have it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return {}


def forget_peak_memory() -> None:
    """Start a new measurement of the peak, with what was freed given back to the system."""
    give_back()
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory_gib() -> float:
    """Largest resident memory since `forget_peak_memory`."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, "Linux says the peak"
    return int(found[1]) / 2**20
