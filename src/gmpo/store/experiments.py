"""Experiments: one row each, by name."""

from __future__ import annotations

from sqlalchemy import Connection, select

from gmpo.store.records import Experiment
from gmpo.store.tables import EXPERIMENTS, to_experiment

__all__ = ["all_experiments", "experiment_by_name"]


def experiment_by_name(connection: Connection, name: str) -> Experiment | None:
    """The experiment of that name, or None."""
    query = select(EXPERIMENTS).where(EXPERIMENTS.c.name == name)
    row = connection.execute(query).one_or_none()
    return None if row is None else to_experiment(row)


def all_experiments(connection: Connection) -> list[Experiment]:
    """All experiments, oldest first."""
    query = select(EXPERIMENTS).order_by(EXPERIMENTS.c.created, EXPERIMENTS.c.name)
    return [to_experiment(row) for row in connection.execute(query)]
