"""`python -m gmpo.leash PROCESS SIGNAL ARGUMENTS`: a gmpo command that does not outlive a process.

A server or a training run that a killed controller left behind would hold its memory for ever or
for hours, a server its port, and a run the folder that the next controller goes on in.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["end_process", "end_with_parent", "leashed", "main"]

_SET_DEATH_SIGNAL = 1
_CANNOT = 2


def leashed(arguments: Sequence[str | Path], *, ended_by: signal.Signals) -> list[str]:
    """The command line of a gmpo command that Linux ends when this process is gone.

    The thread that starts it has to live as long as the command is wanted: the kernel takes that
    thread's end for its parent's.

    Args:
        arguments: of `gmpo`.
        ended_by: signal that ends it.
    """
    leash = [sys.executable, "-m", "gmpo.leash", str(os.getpid()), str(ended_by.value)]
    return [*leash, *map(str, arguments)]


def end_process(process: subprocess.Popen[Any], *, seconds: float = 60.0) -> None:
    """Ask a process to end, kill it if it does not within so many seconds, and wait for it."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def end_with_parent(number: int) -> None:
    """Have Linux send this process that signal when the one that began it is gone."""
    if sys.platform != "linux":
        return
    if ctypes.CDLL(None, use_errno=True).prctl(_SET_DEATH_SIGNAL, number):
        print(f"error: prctl: {os.strerror(ctypes.get_errno())}", file=sys.stderr)
        sys.exit(_CANNOT)


def main() -> None:
    """Become the command; Linux sends it that signal when the process that began it is gone.

    The kernel keeps that promise over `exec`. Elsewhere nothing is promised.
    """
    parent, number, arguments = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    end_with_parent(number)
    if sys.platform == "linux" and os.getppid() != parent:  # it was gone before
        sys.exit(_CANNOT)
    os.execv(sys.executable, [sys.executable, "-m", "gmpo.cli", *arguments])


if __name__ == "__main__":
    main()
