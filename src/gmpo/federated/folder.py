"""A federation's folder: its plan, its models, and what each round left."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gmpo.errors import FederationError, GmpoError, RunFolderError
from gmpo.federated.plan import Federation
from gmpo.federated.records import ClientRow, RoundReport
from gmpo.flushing import flush_file, flush_names
from gmpo.locks import take_lock

__all__ = ["FederationFolder", "disk_errors"]

_PLAN = "federation.json"
_REPORT = "report.json"
_TRAINED = "trained.json"


@dataclass(frozen=True, kw_only=True)
class FederationFolder:
    """Where everything of a federation lies; what is there is whole, whoever was killed.

    Attributes:
        path: of the folder.
    """

    path: Path

    @property
    def outcomes(self) -> Path:
        """What models answered, by version."""
        return self.path / "outcomes"

    def model(self, number: int) -> Path:
        """The model that a round ended with, if it changed it; 0 is the start."""
        return self.path / "models" / f"{number:03}"

    def round(self, number: int) -> Path:
        """What a round left."""
        return self.path / "rounds" / f"{number:03}"

    def client(self, number: int, name: str) -> Path:
        """A client's run in a round."""
        return self.round(number) / "clients" / name

    def update(self, number: int, name: str) -> Path:
        """A client's update of a round."""
        return self.round(number) / "updates" / f"{name}.safetensors"

    def begin(self, federation: Federation) -> None:
        """Keep the plan of a new federation.

        Raises:
            FederationError: the folder holds something else, another federation too.
            RunFolderError: it cannot be written.
        """
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            there = [path.name for path in self.path.iterdir() if not path.name.startswith(".")]
        if _PLAN in there:
            raise FederationError(
                f"another process began a federation in {self.path}; give the command again, or "
                "name a new --folder"
            )
        if there:
            raise FederationError(
                f"{self.path} is not empty and holds no {_PLAN}; name a new --folder"
            )
        self.write(self.path / _PLAN, federation.as_dict())

    def federation(self) -> Federation | None:
        """The plan that the folder was begun with; None if it was not.

        Raises:
            RunFolderError: its file is damaged.
            ConfigError: it is not of this version.
        """
        path = self.path / _PLAN
        if not path.is_file():
            return None
        with _whole(path):
            return Federation.from_dict(self.read(path), source=str(path))

    def report(self, number: int) -> RoundReport | None:
        """What a finished round told; None if it is not finished.

        Raises:
            RunFolderError: the report is damaged.
        """
        path = self.round(number) / _REPORT
        if not path.is_file():
            return None
        with _whole(path):
            return RoundReport.from_dict(self.read(path))

    def client_row(self, number: int, name: str) -> ClientRow | None:
        """What a client that has trained told; None if it has not.

        Raises:
            RunFolderError: its file is damaged.
        """
        path = self.client(number, name) / _TRAINED
        if not path.is_file():
            return None
        with _whole(path):
            return ClientRow(**self.read(path))

    def keep_client_row(self, number: int, row: ClientRow) -> None:
        """Write what a client told, which ends its part of the round.

        Raises:
            RunFolderError: it cannot be written.
        """
        self.write(self.client(number, row.client) / _TRAINED, asdict(row))

    def keep_report(self, report: RoundReport) -> None:
        """Write what a round told, which ends it.

        Raises:
            RunFolderError: it cannot be written.
        """
        self.write(self.round(report.number) / _REPORT, report.as_dict())

    def reports(self) -> list[RoundReport]:
        """Of all finished rounds, in order.

        Raises:
            RunFolderError: one is damaged.
        """
        found: list[RoundReport] = []
        while (report := self.report(len(found) + 1)) is not None:
            found.append(report)
        return found

    def write(self, path: Path, record: Mapping[str, Any]) -> None:
        """A JSON file, whole and on the disk or not there.

        Raises:
            RunFolderError: it cannot be written.
        """
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.partial")
            partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            flush_file(partial)
            partial.rename(path)
            flush_names(path.parent)

    def read(self, path: Path) -> dict[str, Any]:
        """A JSON file that `write` wrote.

        Raises:
            RunFolderError: it is damaged.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunFolderError(
                f"{path} cannot be read: {error}; bring it back, or name a new --folder"
            ) from None
        if not isinstance(found, dict):
            raise RunFolderError(f"{path} is damaged: {found!r} is no table; bring it back")
        return found

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes off the federation.

        Raises:
            FederationError: another process runs it.
        """
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / ".lock").open("a", encoding="utf-8")
        with file:
            if not take_lock(file):
                raise FederationError(
                    f"federation {self.path} is being run by another process; wait for it, or stop "
                    "it"
                )
            yield


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Name what cannot be written.

    Raises:
        RunFolderError: the disk did not take it.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, GmpoError):
            raise
        raise RunFolderError(
            f"{path} cannot be written: {error.strerror or error}; free space or permissions, then "
            "give the same command again: what is done is kept"
        ) from None


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Name a file that is JSON and not what was written there.

    Raises:
        RunFolderError: keys are missing or of another kind.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise RunFolderError(
            f"{path} is damaged: {error!r}; bring it back, or name a new --folder"
        ) from None
