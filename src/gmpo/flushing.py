"""fsync: what has to be on the disk before it counts; a power failure leaves it whole, or not."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["flush_file", "flush_folder", "flush_names", "move_whole"]


def flush_file(path: Path) -> None:
    """Make sure that what was written to a file is on the disk.

    Raises:
        OSError: the disk does not take it.
    """
    with path.open("rb") as file:
        os.fsync(file.fileno())


def flush_names(folder: Path) -> None:
    """Make sure that the names in a folder are on the disk: new files and renamed ones.

    Raises:
        OSError: the disk does not take it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_folder(folder: Path) -> None:
    """Make sure that everything in a folder is on the disk.

    Raises:
        OSError: the disk does not take it.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            flush_file(path)
        elif path.is_dir():  # else it is a link to what is not there
            flush_names(path)
    flush_names(folder)


def move_whole(folder: Path, to: Path) -> None:
    """Give a folder its name once everything in it is on the disk.

    Args:
        folder: as it was written.
        to: its name from now on, which nothing has yet; the folder that it is in may be new.

    Raises:
        OSError: the disk does not take it.
    """
    flush_folder(folder)
    folder.rename(to)
    for parent in to.parents[:2]:
        flush_names(parent)
