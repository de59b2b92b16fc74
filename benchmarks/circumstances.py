"""Under which circumstances figures were measured: machine, load, versions, commit."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gmpo.kernels.library import build

REPOSITORY = Path(__file__).resolve().parents[1]
UNITS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
BUSY_LOAD = 0.5
"""Runnable processes, one-minute mean, from which on a warning is printed."""


def circumstances(*packages: str) -> dict[str, Any]:
    """Processor, cores, load, versions of Python and the named packages, and gmpo's commit."""
    return {
        "processor": str(processor()),
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


@dataclass(frozen=True, kw_only=True)
class Processor:
    """What the kernel's list says of a processor.

    Attributes:
        name: the maker's.
        family: and `model`, by which processors of one name are told apart; "" if not known.
        model: within the family.
        units: vectors and products that it has, of `UNITS`.
    """

    name: str
    family: str
    model: str
    units: tuple[str, ...]

    def __str__(self) -> str:
        bf16 = [unit for unit in self.units if unit.endswith("bf16")]
        return f"{self.name} ({', '.join(bf16) or 'no bf16 units'})"

    def as_dict(self) -> dict[str, Any]:
        """As results files hold it."""
        return {
            "processor": self.name,
            "processor_family": f"{self.family}/{self.model}",
            **{unit: unit in self.units for unit in UNITS},
        }


def processor(cpuinfo: str | None = None) -> Processor:
    """This machine's, or that of a text as `/proc/cpuinfo` has it."""
    if cpuinfo is None:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    fields = dict(line.split(":", 1) for line in cpuinfo.splitlines() if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    flags = named.get("flags", "").split()
    return Processor(
        name=named.get("model name", platform.machine()),
        family=named.get("cpu family", ""),
        model=named.get("model", ""),
        units=tuple(unit for unit in UNITS if unit in flags),
    )


def commit() -> str:
    """The checked-out commit, with "+" where files differ from it; "unknown" outside a clone."""
    head = git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return "unknown"
    return head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def changes() -> str | None:
    """A digest of how files of the repository differ from the commit; None where they do not.

    Two commits with "+" may be of different files.
    """
    if not commit().endswith("+"):
        return None
    text = git("diff", "HEAD") or ""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def git(*arguments: str) -> str | None:
    done = subprocess.run(
        ["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else None
