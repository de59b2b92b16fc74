"""Rows that earlier cycles of a model had: whoever counts new ones leaves them out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gmpo.continual.plan import gave_back, read_batch, write_rows
from gmpo.store import Store

__all__ = ["keep_digests", "num_new_rows"]

_DIGESTS = "digests.jsonl"
"""In a cycle's folder; it holds no text, so it may stay where users' texts have to go."""


def keep_digests(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Note the rows that a cycle has, for those that come after it.

    Args:
        rows: of its data.
        folder: of its step `validate`.

    Raises:
        RunFolderError: the file cannot be written.
    """
    write_rows(folder / _DIGESTS, [{"row": _row_digest(row)} for row in rows])


def num_new_rows(
    store: Store, name: str, rows: Sequence[Mapping[str, Any]], *, folder: Path
) -> int:
    """How many rows no earlier cycle of the model had; rows alike count once.

    What a cycle had is new again if the batch was too small, or the cycle was abandoned.

    Args:
        store: of the cycles.
        name: of the model.
        rows: of the data there are now.
        folder: of all cycles of the model; a cycle whose folder is gone had none.

    Raises:
        DataError: the file of an earlier cycle is unreadable.
    """
    new = {_row_digest(row) for row in rows}
    for cycle in store.cycles(name):
        kept = folder / f"cycle-{cycle.number:06}" / "validate" / _DIGESTS
        if not gave_back(cycle) and kept.is_file():
            new.difference_update(row["row"] for row in read_batch([str(kept)]))
    return len(new)


def _row_digest(row: Mapping[str, Any]) -> str:
    """The same for rows alike; ids are left out, which files of several cycles may share."""
    told = {name: value for name, value in row.items() if name != "id"}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
