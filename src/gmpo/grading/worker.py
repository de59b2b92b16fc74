"""A process of its own for what may hang: it is asked by a line of JSON, and can be killed.

A model can write `9^{9^9}`, and nothing inside a process surely stops what that sets off.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import IO, Any, Literal

from gmpo.errors import GmpoError

__all__ = ["STARTUP_LIMIT_SECONDS", "Worker", "serve"]

STARTUP_LIMIT_SECONDS = 60.0  # for imports, which a busy machine may take long over
_SOFT_LIMIT_SHARE = 0.8  # of the time limit, after which the worker interrupts itself
_LIBRARIES = {"symbolic": "math_verify", "gym": "reasoning_gym"}


class Worker:
    """A running process that serves the `main` of one module of this package.

    A fresh interpreter rather than a fork or multiprocessing's spawn: it inherits no threads or
    locks, does not run the caller's main module, and ends by itself when the caller does.
    """

    def __init__(self, server: Literal["symbolic", "gym"]) -> None:
        start = "import sys; sys.path.insert(0, sys.argv[1]); "
        serve = f"from gmpo.grading import {server}; {server}.main()"
        root = str(Path(__file__).resolve().parents[2])
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", start + serve, root],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            # Some procedural tasks go through sets of texts, whose order is the hash's.
            env={**os.environ, "PYTHONHASHSEED": "0"},
            process_group=0,  # Ctrl-C is for the trainer, which may still need verdicts
        )
        self._replies: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(
            target=_forward_lines, args=(self._process.stdout, self._replies), daemon=True
        )
        self._reader.start()
        self.stop = weakref.finalize(self, _end_process, self._process, self._reader)
        if not self._next_reply(STARTUP_LIMIT_SECONDS):
            self.stop()
            raise GmpoError(
                f"the grading process did not start within {STARTUP_LIMIT_SECONDS:g} s; "
                f"see what `{sys.executable} -c 'import {_LIBRARIES[server]}'` says"
            )

    @property
    def is_alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def ask(self, request: dict[str, Any], limit_seconds: float) -> dict[str, Any] | None:
        """The reply, or None if the time is over; the process is killed if it does not say so."""
        assert self._process.stdin is not None
        soft_limit_seconds = limit_seconds * _SOFT_LIMIT_SHARE
        try:
            self._process.stdin.write(json.dumps([soft_limit_seconds, request]) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            line = ""
        else:
            line = self._next_reply(limit_seconds)
        if not line:
            self.stop()
            return None
        reply: dict[str, Any] | None = json.loads(line)
        return reply

    def _next_reply(self, limit_seconds: float) -> str:
        try:
            return self._replies.get(timeout=limit_seconds)
        except queue.Empty:
            return ""


def _forward_lines(stream: IO[str], replies: queue.Queue[str]) -> None:
    for line in stream:
        replies.put(line)
    replies.put("")  # the process has ended; whoever waits need not wait any longer


def _end_process(process: subprocess.Popen[str], reader: threading.Thread) -> None:
    process.kill()
    process.wait()
    reader.join()
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    process.stdout.close()


class _OutOfTime(BaseException):
    """Not an Exception: libraries catch those, and would call the answer wrong."""


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answer requests until standard input ends; the main loop of a worker process.

    Args:
        answer: the reply to a request; interrupted when the request's time is nearly over.
    """
    was_interrupted = False

    def interrupt(signal_number: int, frame: FrameType | None) -> None:
        nonlocal was_interrupted
        was_interrupted = True
        raise _OutOfTime

    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    sys.stdout = sys.stderr  # what a library prints must not be read as a reply
    has_timer = sys.platform != "win32"  # there, the caller's kill is the only limit
    if has_timer:
        signal.signal(signal.SIGALRM, interrupt)
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        soft_limit_seconds, request = json.loads(line)
        was_interrupted = False
        reply: dict[str, Any] | None = None
        try:
            if has_timer:
                signal.setitimer(signal.ITIMER_REAL, soft_limit_seconds)
            reply = answer(request)
        except _OutOfTime:
            reply = None
        finally:
            if has_timer:
                signal.setitimer(signal.ITIMER_REAL, 0)
        # A library that catches everything would turn the interruption into a verdict.
        reply = None if was_interrupted else reply
        print(json.dumps(reply), file=replies, flush=True)
