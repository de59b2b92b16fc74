"""A copy of a model becomes a version: its folder gets the version's name, then comes the row."""

from __future__ import annotations

import shutil
from pathlib import Path

from gmpo.errors import DataError, RunFolderError
from gmpo.registry.files import FolderLock, ModelCopy
from gmpo.store import ModelVersion, Store

__all__ = ["keep", "register"]


def register(
    version: ModelVersion, copy: ModelCopy, *, store: Store, lock: FolderLock
) -> ModelVersion | None:
    """Keep a copy at the version's path and write its row; who came first where one did, else None.

    Raises:
        RunFolderError: the folder cannot be written.
        StoreLocked: other processes give versions their names for longer than one waits.
    """
    with lock.naming():
        # Whoever added the same weights in between has registered its own files, which stay.
        known = store.model_version(version.version)
        if known is not None:
            return known
        keep(copy, Path(version.path).parent)
        try:
            store.put_model_version(version)
        except DataError:
            # It was added to another folder, with a lock of its own.
            known = store.model_version(version.version)
            if known is None:
                raise
            return known
    return None


def keep(copy: ModelCopy, folder: Path) -> None:
    """Give a copy its version's name; what is there without a row, or damaged, makes room.

    Whoever calls it holds the folder's lock of names.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    kept = folder / copy.version
    aside = copy.folder.with_name(f"{copy.folder.name}-replaced")
    try:
        if kept.exists():
            kept.rename(aside)
        copy.folder.rename(kept)
    except OSError as error:
        raise RunFolderError(
            f"{kept} cannot be written: {error}; nothing was registered; try again"
        ) from None
    shutil.rmtree(aside, ignore_errors=True)
