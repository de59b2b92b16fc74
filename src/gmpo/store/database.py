"""The open store."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from sqlalchemy import Connection, Engine, Table, func, insert, select
from sqlalchemy.exc import IntegrityError

from gmpo.errors import ChampionMoved, ConfigError, DataError, StoreError
from gmpo.store.champions import champion_event, champion_of, champions_of, refuse_other_models
from gmpo.store.cycles import (
    begin_cycle,
    cycles_of,
    drop_lease,
    lease_by_name,
    move_cycle,
    take_lease,
)
from gmpo.store.event_rows import append_events, purge_events
from gmpo.store.experiments import all_experiments, experiment_by_name, write_experiment
from gmpo.store.faults import faults_named
from gmpo.store.filters import event_conditions
from gmpo.store.records import (
    AlertRow,
    Champion,
    Cycle,
    Event,
    Experiment,
    Lease,
    ModelVersion,
)
from gmpo.store.tables import (
    ALERTS,
    CHAMPIONS,
    EVENTS,
    MODEL_VERSIONS,
    insert_into,
    row_of,
    to_alert,
    to_event,
    to_model_version,
)
from gmpo.store.write_ahead_log import empty_write_ahead_log

__all__ = ["DELETABLE", "Store"]

DELETABLE = ("text", "verdict")
"""Kinds of events that hold what people wrote."""


class Store:
    """Events, model versions, champions, experiments, alerts, cycles; made by `open_store`.

    Any number of threads may share one, and any number of processes may each open their own.
    Every method is one transaction: it happens whole or not at all.

    Raises:
        StoreLocked: another process held the store for longer than the time-out.
        StoreFull: the disk is full; nothing of the call was kept.
        StoreError: the store is closed, unreachable or damaged, or a write was asked of one that
            was opened read-only.
    """

    def __init__(self, engine: Engine, *, where: str, read_only: bool) -> None:
        self._engine = engine
        self._writer = engine.execution_options(writes=True)
        self._process = os.getpid()
        self._closed = False
        self.where = where
        """Path or URL, without its password."""
        self.read_only = read_only

    def add_events(self, events: Sequence[Event]) -> None:
        """Append all of them, or none.

        Readers see events in the order of their ids: whoever has read up to one id misses nothing
        by asking for what comes after it.

        Raises:
            DataError: an event that a database cannot hold; it is named and none is written.
        """
        rows = [row_of(event) for event in events]
        if not rows:
            return
        with self._writing() as connection:
            append_events(connection, rows)

    def events(
        self,
        *,
        kinds: Sequence[str] | None = None,
        since: float | None = None,
        until: float | None = None,
        after_id: int | None = None,
        model_version: str | None = None,
        experiment: str | None = None,
        request_id: str | None = None,
        limit: int | None = None,
        newest_first: bool = False,
    ) -> list[Event]:
        """Events that pass every filter given, by id.

        Args:
            kinds: any of these.
            since: at this time or later, in unix seconds.
            until: before this time, in unix seconds.
            after_id: written after the event of this id.
            model_version: of this model.
            experiment: of this experiment.
            request_id: of this request.
            limit: at most so many, at least 1.
            newest_first: by falling id, so that a limit keeps the newest.
        """
        if limit is not None and limit < 1:
            raise ConfigError(f"limit is {limit}; it must be at least 1, or None for all")
        query = select(EVENTS).where(
            *event_conditions(
                kinds=kinds,
                since=since,
                until=until,
                after_id=after_id,
                named={
                    "model_version": model_version,
                    "experiment": experiment,
                    "request_id": request_id,
                },
            )
        )
        query = query.order_by(EVENTS.c.id.desc() if newest_first else EVENTS.c.id).limit(limit)
        with self._reading() as connection:
            return [to_event(row) for row in connection.execute(query)]

    def count_events(
        self,
        *,
        kinds: Sequence[str] | None = None,
        since: float | None = None,
        until: float | None = None,
        after_id: int | None = None,
        model_version: str | None = None,
        experiment: str | None = None,
        request_id: str | None = None,
    ) -> int:
        """How many events pass every filter given; the filters are those of `events`."""
        conditions = event_conditions(
            kinds=kinds,
            since=since,
            until=until,
            after_id=after_id,
            named={
                "model_version": model_version,
                "experiment": experiment,
                "request_id": request_id,
            },
        )
        query = select(func.count()).select_from(EVENTS).where(*conditions)
        with self._reading() as connection:
            return connection.execute(query).scalar_one()

    def delete_events(
        self,
        kinds: Sequence[str],
        *,
        until: float | None = None,
        request_id: str | None = None,
        dry_run: bool = False,
    ) -> int:
        """Delete events that hold what people wrote; all others are kept for good.

        A "purge" event says how many went. It has an id after every other, theirs too, so that
        whoever reads by `after_id` misses nothing. `overwrite_deleted` makes them unreadable.

        Args:
            kinds: of "text" and "verdict".
            until: those before this time, in unix seconds; None is all.
            request_id: those of this request.
            dry_run: only count.

        Returns:
            How many were deleted, or would be.

        Raises:
            DataError: another kind is named.
        """
        others = sorted(set(kinds) - set(DELETABLE))
        if others:
            raise DataError(f"events of kind {others[0]!r} are never deleted; only {DELETABLE} are")
        named = {"request_id": request_id}
        conditions = event_conditions(
            kinds=kinds, since=None, until=until, after_id=None, named=named
        )
        if dry_run:
            return self.count_events(kinds=kinds, until=until, request_id=request_id)
        with self._writing() as connection:
            return purge_events(connection, conditions, until=until, request_id=request_id)

    def overwrite_deleted(self) -> None:
        """Leave nothing readable of what was deleted; SQLite's log and file would keep it a while.

        PostgreSQL keeps it until its vacuum, and nothing is done there.

        Raises:
            StoreLocked: other processes used the file all the while; what was deleted stays so.
        """
        self._refuse_misuse()
        if self._engine.dialect.name == "sqlite":
            with faults_named(self.where):
                empty_write_ahead_log(self._engine, self.where)

    def put_model_version(self, version: ModelVersion) -> None:
        """Register a version; registering the same again changes nothing.

        Raises:
            DataError: that version is there already and says something else.
        """
        row = row_of(version)
        with self._writing() as connection:
            connection.execute(
                insert_into(connection, MODEL_VERSIONS).on_conflict_do_nothing(), row
            )
            query = select(MODEL_VERSIONS).where(MODEL_VERSIONS.c.version == row["version"])
            there = row_of(to_model_version(connection.execute(query).one()))
        # Two gateways that load one model both register it, a moment apart.
        wrong = [name for name, value in row.items() if name != "created" and there[name] != value]
        if wrong:
            raise DataError(
                f"model version {version.version} is registered with another {wrong[0]}: "
                f"{there[wrong[0]]}, not {row[wrong[0]]}; a version never changes, so other "
                "weights need another one"
            )

    def model_versions(self, name: str | None = None) -> list[ModelVersion]:
        """All versions, or those of one model, oldest first."""
        query = select(MODEL_VERSIONS).order_by(MODEL_VERSIONS.c.created, MODEL_VERSIONS.c.version)
        if name is not None:
            query = query.where(MODEL_VERSIONS.c.name == name)
        with self._reading() as connection:
            return [to_model_version(row) for row in connection.execute(query)]

    def model_version(self, version: str) -> ModelVersion | None:
        """The version by that digest, or None."""
        query = select(MODEL_VERSIONS).where(MODEL_VERSIONS.c.version == version)
        with self._reading() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else to_model_version(row)

    def champion(self, name: str) -> Champion | None:
        """The version of that model that serves now, or None."""
        with self._reading() as connection:
            return champion_of(connection, name)

    def champion_history(self, name: str, *, since_revision: int = 1) -> list[Champion]:
        """The model's champions from a revision on, oldest first; the last one serves now."""
        with self._reading() as connection:
            return champions_of(connection, name, since_revision=since_revision)

    def set_champion(
        self,
        name: str,
        *,
        expected: str | None,
        version: str,
        reason: dict[str, Any],
        expected_revision: int | None = None,
        event_kind: str | None = None,
    ) -> Champion:
        """Make a version the champion, if the champion is still the expected one.

        Args:
            name: of the model.
            expected: version that the caller believes to serve; None for none yet.
            version: to serve from now on; it must be registered under `name`.
            reason: kept in the history.
            expected_revision: of the champion that the caller believes to serve: a version that
                was replaced and came back has another one. None takes any.
            event_kind: kind of the event that tells of it, appended in the same transaction.

        Raises:
            ChampionMoved: another version serves, so that the caller decided on old knowledge.
            DataError: the version is not registered under that name, or serves already.
        """
        if version == expected:
            raise DataError(f"{version} is given as the champion of {name!r} before and after")
        wanted = Champion(
            name=name,
            version=version,
            previous=expected,
            revision=1,
            since=time.time(),
            reason=reason,
        )
        row_of(wanted)  # refuse what cannot be stored before anything is read
        try:
            with self._writing() as connection:
                now = champion_of(connection, name)
                found = now.version if now else None
                revision = now.revision if now else None
                if found != expected or expected_revision not in (None, revision):
                    raise ChampionMoved(name, expected=expected, found=found)
                refuse_other_models(connection, name, version)
                made = replace(wanted, revision=now.revision + 1 if now else 1)
                connection.execute(insert(CHAMPIONS), row_of(made))
                if event_kind is not None:
                    append_events(connection, [row_of(champion_event(made, kind=event_kind))])
                return made
        except IntegrityError:
            # PostgreSQL let another writer in between reading and inserting; that one has won.
            now = self.champion(name)
            found = now.version if now else None
            raise ChampionMoved(name, expected=expected, found=found) from None

    def put_experiment(
        self, experiment: Experiment, *, expected: Experiment | None, event: Event | None = None
    ) -> None:
        """Add an experiment, or replace the one of that name if it is still as it was read.

        Args:
            experiment: as it is to be.
            expected: as it was read; None for a new one.
            event: that tells of it, appended in the same transaction.

        Raises:
            ExperimentMoved: another process began, stopped or changed it meanwhile.
        """
        rows = [] if event is None else [row_of(event)]
        with self._writing() as connection:
            write_experiment(connection, experiment, expected=expected)
            if rows:
                append_events(connection, rows)

    def experiment(self, name: str) -> Experiment | None:
        """The experiment of that name, or None."""
        with self._reading() as connection:
            return experiment_by_name(connection, name)

    def experiments(self) -> list[Experiment]:
        """All experiments, oldest first."""
        with self._reading() as connection:
            return all_experiments(connection)

    def put_alert(self, alert: AlertRow) -> None:
        """Add an alert, or replace the one of that fingerprint."""
        self._put(ALERTS, row_of(alert), key="fingerprint")

    def alerts(self, status: str | None = None) -> list[AlertRow]:
        """Alerts as they stand, or those of one status, by the time they began."""
        query = select(ALERTS).order_by(ALERTS.c.starts_at, ALERTS.c.fingerprint)
        if status is not None:
            query = query.where(ALERTS.c.status == status)
        with self._reading() as connection:
            return [to_alert(row) for row in connection.execute(query)]

    def begin_cycle(
        self, name: str, *, state: str, payload: dict[str, Any], lease: Lease | None = None
    ) -> Cycle:
        """Begin a model's next cycle.

        Args:
            name: of the model.
            state: its first step.
            payload: what it is asked to do.
            lease: that must still be held.

        Raises:
            CycleMoved: a cycle of that model goes on.
            LeaseHeld: the lease was lost.
        """
        with self._writing() as connection:
            return begin_cycle(connection, name, state=state, payload=payload, lease=lease)

    def move_cycle(
        self,
        cycle: Cycle,
        *,
        state: str,
        payload: dict[str, Any],
        ends: bool = False,
        lease: Lease | None = None,
    ) -> Cycle:
        """Bring a cycle to its next state, if it is still as it was read.

        Args:
            cycle: as it was read.
            state: that it comes to.
            payload: in place of the one it has.
            ends: whether the cycle is over.
            lease: that must still be held.

        Raises:
            CycleMoved: somebody else moved it.
            LeaseHeld: the lease was lost.
        """
        with self._writing() as connection:
            moved = replace(cycle, state=state, payload=payload)
            return move_cycle(connection, moved, ends=ends, lease=lease)

    def cycles(self, name: str | None = None, *, open_only: bool = False) -> list[Cycle]:
        """All cycles, or those of one model, or only those that go on, by name and number."""
        with self._reading() as connection:
            return cycles_of(connection, name, open_only=open_only)

    def take_lease(self, name: str, *, holder: str, seconds: float) -> Lease:
        """Take a lease that nobody holds, or renew one's own.

        Args:
            name: what the holder alone may do.
            holder: who asks; no two may have one name.
            seconds: how long it lasts unless it is renewed, above 0, by this machine's clock.

        Raises:
            LeaseHeld: another one holds it.
        """
        with self._writing() as connection:
            return take_lease(connection, name, holder=holder, seconds=seconds)

    def drop_lease(self, lease: Lease) -> None:
        """Give a lease back; nothing happens if it is another's by now."""
        with self._writing() as connection:
            drop_lease(connection, lease)

    def lease(self, name: str) -> Lease | None:
        """The lease of that name, which may be over; None if nobody holds it."""
        with self._reading() as connection:
            return lease_by_name(connection, name)

    def close(self) -> None:
        """Give the connections back; the store cannot be used afterwards."""
        self._closed = True
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _put(self, table: Table, row: Mapping[str, Any], *, key: str) -> None:
        with self._writing() as connection:
            statement = insert_into(connection, table)
            changed = {name: statement.excluded[name] for name in row if name != key}
            connection.execute(
                statement.on_conflict_do_update(index_elements=[key], set_=changed), row
            )

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        self._refuse_misuse()
        with faults_named(self.where), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        self._refuse_misuse()
        if self.read_only:
            raise StoreError(f"store {self.where} was opened read-only; nothing can be written")
        with faults_named(self.where), self._writer.begin() as connection:
            yield connection

    def _refuse_misuse(self) -> None:
        if self._closed:
            raise StoreError(f"store {self.where} was closed; open it again")
        # A connection that two processes share mixes up their transactions.
        if os.getpid() != self._process:
            raise StoreError(
                f"store {self.where} was opened by process {self._process}, not by this one, "
                f"{os.getpid()}; open it again after the fork"
            )
