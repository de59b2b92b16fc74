"""Batches read from files, and what became of them written into a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gmpo.data_checks.profile import DataProfile, merged_profile
from gmpo.data_checks.quality import BatchReport, DataChecks, EarlierData, profile_of
from gmpo.data_checks.rows import Unreadable
from gmpo.data_checks.samples import Sampler
from gmpo.errors import DataError, RunFolderError
from gmpo.records import Prompt
from gmpo.tasks import RowForm, jsonl_rows, jsonl_rows_and_faults
from gmpo.tasks.rows import Row, read_rows

__all__ = [
    "ACCEPTED",
    "REJECTED",
    "new_folder",
    "read_batch",
    "read_earlier",
    "write_report",
    "write_rows",
]

ACCEPTED = "accepted.jsonl"
"""Rows to train on, as they were given."""
REJECTED = "rejected.jsonl"
"""Rows that were rejected, each with its place and reasons."""
_REPORT = "report.json"
_PROFILE = "profile.json"


def read_batch(path: Path) -> list[Mapping[str, Any] | Unreadable]:
    """The rows of a JSON Lines file or folder; a line that is none stays among them.

    Raises:
        DataError: a file is missing or unreadable.
    """
    return [
        row.columns if isinstance(row, Row) else Unreadable(text=row[0], problem=str(row[1]))
        for row in jsonl_rows_and_faults(path)
    ]


def read_earlier(
    paths: Sequence[Path], *, checks: DataChecks, sampler: Sampler | None = None
) -> EarlierData | None:
    """Earlier data as one; None without any.

    Args:
        paths: folders that `write_report` wrote, whose figures are taken as they were measured
            then, or JSON Lines of trusted rows, which are measured now.
        checks: for the measuring.
        sampler: asked about up to 200 rows of each file that is measured now.

    Raises:
        DataError: a file is missing or unreadable, or a folder is that of a refused batch.
    """
    if not paths:
        return None
    prompts: list[Prompt] = []
    profiles: list[DataProfile] = []
    for path in paths:
        if (path / _REPORT).is_file():
            profiles.append(_profile_of_folder(path))
            path = path / ACCEPTED
            mine = read_rows(jsonl_rows(path), RowForm(is_of_recipe=False), source=str(path))
        else:
            mine = read_rows(jsonl_rows(path), RowForm(is_of_recipe=False), source=str(path))
            profiles.append(profile_of(mine.prompts, checks=checks, sampler=sampler))
        prompts += mine.prompts
    return EarlierData(prompts=tuple(prompts), profile=merged_profile(profiles))


@contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Make the folder of a report; if the block ends with nothing in it, it goes again.

    It is made before the long work, so that a place that cannot be written is refused at once.

    Raises:
        RunFolderError: it cannot be made, or holds something already.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunFolderError(f"{folder} is there already and not empty; name a new folder")
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"{folder} cannot be made: {error.strerror}") from None
    try:
        yield
    finally:
        for one in made:
            with suppress(OSError):  # it is in use
                one.rmdir()


def write_report(report: BatchReport, folder: Path) -> None:
    """Accepted rows, rejected rows with reasons, profile, and the report itself, written last.

    Rejected rows may hold personal data, so only the owner may read that file.

    Raises:
        RunFolderError: it cannot be written.
    """
    try:
        _write_lines(folder / ACCEPTED, report.accepted, mode=0o666)
        _write_lines(folder / REJECTED, (one.as_dict() for one in report.rejected), mode=0o600)
        _write_lines(folder / _PROFILE, [report.profile.as_dict()], mode=0o666)
        text = json.dumps(report.as_dict(), indent=1, ensure_ascii=False)
        (folder / _REPORT).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise RunFolderError(f"{folder} cannot be written: {error.strerror}") from None


def write_rows(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Rows as a new file of JSON Lines.

    Raises:
        RunFolderError: there is such a file already, or it cannot be written.
    """
    if path.exists():
        raise RunFolderError(f"{path} is there already; name a new file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_lines(path, rows, mode=0o600)
    except OSError as error:
        raise RunFolderError(f"{path} cannot be written: {error.strerror}") from None


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]], *, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with open(descriptor, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _profile_of_folder(folder: Path) -> DataProfile:
    report = _read_json(folder / _REPORT)
    if not report.get("passed"):
        raise DataError(f"the batch of {folder} was refused; leave it out of --earlier")
    try:
        return DataProfile.from_dict(_read_json(folder / _PROFILE))
    except DataError as error:
        raise DataError(f"{folder / _PROFILE}: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; check that batch again") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}; check that batch again") from None
    if not isinstance(found, dict):
        raise DataError(f"{path} holds no JSON object; check that batch again")
    return found
