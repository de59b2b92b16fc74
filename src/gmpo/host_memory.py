"""Bytes that this process holds, bytes that it may still take, and what becomes of freed ones."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from pathlib import Path

__all__ = ["available_bytes", "keep_freed_memory", "peak_resident_bytes", "resident_bytes"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""glibc's names for what `mallopt` sets."""
_KEPT_PIECE = 2**25
"""Larger pieces go back to the system at once; glibc allows no more than these 32 MiB."""
_KEPT_TOTAL = 2**30


def resident_bytes() -> int:
    """Memory of this process now; where the system does not tell, its largest so far."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The most memory that this process has held so far.

    On Linux the `VmHWM` of its status: `getrusage` there counts what the process that started it
    held, if that was more.
    """
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        if "VmHWM" in fields:
            return int(fields["VmHWM"].split()[0]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_bytes(root: Path = Path("/")) -> int | None:
    """Host memory that this process may still take; None where the system does not say (no Linux).

    The smaller of what Linux calls available and what is left of every control group above this
    process; file pages that a group would give back count as left.

    Args:
        root: where `proc` and `sys` are.
    """
    information = root / "proc" / "meminfo"
    if not information.exists():
        return None
    fields = dict(line.split(":") for line in information.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    return min([available, *_left_in_control_groups(root)])


def keep_freed_memory() -> bool:
    """Let this process keep pieces it frees for what it needs next; False where nothing was set.

    A step frees what the one before took. Taken anew from the system, every page of it is cleared
    and mapped again: 12 % of a step's CPU time in bf16 on a processor with AMX (16 rows of 32
    tokens: 1.52 s against 1.34). Only glibc can be told so; what the environment says of its
    thresholds stands.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    if {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & os.environ.keys():
        return False
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if any(f"glibc.malloc.{name}_threshold=" in tunables for name in ("trim", "mmap")):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, _KEPT_PIECE) and mallopt(_M_TRIM_THRESHOLD, _KEPT_TOTAL))


def _left_in_control_groups(root: Path) -> list[int]:
    """Bytes left in each group that has a limit, for both versions of control groups."""
    left = []
    for line in (root / "proc" / "self" / "cgroup").read_text().splitlines():
        _, controllers, place = line.split(":", 2)
        if controllers == "":
            base, names = "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        path = Path(place.lstrip("/"))
        # In a container the path may name a group of the host that is not to be seen in here.
        left += [
            found
            for group in (path, *path.parents)
            if (found := _left_in_group(root / base / group, *names)) is not None
        ]
    return left


def _left_in_group(folder: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    if not (folder / limit).exists():
        return None
    allowed = (folder / limit).read_text().strip()
    if allowed == "max":
        return None
    statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    used = int((folder / usage).read_text()) - int(statistics.get(reclaimable, 0))
    return max(0, int(allowed) - used)
