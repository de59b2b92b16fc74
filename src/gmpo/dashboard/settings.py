"""What the page shows, handed from the command to the process that serves the page."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from gmpo.errors import ConfigError

__all__ = ["VARIABLE", "DashboardSettings", "run_folders", "settings_from"]

VARIABLE = "GMPO_DASHBOARD"
"""Environment variable that holds the settings as JSON: a store's URL may hold a password, which
arguments would show to every user of the machine."""


@dataclass(frozen=True, kw_only=True)
class DashboardSettings:
    """What is shown.

    Attributes:
        store: path or URL of the store; None for none.
        runs: run folders, or folders of run folders.
        every_seconds: between two looks, above 0.

    Raises:
        ConfigError: there is nothing to show.
    """

    store: str | None
    runs: tuple[str, ...]
    every_seconds: float = 5.0

    def __post_init__(self) -> None:
        if self.store is None and not self.runs:
            raise ConfigError(
                "there is nothing to show; give run folders, a store with --store, or both"
            )

    def as_json(self) -> str:
        """For the environment variable."""
        return json.dumps(asdict(self))


def settings_from(environment: Mapping[str, str]) -> DashboardSettings:
    """The settings that the command left in the environment.

    Raises:
        ConfigError: there are none.
    """
    if VARIABLE not in environment:
        raise ConfigError(f"{VARIABLE} is not set; start the page with `gmpo dashboard`")
    table = json.loads(environment[VARIABLE])
    return DashboardSettings(**{**table, "runs": tuple(table["runs"])})


def run_folders(paths: tuple[str, ...]) -> dict[str, Path]:
    """Run folders by the name they are shown under, the newest first.

    A path is a run folder if it holds a `recipe.toml` or a `metrics.jsonl`; otherwise the folders
    in it that are. A run is shown by the last part of its path, and where several have the same, by
    the path from the folder that holds them all.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if _is_run(path):
            found[path] = None
        elif path.is_dir():
            found.update(dict.fromkeys(child for child in path.iterdir() if _is_run(child)))
    ordered = sorted(found, key=_age, reverse=True)
    names = [path.name for path in ordered]
    alike = [path.absolute() for path in ordered if names.count(path.name) > 1]
    shared = os.path.commonpath([path.parent for path in alike]) if alike else "/"
    return {
        path.name if names.count(path.name) == 1 else str(path.absolute().relative_to(shared)): path
        for path in ordered
    }


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in ("recipe.toml", "metrics.jsonl"))


def _age(path: Path) -> tuple[float, str]:
    written = [path / name for name in ("metrics.jsonl", "recipe.toml")]
    times = [file.stat().st_mtime for file in written if file.is_file()]
    return max(times, default=0.0), str(path)
