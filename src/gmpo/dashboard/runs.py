"""What the page shows of training runs, read from their folders."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float

from gmpo.run_conditions import RunHealth, run_health
from gmpo.tracking import read_lines

__all__ = ["RunLog", "RunWatch", "metric_names", "metric_series", "sequence_ratios"]

_NEWEST_ROUNDS = 10

_Mark: TypeAlias = tuple[int, int, int] | None


@dataclass(frozen=True, kw_only=True)
class RunLog:
    """A run's lines, as they are on the disk now.

    Attributes:
        metrics: of `metrics.jsonl`.
        rollouts: groups of `rollouts.jsonl`.
    """

    metrics: tuple[Mapping[str, Any], ...]
    rollouts: tuple[Mapping[str, Any], ...]


class RunWatch:
    """Files of run folders, read again only once they have changed; threads may share one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[Path, tuple[_Mark, tuple[Mapping[str, Any], ...]]] = {}
        self._judged: dict[Path, tuple[tuple[_Mark, ...], RunHealth]] = {}

    def log(self, folder: Path) -> RunLog:
        """The run's lines; none of a file that is not there.

        Raises:
            RunFolderError: a file cannot be read.
            DataError: a line is damaged.
        """
        with self._lock:
            return RunLog(
                metrics=self._lines(folder / "metrics.jsonl"),
                rollouts=self._lines(folder / "rollouts.jsonl"),
            )

    def health(self, folder: Path) -> RunHealth:
        """What is wrong with the run now.

        Raises:
            ConfigError: it is no run folder any more.
            RunFolderError: a file cannot be read.
            DataError: a line is damaged.
        """
        marks = tuple(_mark(folder / name) for name in ("metrics.jsonl", "events.jsonl"))
        with self._lock:
            known = self._judged.get(folder)
            if known is None or known[0] != marks:
                known = self._judged[folder] = (marks, run_health(folder))
        return known[1]

    def _lines(self, path: Path) -> tuple[Mapping[str, Any], ...]:
        mark = _mark(path)
        if mark is None:
            return ()
        known = self._kept.get(path)
        if known is None or known[0] != mark:
            known = self._kept[path] = (mark, tuple(read_lines(path.parent, path.name)))
        return known[1]


def _mark(path: Path) -> _Mark:
    """Changes with the file; None where there is none."""
    if not path.is_file():
        return None
    stat = path.stat()
    # A roll-back replaces the file, which may then have its old length.
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def metric_names(logs: Sequence[RunLog]) -> list[str]:
    """Every metric that any of the runs has logged, in alphabetical order."""
    named = {name for log in logs for line in log.metrics for name in line}
    return sorted(name for name in named if "/" in name)  # the others say where a line belongs


def metric_series(log: RunLog, metric: str) -> tuple[list[float], list[float | None]]:
    """Rounds and values of a metric, from the lines of rounds and evaluations; None is not finite.

    A step's figure stands in its round's line as well, as a mean or an extreme.
    """
    lines = [line for line in log.metrics if line["kind"] != "step" and metric in line]
    return [float(line["round"]) for line in lines], [line[metric] for line in lines]


def sequence_ratios(log: RunLog) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " M"]]:
    """Geometric mean ratios of the kept rollouts: of the newest ten rounds, and of those before.

    A rollout that was not trained on has none.
    """
    last = max((group["round"] for group in log.rollouts), default=0)
    newest: list[float] = []
    earlier: list[float] = []
    for group in log.rollouts:
        into = newest if group["round"] > last - _NEWEST_ROUNDS else earlier
        ratios = [rollout.get("ratio") for rollout in group["rollouts"]]
        into.extend(ratio["sequence"] for ratio in ratios if ratio is not None)
    return np.array(newest, dtype=float), np.array(earlier, dtype=float)
