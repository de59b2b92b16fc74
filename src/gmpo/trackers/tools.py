"""What each tracker needs: one class a tool, its package imported when it is opened.

All of them write to this machine unless the user's environment says otherwise. A row is written
whole or not at all, and a tool can say which rows it holds, so that a run that is resumed goes on
in the same place without a row missing or twice.
"""

from __future__ import annotations

import importlib.util
import math
import os
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gmpo.errors import ConfigError

__all__ = ["OPENERS", "Row", "TrackedRun", "Tracker", "figures", "require_packages", "row_key"]

Row = Mapping[str, Any]
"""One line of `metrics.jsonl`: `kind`, `round`, `step`, and figures by metric name."""


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """What a tracker is told about a run besides its rows.

    Attributes:
        id: names the run for good; a resumed run has the same.
        name: shown to people.
        project: what the run is filed under (MLflow: experiment).
        folder: of the run.
        parameters: the resolved recipe, by `table.key`.
        attempt: how often the run was rolled back; what is written to `folder` is kept apart by it.
    """

    id: str
    name: str
    project: str
    folder: Path
    parameters: Mapping[str, Any]
    attempt: int = 0


class Tracker(Protocol):
    """An open tool. Any call may raise or block; `Trackers` sees to it that training does not."""

    def holds(self, row: Row) -> bool:
        """Whether the row has arrived before, in this process or an earlier one."""

    def write(self, row: Row) -> None:
        """Write a row, whole or not at all."""

    def close(self) -> None:
        """Flush, and mark the run as ended."""


def row_key(row: Row) -> tuple[str, int]:
    """What tells a run's rows apart."""
    return row["kind"], row["step"]


def figures(row: Row) -> dict[str, float]:
    """A row's numbers under `kind/metric`, for an axis of optimizer steps; null becomes NaN.

    Step and round rows share metric names and would overwrite each other without the kind.
    """
    kind = row["kind"]
    named = {
        name if name.startswith(f"{kind}/") else f"{kind}/{name}": math.nan if v is None else v
        for name, v in row.items()
        if name not in ("kind", "round", "step")
    }
    return {**named, _marker(kind): row["round"]}


def require_packages(names: Iterable[str]) -> None:
    """Check that the named trackers can be imported.

    Raises:
        ConfigError: a package is not installed; the command that installs it is named.
    """
    for name in names:
        package, extra = _PACKAGES[name]
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"tracker {name!r} needs {package}; pip install 'gmpo[{extra}]', or leave it out "
                "of tracking.to"
            )


class _Trackio:
    """Trackio's local database; `trackio show --project PROJECT` shows it.

    Its storage is written directly: `trackio.log` prints to standard output and hides failures.
    """

    def __init__(self, run: TrackedRun) -> None:
        from trackio.sqlite_storage import SQLiteStorage

        SQLiteStorage.validate_project_name(run.project)
        self._storage = SQLiteStorage
        self._run = run
        self._held = {
            (kind, row["step"])
            for row in SQLiteStorage.get_logs(run.project, run_id=run.id)
            for kind in _KINDS
            if _marker(kind) in row
        }
        self._parameters = None if self._held else dict(run.parameters)

    def holds(self, row: Row) -> bool:
        return row_key(row) in self._held

    def write(self, row: Row) -> None:
        self._storage.bulk_log(
            project=self._run.project,
            run=self._run.name,
            run_id=self._run.id,
            metrics_list=[figures(row)],
            steps=[row["step"]],
            config=self._parameters,
        )
        self._parameters = None

    def close(self) -> None:
        """Every row is committed as it is written."""


class _Mlflow:
    """An MLflow run: in `MLFLOW_TRACKING_URI` if that is set, else in a database beside the run.

    A row's round is logged as `kind/round`, in one transaction with its figures, so that the
    history of that metric says which rows have arrived.
    """

    def __init__(self, run: TrackedRun) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI") or _mlflow_store_beside(run.folder)
        self._client = MlflowClient(tracking_uri=uri)
        self._metric = Metric
        self._id, known = self._found_or_created(run)
        # A parameter cannot be changed there; those of a run that is resumed stay as they began.
        new = [Param(k, str(value)) for k, value in run.parameters.items() if k not in known]
        for start in range(0, len(new), 100):  # the most that one request may hold
            self._client.log_batch(self._id, params=new[start : start + 100])
        self._held = {
            (kind, metric.step)
            for kind in _KINDS
            for metric in self._client.get_metric_history(self._id, _marker(kind))
        }

    def holds(self, row: Row) -> bool:
        return row_key(row) in self._held

    def write(self, row: Row) -> None:
        now = int(time.time() * 1000)
        step = row["step"]
        metrics = [self._metric(name, value, now, step) for name, value in figures(row).items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._id)

    def _found_or_created(self, run: TrackedRun) -> tuple[str, Mapping[str, str]]:
        """The MLflow run that carries our id, running again, or a new one; and its parameters."""
        experiment = self._client.get_experiment_by_name(run.project)
        if experiment is None:
            experiment_id = str(self._client.create_experiment(run.project))
        else:
            experiment_id = str(experiment.experiment_id)
        found = self._client.search_runs([experiment_id], f"tags.gmpo_run = '{run.id}'")
        if found:
            self._client.update_run(found[0].info.run_id, status="RUNNING")
            return str(found[0].info.run_id), dict(found[0].data.params)
        tags = {"gmpo_run": run.id}
        created = self._client.create_run(experiment_id, run_name=run.name, tags=tags)
        return str(created.info.run_id), {}


class _TensorBoard:
    """Event files in the run folder's `tensorboard/`; `tensorboard --logdir runs` shows all runs.

    A row is one event, so that a killed process leaves it whole or not at all.
    """

    def __init__(self, run: TrackedRun) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder = run.folder / "tensorboard"
        if run.attempt:
            folder /= f"attempt-{run.attempt}"
        is_new = not folder.exists()
        self._held = set(_held_events(folder))
        self._writer = EventFileWriter(str(folder))
        if is_new:
            lines = [f"    {key} = {value}" for key, value in run.parameters.items()]
            summary = text_pb("recipe", "\n".join([f"run {run.name}", "", *lines]))
            self._writer.add_event(self._event(wall_time=time.time(), summary=summary))
        self._writer.flush()

    def holds(self, row: Row) -> bool:
        return row_key(row) in self._held

    def write(self, row: Row) -> None:
        value = self._summary.Value
        values = [value(tag=name, simple_value=v) for name, v in figures(row).items()]
        summary = self._summary(value=values)
        event = self._event(wall_time=time.time(), step=row["step"], summary=summary)
        self._writer.add_event(event)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """A W&B run in the run folder's `wandb/`; `wandb sync` uploads it later.

    Offline unless `WANDB_MODE` says otherwise. W&B cannot be asked offline what it holds, so a list
    beside its files says what it was given, written before it is: a row is never there twice, but
    rows of the last step before a kill may be missing.
    """

    def __init__(self, run: TrackedRun) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        # W&B itself refuses a mode that it does not know.
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        of_attempt = f"-{run.attempt}" if run.attempt else ""
        self._given = run.folder / "wandb" / f"given{of_attempt}.txt"
        self._given.parent.mkdir(exist_ok=True)
        lines = self._given.read_text().splitlines() if self._given.exists() else []
        self._held = set(lines)
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=run.id,
            dir=str(run.folder),
            mode=mode,
            resume="allow",
            config=dict(run.parameters),
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                disable_code=True,
                x_disable_stats=True,
                x_disable_meta=True,
            ),
        )

    def holds(self, row: Row) -> bool:
        return _line(row) in self._held

    def write(self, row: Row) -> None:
        with self._given.open("a") as file:
            file.write(f"{_line(row)}\n")
        self._held.add(_line(row))
        self._run.log(figures(row), step=row["step"])

    def close(self) -> None:
        self._run.finish()


def _prometheus(run: TrackedRun) -> Tracker:
    from gmpo.trackers.prometheus import PrometheusFile

    return PrometheusFile(run)


OPENERS: Mapping[str, Callable[[TrackedRun], Tracker]] = {
    "trackio": _Trackio,
    "mlflow": _Mlflow,
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "prometheus": _prometheus,
}
"""Each opens its tool, which may take seconds, write files, fail or block."""

_PACKAGES = {
    "trackio": ("trackio", "track"),
    "mlflow": ("mlflow", "mlflow"),
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
    "prometheus": ("prometheus_client", "serve"),
}
_KINDS: Sequence[str] = ("step", "round", "evaluation")


def _marker(kind: str) -> str:
    """The figure that every row of a kind has."""
    return f"{kind}/round"


def _line(row: Row) -> str:
    kind, step = row_key(row)
    return f"{kind} {step}"


def _mlflow_store_beside(folder: Path) -> str:
    """The database next to the run folder, which all runs there share.

    It is made under another name: one whose tables were being made in a killed process is of no use
    to MLflow ever after.
    """
    from mlflow.tracking import MlflowClient

    path = folder.resolve().parent / "mlflow.db"
    if not path.exists():
        partial = path.with_name(f".mlflow-{uuid.uuid4().hex}.db")
        MlflowClient(tracking_uri=f"sqlite:///{partial}").search_experiments(max_results=1)
        # A link and no renaming: another run may have been faster, and is using its own by now.
        with suppress(FileExistsError):
            os.link(partial, path)
        partial.unlink()
    return f"sqlite:///{path}"


def _held_events(folder: Path) -> Iterable[tuple[str, int]]:
    """Rows in the event files of earlier processes; a torn last event is no row."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    markers = {_marker(kind): kind for kind in _KINDS}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tag in markers:
                    yield markers[value.tag], event.step
