"""A benchmark's JSON file: written after every sample, so that an interrupted run goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.circumstances import busy_warning, changes, processor
from benchmarks.devices import device_name
from benchmarks.options import BenchmarkError
from gmpo.tracking import provenance

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def made_with(*, threads: int, device: str = "cpu") -> dict[str, Any]:
    """Machine, device, versions, commit and threads: what must not change within one file."""
    return {
        **made_here(),
        "trl": version("trl"),
        "accelerate": version("accelerate"),
        "threads": threads,
        "device": device_name(device),
    }


def made_here() -> dict[str, Any]:
    """Versions, commit, and uncommitted changes if there are any; and the processor."""
    found = {**provenance(), **processor().as_dict()}
    return found if (changed := changes()) is None else found | {"changes": changed}


class OtherBenchmark(BenchmarkError):
    """The file holds samples that were made under other conditions."""


class Results:
    """Samples on disk.

    Args:
        path: of the JSON file; what it holds already is gone on with.
        setting: what was asked and what makes the samples; another one in the file is refused.
        section: key under which they stand in the file, with a setting of their own; None is the
            file itself.

    Attributes:
        content: the samples and their setting, to be changed in place.
        whole: everything that the file holds.

    Raises:
        OtherBenchmark: the samples are of another setting, which is named.
        BenchmarkError: the file is damaged.
    """

    def __init__(
        self, path: Path, setting: Mapping[str, Any], *, section: str | None = None
    ) -> None:
        self._path = path
        # As it will be read back: tuples are lists there.
        setting = json.loads(json.dumps(setting))
        self.whole: dict[str, Any] = read_results(path) if path.is_file() else {}
        self.content = self.whole if section is None else self.whole.setdefault(section, {})
        changed = differences(self.content.setdefault("setting", setting), setting)
        if changed:
            raise OtherBenchmark(
                f"{path} was made with something else: {'; '.join(changed)}; name a new file, "
                "or remove it"
            )

    def note_load(self) -> None:
        """Store what ran on the machine when this call began, and warn where it was busy."""
        load = os.getloadavg()[0]
        self.content.setdefault("loads_before", []).append(load)
        if warning := busy_warning(load):
            print(warning, flush=True)

    def save(self) -> None:
        """Whole or not at all.

        Raises:
            BenchmarkError: the file cannot be written.
        """
        write_results(self._path, self.whole)


def write_results(path: Path, content: Mapping[str, Any]) -> None:
    """A benchmark's JSON file, whole or not at all: what was there before stays until then.

    Raises:
        BenchmarkError: it cannot be written.
    """
    text = json.dumps(content, indent=1) + "\n"
    _write_whole(path, lambda partial: partial.write_text(text))


def write_figure(path: Path, figure: Figure, *, dpi: int = 150) -> None:
    """A picture, in the format that its name ends in, whole or not at all.

    Raises:
        BenchmarkError: it cannot be written.
    """
    kind = path.suffix.removeprefix(".")
    _write_whole(path, lambda partial: figure.savefig(partial, dpi=dpi, format=kind))


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        os.replace(partial, path)
    except OSError as error:
        raise BenchmarkError(
            f"{path} cannot be written: {error.strerror}; see to space and permissions, then run "
            "this again"
        ) from None


def read_results(path: Path) -> dict[str, Any]:
    """What a benchmark wrote.

    Raises:
        BenchmarkError: there is no such file, or it is no JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BenchmarkError(
            f"{path} cannot be read: {error}; name a file that a benchmark wrote, or remove it"
        ) from None
    if not isinstance(found, dict):
        raise BenchmarkError(f"{path} holds no figures of a benchmark; name another file")
    return found


def differences(before: Mapping[str, Any], now: Mapping[str, Any], within: str = "") -> list[str]:
    """What differs, as "name was x, is y", at any depth."""
    found: list[str] = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{within}{name}.")
        elif old != new:
            found.append(f"{within}{name} was {old}, is {new}")
    return found
