"""A version's files: copied whole or not at all, and checked against what they were."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gmpo.errors import ModelError, RunFolderError, StoreLocked
from gmpo.model_files import file_digest, holds_weights, model_paths, weights_version
from gmpo.store import ModelVersion

__all__ = [
    "FILES",
    "PARTIAL",
    "FileCheck",
    "FolderLock",
    "ModelCopy",
    "check_files",
    "copied_model",
]

PARTIAL = ".partial-"
"""A folder of this beginning is being written, or was when its process was killed."""

FILES = "files"
"""Key of a version's lineage: SHA-256 of each of its files."""


@dataclass(frozen=True, kw_only=True)
class FileCheck:
    """A version's files against what was registered.

    Attributes:
        version: that was checked.
        path: of its folder.
        missing: files that are not there.
        changed: files that hold something else.
    """

    version: str
    path: str
    missing: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether every file is as it was."""
        return not self.missing and not self.changed

    @property
    def sentence(self) -> str:
        """What was found."""
        if self.is_whole:
            return f"version {self.version} is whole"
        said = [f"{name} is missing" for name in self.missing]
        said += [f"{name} was changed" for name in self.changed]
        return f"version {self.version} at {self.path} is damaged: {', '.join(said)}"


@dataclass(frozen=True, kw_only=True)
class ModelCopy:
    """A model's copy under a temporary name.

    Attributes:
        folder: of the copy.
        version: digest of its weights.
        files: SHA-256 of each file.
    """

    folder: Path
    version: str
    files: dict[str, str]


def check_files(version: ModelVersion) -> FileCheck:
    """Read all of a version's files again; it takes about a second a gigabyte.

    A version that was registered without digests of its files is checked by its weights alone.
    """
    folder = Path(version.path)
    if not folder.is_dir():
        return FileCheck(version=version.version, path=version.path, missing=("its folder",))
    known: dict[str, str] | None = version.lineage.get(FILES)
    if known is None:
        return _check_weights(version, folder)
    missing = [name for name in known if not (folder / name).is_file()]
    changed = [
        name
        for name, digest in known.items()
        if name not in missing and file_digest(folder / name) != digest
    ]
    return FileCheck(
        version=version.version,
        path=version.path,
        missing=tuple(missing),
        changed=tuple(changed),
    )


def _check_weights(version: ModelVersion, folder: Path) -> FileCheck:
    try:
        is_same = weights_version(folder) == version.version
    except ModelError:
        is_same = False
    changed = () if is_same else ("its weights",)
    return FileCheck(version=version.version, path=version.path, changed=changed)


@contextmanager
def copied_model(source: Path, folder: Path) -> Iterator[ModelCopy]:
    """A copy of a model beside the versions, on the disk and read back; gone with the block.

    Whoever keeps it renames its folder before the block ends. The version is that of the copy, so
    that a source that changes meanwhile cannot be registered as what it was.

    Raises:
        ModelError: the source is no model.
        RunFolderError: there is no space, or no right to write.
    """
    if not holds_weights(source):
        raise ModelError(
            f"{source} holds no model; name a folder with config.json and *.safetensors (gmpo "
            "export writes one), or one with an adapter"
        )
    partial = folder / f"{PARTIAL}{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        try:
            partial.mkdir(parents=True)
            for path in model_paths(source):
                _copy_file(path, partial / path.relative_to(source))
            _flush(partial)
        except OSError as error:
            raise RunFolderError(
                f"{source} cannot be copied to {folder}: {error}; nothing was registered; free "
                "space or mend the rights"
            ) from None
        yield ModelCopy(
            folder=partial,
            version=weights_version(partial),
            files={
                path.relative_to(partial).as_posix(): file_digest(path)
                for path in model_paths(partial)
            },
        )
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copy_file(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)  # links of the hub's cache become files
    with target.open("rb") as file:
        os.fsync(file.fileno())


def _flush(folder: Path) -> None:
    """Have the disk know the folder's entries, and those of the folders in it."""
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class FolderLock:
    """Keeps the clearing away of versions apart from everything that uses them, and who names one
    apart from who names another.

    Any number of processes may use versions at once; clearing away is done by one alone. The lock
    ends with its process, however that ends.

    Args:
        folder: of the versions; the processes must see one file system that knows flock.
        patience_seconds: how long to wait for others.
    """

    def __init__(self, folder: Path, *, patience_seconds: float = 30.0) -> None:
        self._path = folder / ".lock"
        self._of_names = folder / ".names.lock"
        self._patience_seconds = patience_seconds

    @contextmanager
    def shared(self) -> Iterator[None]:
        """While versions are added or promoted.

        Raises:
            StoreLocked: versions are cleared away for longer than one waits.
            RunFolderError: the folder cannot be written.
        """
        with self._held(self._path, fcntl.LOCK_SH):
            yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While versions are cleared away; raises as `shared` does."""
        with self._held(self._path, fcntl.LOCK_EX):
            yield

    @contextmanager
    def naming(self) -> Iterator[None]:
        """While a folder gets a version's name, within `shared`; raises as `shared` does.

        A file of its own: two that hold the other lock together would wait for each other.
        """
        with self._held(self._of_names, fcntl.LOCK_EX):
            yield

    @contextmanager
    def _held(self, path: Path, kind: int) -> Iterator[None]:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise RunFolderError(
                f"folder {path.parent} of the versions cannot be written: {error.strerror}; "
                "mend its rights or name another one"
            ) from None
        with file:
            until = time.monotonic() + self._patience_seconds
            while True:
                try:
                    fcntl.flock(file, kind | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= until:
                        raise StoreLocked(
                            f"folder {path.parent} of the versions is in use by another "
                            f"process for {self._patience_seconds:g} seconds; try again later"
                        ) from None
                time.sleep(0.05)
            yield
