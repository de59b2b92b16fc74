"""How updates are screened, weighed and put together."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from gmpo.task_config import Table

__all__ = ["CLIENT_NAME", "MOST_UPDATES", "AggregationSettings", "Rule", "Score"]

CLIENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
"""What a client or a suite may be called: it is part of a file's name and of tables."""

MOST_UPDATES = 256
"""Of a round: each is an open file and a piece in memory at a time."""

Rule = Literal["mean", "geometric_median"]
"""What the new weights are: the weighted mean of the clients', or their geometric median."""

Score = Literal["accuracy", "agreement"]
"""What a client's weight may depend on, in [0, 1] and measured by the server: the accuracy of its
own model on the server's items, or the cosine of its update with all clients' geometric median."""


class AggregationSettings(Table):
    """From clients' updates to the next model."""

    rule: Rule = "mean"
    """mean is the geometric mean of the clients' policies, to first order; geometric_median bears
    that fewer than half of the weight is far off."""
    weigh_by: Literal["sequences", "equal"] = "sequences"
    """A client's weight before its scores: its completions, by its own account, or 1."""
    score_exponents: dict[Score, float] = Field(default={})
    """Exponent of each score in a client's weight: a score of 0 leaves the client out."""
    largest_norm: float = Field(default=3.0, gt=1)
    """Longest update that is taken, in median lengths of this round's."""
    least_cosine: float = Field(default=0.0, ge=-1, lt=1)
    """Least cosine with the geometric median of the round's updates; -1 takes any."""
    min_clients: int | None = Field(default=None, ge=1)
    """Updates that must be left; None is more than half of the clients."""
    step_size: float = Field(default=1.0, gt=0, le=10)
    """What the aggregated update is multiplied by before it is added to the weights."""

    @field_validator("score_exponents")
    @classmethod
    def _exponents_are_positive(cls, exponents: dict[Score, float]) -> dict[Score, float]:
        for name, exponent in exponents.items():
            if not exponent > 0:
                raise ValueError(f"exponent of {name} is {exponent:g}; it must be above 0")
        return exponents
