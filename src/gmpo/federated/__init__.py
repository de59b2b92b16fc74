"""Federated GMPO: clients train on data that they keep, a server puts their updates together.

Importing these modules loads no torch, but for `gmpo.federated.pool`.
"""

from gmpo.federated.aggregation import Aggregation, ClientShare, aggregate, screen, write_aggregate
from gmpo.federated.geometry import geometric_median
from gmpo.federated.plan import (
    FederatedPlan,
    Federation,
    load_federated_plan,
    resolve_federation,
)
from gmpo.federated.records import PoolGap, RoundReport
from gmpo.federated.rounds import Coordinator, open_federation
from gmpo.federated.settings import AggregationSettings
from gmpo.federated.updates import ClientUpdate, read_update, write_update

__all__ = [
    "Aggregation",
    "AggregationSettings",
    "ClientShare",
    "ClientUpdate",
    "Coordinator",
    "FederatedPlan",
    "Federation",
    "PoolGap",
    "RoundReport",
    "aggregate",
    "geometric_median",
    "load_federated_plan",
    "open_federation",
    "read_update",
    "resolve_federation",
    "screen",
    "write_aggregate",
    "write_update",
]
