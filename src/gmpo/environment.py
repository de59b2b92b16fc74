"""What this machine and this Python offer: packages, device, precision, memory, default model."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.version import Version

from gmpo.errors import ModelError
from gmpo.kernels.library import build, cache_folder

__all__ = ["QUICK_START_GIB", "Finding", "extras", "faults_of", "findings"]

_GIB = 2**30
_MODEL_BYTES = 600_000_000
"""Room that the default model's dequantised weights want: 540 MB, and a little."""
QUICK_START_GIB = 5.8
"""The quick start's forecast in fp32, as `gmpo train quickstart --dry-run` tells it by part."""
_NOT_FOR_USERS = ("all", "dev")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: its name.
        state: "ok"; "missing", without which the quick start does not run; or "off", which is an
            extra that is not installed.
        said: what was found.
        remedy: what to do about it; empty where nothing is to be done.
    """

    what: str
    state: Literal["ok", "missing", "off"]
    said: str
    remedy: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Fields for JSON."""
        return asdict(self)


def findings() -> Iterator[Finding]:
    """All that can be told without training: packages, machine, default model, extras."""
    yield Finding(what="Python", state="ok", said=platform.python_version())
    packages = _packages()
    yield packages
    if packages.state == "ok":  # what follows imports them
        yield from _machine()
        yield _default_model()
        yield _cache()
        yield _hub()
    for extra, requirements in extras().items():
        faults = faults_of(requirements, extra=extra)
        yield Finding(
            what=f"extra {extra}",
            state="off" if faults else "ok",
            said="; ".join(faults) or "installed",
            remedy=f"pip install 'gmpo[{extra}]'" if faults else "",
        )


def extras() -> dict[str, list[str]]:
    """Requirements of each extra that a user may want, as the installed package names them."""
    names = importlib.metadata.metadata("gmpo").get_all("Provides-Extra") or []
    found: dict[str, list[str]] = {name: [] for name in names if name not in _NOT_FOR_USERS}
    for line in _requirements():
        marker = Requirement(line).marker
        for extra, lines in found.items():
            if marker is not None and "extra" in str(marker) and marker.evaluate({"extra": extra}):
                lines.append(line)
    return found


def faults_of(requirements: Iterable[str], *, extra: str = "") -> list[str]:
    """Which requirements the installed packages do not keep, a phrase each.

    Args:
        requirements: as package metadata has them, e.g. `numpy>=2.0; python_version > "3"`.
        extra: for which markers are evaluated; those of other extras do not count.
    """
    faults = []
    for line in requirements:
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": extra}):
            continue
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            faults.append(f"{wanted.name}{wanted.specifier} is missing")
            continue
        if not wanted.specifier.contains(Version(version), prereleases=True):
            faults.append(f"{wanted.name} is {version}, not {wanted.specifier}")
    return faults


def _requirements() -> list[str]:
    return importlib.metadata.requires("gmpo") or []


def _packages() -> Finding:
    plain = [line for line in _requirements() if "extra" not in str(Requirement(line).marker)]
    faults = faults_of(plain)
    names = ("torch", "transformers")
    if faults:
        remedy = "install gmpo once more: pip install ."
        return Finding(what="packages", state="missing", said="; ".join(faults), remedy=remedy)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    said = f"all {len(plain)} of the plain install; {versions}"
    return Finding(what="packages", state="ok", said=said)


def _machine() -> Iterator[Finding]:
    import torch

    from gmpo.headroom import free_bytes
    from gmpo.policy.load import choose_device, choose_dtype

    said: list[str] = []
    device = choose_device("auto")
    choose_dtype("auto", device=device, warn=said.append)
    threads = f"{torch.get_num_threads()} CPU threads"
    yield Finding(what="device", state="ok", said=f"{'; '.join(said)}; {threads}")
    made = build()
    yield Finding(
        what="kernels",
        state="ok" if made.library is not None else "off",
        said=made.said,
        remedy=""
        if made.library is not None
        else "a C compiler (apt install gcc) makes CPUs faster",
    )
    free = free_bytes(device)
    told = "the system does not say" if free is None else f"{free / _GIB:.1f} GiB free"
    said_of_memory = f"{told}; the quick start may take {QUICK_START_GIB} GiB in all"
    yield Finding(what="memory", state="ok", said=said_of_memory)


def _default_model() -> Finding:
    from gmpo.policy.load import default_model_file

    try:
        file = default_model_file()
    except ModelError as error:
        said, _, remedy = str(error).partition("; run ")
        return Finding(what="default model", state="missing", said=said, remedy=remedy)
    said = f"smollm2-135m, {file.stat().st_size / 1e6:.0f} MB"
    return Finding(what="default model", state="ok", said=said)


def _cache() -> Finding:
    """Where the default model is dequantised to; nothing is written to find out."""
    folder = cache_folder()
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    said = f"{folder}, {free / 1e9:.1f} GB free"
    if there.is_dir() and os.access(there, os.W_OK) and free >= _MODEL_BYTES:
        return Finding(what="cache", state="ok", said=said)
    remedy = "set GMPO_CACHE to a folder that can be written, with 0.6 GB free"
    return Finding(what="cache", state="missing", said=said, remedy=remedy)


def _hub() -> Finding:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    from gmpo.policy.load import known_models

    cached = len(known_models()) - 1
    asked = "never asked, by HF_HUB_OFFLINE" if HF_HUB_OFFLINE else "asked for others"
    said = f"{cached} models in the local cache; the hub is {asked}"
    return Finding(what="hub", state="ok", said=said)
