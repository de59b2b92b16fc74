"""Where what happened is kept: events, model versions, champions, experiments, alerts, cycles."""

from gmpo.store.database import Store
from gmpo.store.opening import open_store
from gmpo.store.records import (
    AlertRow,
    Champion,
    Cycle,
    Event,
    Experiment,
    Lease,
    ModelVersion,
)

__all__ = [
    "AlertRow",
    "Champion",
    "Cycle",
    "Event",
    "Experiment",
    "Lease",
    "ModelVersion",
    "Store",
    "open_store",
]
