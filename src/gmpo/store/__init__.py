"""Where what happened is kept: events, model versions, champions, experiments and alerts."""

from gmpo.store.database import Store
from gmpo.store.opening import open_store
from gmpo.store.records import AlertRow, Champion, Event, Experiment, ModelVersion

__all__ = [
    "AlertRow",
    "Champion",
    "Event",
    "Experiment",
    "ModelVersion",
    "Store",
    "open_store",
]
