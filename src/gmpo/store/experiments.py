"""Experiments: one row each, by name."""

from __future__ import annotations

from sqlalchemy import Connection, select, update

from gmpo.errors import ExperimentMoved
from gmpo.store.records import Experiment
from gmpo.store.tables import EXPERIMENTS, insert_into, row_of, to_experiment

__all__ = ["all_experiments", "experiment_by_name", "write_experiment"]


def write_experiment(
    connection: Connection, experiment: Experiment, *, expected: Experiment | None
) -> None:
    """Write over the experiment that was read, or a new one; see `Store.put_experiment`."""
    row = row_of(experiment)
    if expected is None:
        unless_there = insert_into(connection, EXPERIMENTS).on_conflict_do_nothing()
        added = connection.execute(unless_there.returning(EXPERIMENTS.c.name), row)
        if added.one_or_none() is None:
            raise ExperimentMoved(
                f"there is an experiment {experiment.name!r} already; choose another name"
            )
        return
    # PostgreSQL's lock of the row: whoever else changes it comes before this look or after this
    # write. SQLite knows no such lock, and lets one writer in at a time.
    of_name = EXPERIMENTS.c.name == experiment.name
    there = connection.execute(select(EXPERIMENTS).where(of_name).with_for_update()).one_or_none()
    found = None if there is None else to_experiment(there)
    if found is None or row_of(found) != row_of(expected):
        raise ExperimentMoved(_meanwhile(experiment.name, found))
    connection.execute(update(EXPERIMENTS).where(of_name).values(row))


def _meanwhile(name: str, found: Experiment | None) -> str:
    """What another process did to an experiment between its being read and written."""
    if found is None:
        return f"experiment {name!r} is not there any more, so it was not changed"
    if found.status == "stopped":
        return f"experiment {name!r} was stopped meanwhile; it stays as it was stopped"
    return (
        f"experiment {name!r} was changed meanwhile by another process; nothing was written; "
        "look at it anew and try again"
    )


def experiment_by_name(connection: Connection, name: str) -> Experiment | None:
    """The experiment of that name, or None."""
    query = select(EXPERIMENTS).where(EXPERIMENTS.c.name == name)
    row = connection.execute(query).one_or_none()
    return None if row is None else to_experiment(row)


def all_experiments(connection: Connection) -> list[Experiment]:
    """All experiments, oldest first."""
    query = select(EXPERIMENTS).order_by(EXPERIMENTS.c.created, EXPERIMENTS.c.name)
    return [to_experiment(row) for row in connection.execute(query)]
