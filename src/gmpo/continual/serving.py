"""A model version served by a process of its own for as long as a step needs it."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from gmpo.errors import ServerUnreachable
from gmpo.leash import end_process, leashed
from gmpo.shared_cores import sharing_cores

__all__ = ["served_process"]

_KEPT_LINES = 20


@contextmanager
def served_process(
    model: str,
    *,
    arguments: Sequence[str] = (),
    threads: int,
    seconds: float,
    shares_cores: bool = True,
    what: str | None = None,
) -> Iterator[str]:
    """`gmpo serve` on a free port of this machine, and its base URL.

    It ends with the block, and on Linux with this process too, however that ends.

    Args:
        model: folder or name.
        arguments: more of the command's options.
        threads: CPU threads.
        seconds: longest wait until it serves.
        shares_cores: whether its threads leave the cores to other processes while they wait.
        what: how an error names it; by default the server of the model.

    Raises:
        ServerUnreachable: it does not serve within that time, or ends; its last line is told.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "NO_COLOR": "1"}
    process = subprocess.Popen(
        # Nobody waits for the answers in flight any more, but the store is closed properly.
        leashed(["serve", model, "--port", "0", *arguments], ended_by=signal.SIGTERM),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=sharing_cores(environment) if shares_cores else environment,
        # Ctrl-C in the terminal is for this process, which ends the server itself.
        start_new_session=True,
    )
    said = _Output(process, what or f"the server of {model}")
    try:
        yield said.address(seconds)
    finally:
        end_process(process)
        said.close()


class _Output:
    """Reads what the server says, so that its pipe never fills up."""

    def __init__(self, process: subprocess.Popen[str], what: str) -> None:
        self._process = process
        self._what = what
        self._last: deque[str] = deque(maxlen=_KEPT_LINES)
        self._address: str | None = None
        self._known = threading.Event()
        self._thread = threading.Thread(target=self._read, name="gmpo-server-output", daemon=True)
        self._thread.start()

    def address(self, seconds: float) -> str:
        """Where it serves, once it says so."""
        in_time = self._known.wait(seconds)
        if self._address is not None:
            return self._address
        last = next((line for line in reversed(self._last) if line.strip()), "nothing").strip()
        how = "ended" if in_time else f"was not ready within {seconds:g} seconds"
        raise ServerUnreachable(f"{self._what} {how}; it said last: {last}")

    def close(self) -> None:
        """Wait for the last line."""
        self._thread.join()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._last.append(line)
            if line.startswith("serving ") and self._address is None:
                self._address = line.split()[-1]
                self._known.set()
        self._known.set()
