"""Locks that end with the process that holds them, and who that is."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from io import TextIOWrapper
from pathlib import Path
from typing import Self

__all__ = ["Holder", "holder_of", "take_lock", "try_lock"]


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Which process holds a lock.

    Attributes:
        pid: on its machine.
        host: name of that machine.
        since: when it took the lock, by that machine's clock.
    """

    pid: int
    host: str
    since: str

    @classmethod
    def this_process(cls) -> Self:
        """Of a lock that is taken now."""
        now = datetime.now(tz=UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return cls(pid=os.getpid(), host=socket.gethostname(), since=now)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


def try_lock(descriptor: int) -> bool:
    """Lock an open file until it is closed; False if another process has."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def take_lock(file: TextIOWrapper) -> bool:
    """Lock a file that is open for appending, and write in it who did; False if it is locked."""
    if not try_lock(file.fileno()):
        return False
    file.truncate(0)
    file.write(json.dumps(asdict(Holder.this_process())))
    file.flush()
    return True


def holder_of(path: Path) -> Holder | None:
    """Who took a lock last; None if nobody wrote it down, or is about to."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
