"""`python -m gmpo.leash PROCESS ARGUMENTS`: a gmpo command that does not outlive another process.

A server that a killed controller left behind would hold its memory, and its port, for ever.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

__all__ = ["main"]

_SET_DEATH_SIGNAL = 1
_CANNOT = 2


def main() -> None:
    """Become the command; Linux ends it by SIGTERM when the process that began it is gone.

    The kernel keeps that promise over `exec`. Elsewhere nothing is promised.
    """
    parent, arguments = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        if ctypes.CDLL(None, use_errno=True).prctl(_SET_DEATH_SIGNAL, signal.SIGTERM):
            print(f"error: prctl: {os.strerror(ctypes.get_errno())}", file=sys.stderr)
            sys.exit(_CANNOT)
        if os.getppid() != parent:  # it was gone before the promise was made
            sys.exit(_CANNOT)
    os.execv(sys.executable, [sys.executable, "-m", "gmpo.cli", *arguments])


if __name__ == "__main__":
    main()
