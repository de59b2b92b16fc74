"""math-verify in a process of its own, which can be killed.

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
from pathlib import Path
from types import FrameType
from typing import IO

from gmpo.errors import GmpoError

__all__ = ["Worker", "serve"]

_STARTUP_LIMIT_SECONDS = 60.0
_SOFT_LIMIT_SHARE = 0.8  # of the time limit, after which the worker interrupts itself


class Worker:
    """A running math-verify process, asked by a line of JSON on its standard input.

    A fresh interpreter rather than a fork or multiprocessing's spawn: it inherits no threads or
    locks, does not run the caller's main module, and ends by itself when the caller does.
    """

    def __init__(self, time_limit_seconds: float) -> None:
        self._time_limit_seconds = time_limit_seconds
        start = "import sys; sys.path.insert(0, sys.argv[1]); from gmpo.grading import worker; "
        serve = f"worker.serve({time_limit_seconds * _SOFT_LIMIT_SHARE})"
        root = str(Path(__file__).resolve().parents[2])
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", start + serve, root],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            process_group=0,  # Ctrl-C is for the trainer, which may still need verdicts
        )
        self._replies: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(
            target=_forward_lines, args=(self._process.stdout, self._replies), daemon=True
        )
        self._reader.start()
        self.stop = weakref.finalize(self, _end_process, self._process, self._reader)
        if not self._next_reply(_STARTUP_LIMIT_SECONDS):
            self.stop()
            raise GmpoError(
                f"the grading process did not start within {_STARTUP_LIMIT_SECONDS:g} s; "
                f"see what `{sys.executable} -c 'import math_verify'` says"
            )

    @property
    def is_alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def ask(self, request: dict[str, object]) -> dict[str, bool | None] | None:
        """The reply, or None if the process ended or the time is over."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        line = self._next_reply(self._time_limit_seconds)
        reply: dict[str, bool | None] | None = json.loads(line) if line else None
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
    """Not an Exception: math-verify catches those and would call the answer wrong."""


def serve(soft_limit_seconds: float) -> None:
    """Answer requests until standard input ends; the main function of the worker process."""
    import math_verify

    def interrupt(signal_number: int, frame: FrameType | None) -> None:
        raise _OutOfTime

    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    sys.stdout = sys.stderr  # what a library prints must not be read as a reply
    has_timer = sys.platform != "win32"  # there, the caller's kill is the only limit
    if has_timer:
        signal.signal(signal.SIGALRM, interrupt)
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        is_equal: bool | None = None
        try:
            if has_timer:
                signal.setitimer(signal.ITIMER_REAL, soft_limit_seconds)
            answer = math_verify.parse(_as_math(request["answer"]), parsing_timeout=None)
            is_equal = any(
                math_verify.verify(
                    math_verify.parse(_as_math(reference), parsing_timeout=None),
                    answer,
                    timeout_seconds=None,
                )
                for reference in request["references"]
            )
        except _OutOfTime:
            is_equal = None
        finally:
            if has_timer:
                signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps({"is_equal": is_equal}), file=replies, flush=True)


def _as_math(text: str) -> str:
    return text if "$" in text or "\\boxed" in text else f"${text}$"
