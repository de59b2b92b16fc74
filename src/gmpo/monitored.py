"""What `gmpo monitor` looks at, runs and a store, and where it keeps what it told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from gmpo.alert_book import AlertBook
from gmpo.errors import GmpoError, StoreError
from gmpo.monitoring.alerts import Condition, Notification
from gmpo.monitoring.severity import Level
from gmpo.run_conditions import run_health, unreadable_run
from gmpo.store import Event, Store
from gmpo.store_conditions import CHAMPION_DAMAGED, store_conditions, unusable_store

__all__ = ["Monitored"]

_OF_STORES = ("GmpoServingAnomaly", "GmpoStoreUnusable")


class Monitored:
    """Runs and a store, looked at again and again.

    Args:
        runs: folders of runs, finished or still training.
        store: open for writing; None where there is none.

    Raises:
        ConfigError: a folder is none of a run.
        RunFolderError: one cannot be read.
        DataError: a line in one is damaged.
        StoreError: the store cannot be read.
    """

    def __init__(self, runs: Sequence[Path], store: Store | None) -> None:
        self._runs = runs
        self._store = store
        self._book = None if store is None else AlertBook(store, is_ours=self._is_ours)
        self._levels: dict[Path, Level] = dict.fromkeys(runs, "ok")
        self._fault: StoreError | None = None
        self._is_first = True
        for run in runs:
            run_health(run)
        if store is not None:
            store_conditions(store, now=0.0)

    def look(self, now: float) -> list[Condition]:
        """All that is wrong now; what cannot be read is wrong, and hides nothing else.

        Args:
            now: unix seconds.
        """
        found = [condition for run in self._runs for condition in self._of_run(run, now)]
        if self._store is None:
            return found
        fault, self._fault = self._fault, None
        try:
            found.extend(store_conditions(self._store, now=now))
        except StoreError as error:
            fault = error
        if fault is not None:
            found.append(unusable_store(self._store.where, fault))
        return found

    def keep(self, told: Sequence[Notification], *, firing: Sequence[Mapping[str, str]]) -> None:
        """Write what was told into the store, if there is one; it waits where that cannot be.

        What the registry wrote there is there already.

        Args:
            told: at this look.
            firing: labels, severity included, of every alert that lasts, told now or before.
        """
        if self._book is None:
            return
        told = [one for one in told if one.labels["alertname"] != CHAMPION_DAMAGED]
        try:
            if self._is_first:
                # A store that was locked at the first look ends them at a later one.
                self._book.end_all_but(firing)
                self._is_first = False
        except StoreError as error:
            self._fault = error
        self._fault = self._book.write(told) or self._fault

    @property
    def num_unwritten(self) -> int:
        """Changes of alerts that the store did not take."""
        return 0 if self._book is None else self._book.num_waiting

    def _of_run(self, run: Path, now: float) -> Sequence[Condition]:
        try:
            health = run_health(run)
        except GmpoError as error:
            return [unreadable_run(run, error)]
        if self._store is not None and health.report.level != self._levels[run]:
            payload = {**health.report.payload(), "run": str(run.absolute())}
            try:
                self._store.add_events([Event(kind="anomaly", time=now, payload=payload)])
            except StoreError as error:
                self._fault = error
            else:
                self._levels[run] = health.report.level
        return health.conditions

    def _is_ours(self, labels: Mapping[str, str]) -> bool:
        if "run" in labels:
            return labels["run"] in {str(run.absolute()) for run in self._runs}
        return labels["alertname"] in _OF_STORES
