"""What may be cleared away: never what serves, could serve again, or is being tried."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gmpo.errors import ConfigError, RunFolderError
from gmpo.registry.files import PARTIAL
from gmpo.registry.line import serving_line
from gmpo.store import Event, ModelVersion, Store

__all__ = ["Garbage", "clear_away"]

_LEFTOVER_SECONDS = 3600.0
"""A folder that no version has may be one that is just being registered, for so long."""


@dataclass(frozen=True, kw_only=True)
class Garbage:
    """What was cleared away, or would be.

    Attributes:
        removed: versions whose files go; their rows stay as history.
        leftovers: folders of processes that were killed before a version was registered.
        kept: why each other version stays.
        num_bytes: that go.
        dry_run: whether nothing was touched.
    """

    removed: tuple[str, ...]
    leftovers: tuple[str, ...]
    kept: Mapping[str, str]
    num_bytes: int
    dry_run: bool

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "kept": dict(self.kept)}


def _kept_versions(
    store: Store,
    name: str,
    versions: Sequence[ModelVersion],
    *,
    keep: int,
    candidates: Sequence[str],
) -> dict[str, str]:
    """Versions of a model that stay, and why."""
    kept: dict[str, str] = {}
    line = serving_line(store.champion_history(name))
    spared = list(dict.fromkeys(reversed(line)))[:2]
    kept.update(zip(spared, ("champion", "predecessor"), strict=False))
    for candidate in candidates:
        kept.setdefault(candidate, "candidate")
    tried = set(_tried(store, name))
    for version in versions:
        if version.version in tried or version.path in tried:
            kept.setdefault(version.version, "in a running experiment or cycle")
    for version in sorted(versions, key=lambda one: one.created, reverse=True)[:keep]:
        kept.setdefault(version.version, f"one of the newest {keep}")
    return kept


def clear_away(
    store: Store, folder: Path, name: str, *, keep: int, candidates: Sequence[str], dry_run: bool
) -> Garbage:
    """Remove the files of versions that nothing needs, and what killed processes left.

    Whoever calls it holds the folder alone.

    Raises:
        ConfigError: `keep` is below 0.
        RunFolderError: a folder cannot be removed.
    """
    if keep < 0:
        raise ConfigError(f"keep is {keep}; it must be 0 or more")
    versions = store.model_versions(name)
    kept = _kept_versions(store, name, versions, keep=keep, candidates=candidates)
    # Most versions of a long history are cleared away already: only what is there is looked at.
    there = {str(path) for path in (folder.iterdir() if folder.is_dir() else ()) if path.is_dir()}
    going = [one for one in versions if one.version not in kept and one.path in there]
    unknown = there - {one.path for one in versions}
    leftovers = list(_leftovers(store, unknown))
    num_bytes = sum(_size(Path(version.path)) for version in going)
    num_bytes += sum(_size(path) for path in leftovers)
    if not dry_run:
        for path in (*(Path(version.path) for version in going), *leftovers):
            _remove(path)
        _tell(store, going)
    return Garbage(
        removed=tuple(version.version for version in going),
        leftovers=tuple(path.name for path in leftovers),
        kept=kept,
        num_bytes=num_bytes,
        dry_run=dry_run,
    )


def _tried(store: Store, name: str) -> Iterator[str]:
    """Every string that running experiments and unfinished cycles hold: versions among them."""
    for experiment in store.experiments():
        if experiment.status == "running":
            yield from _strings(experiment.config)
    for cycle in store.cycles(name, open_only=True):
        yield from _strings(cycle.payload)


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _strings(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _strings(one)


def _leftovers(store: Store, unknown: Set[str]) -> Iterator[Path]:
    """Of folders that no version of this model has, those that none of another has either, and
    that nobody has touched for an hour."""
    known = {version.path for version in store.model_versions()} if unknown else set()
    for path in map(Path, sorted(unknown - known)):
        is_ours = path.name.startswith(PARTIAL) or not path.name.startswith(".")
        if is_ours:
            newest = max(one.stat().st_mtime for one in (path, *path.rglob("*")))
            if time.time() - newest > _LEFTOVER_SECONDS:
                yield path


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _remove(path: Path) -> None:
    """Under another name first, so that a version is whole or gone."""
    try:
        gone = path if path.name.startswith(PARTIAL) else path.with_name(PARTIAL + path.name)
        path.rename(gone)
        shutil.rmtree(gone)
    except OSError as error:
        raise RunFolderError(
            f"{path} cannot be removed: {error.strerror}; mend its rights, then try again"
        ) from None


def _tell(store: Store, removed: list[ModelVersion]) -> None:
    store.add_events(
        [
            Event(
                kind="removed",
                time=time.time(),
                payload={"name": version.name, "path": version.path},
                model_version=version.version,
            )
            for version in removed
        ]
    )
