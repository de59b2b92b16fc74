"""Under which circumstances figures were measured: machine, load, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gmpo.kernels.library import build

REPOSITORY = Path(__file__).resolve().parents[1]
BUSY_LOAD = 0.5
"""Runnable processes, one-minute mean, from which on a warning is printed."""


def circumstances(*packages: str) -> dict[str, Any]:
    """Processor, cores, load, versions of Python and the named packages, and gmpo's commit."""
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "kernels": build().said,
        **{name: version(name) for name in packages},
        "commit": commit(),
    }


def busy_warning(load: float) -> str | None:
    """What to print where other work runs on the machine; None where it is quiet."""
    if load < BUSY_LOAD:
        return None
    return (
        f"warning: {load:.1f} processes were running before the measurement began; times are "
        "longer and scatter more than on a quiet machine, ratios of pairs less so"
    )


def processor() -> str:
    """The processor's name with what matters for matrix products in bf16."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    units = [unit for unit in ("avx512_bf16", "amx_bf16") if unit in named.get("flags", "").split()]
    return f"{named.get('model name', platform.machine())} ({', '.join(units) or 'no bf16 units'})"


def commit() -> str:
    """The checked-out commit, with "+" where files differ from it; "unknown" outside a clone."""
    head = git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return "unknown"
    return head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def git(*arguments: str) -> str | None:
    done = subprocess.run(
        ["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else None
