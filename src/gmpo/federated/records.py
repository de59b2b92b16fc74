"""What is told of a federation: clients, rounds, and how far the mean is from the exact pool."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["Attempted", "ClientRow", "PoolGap", "RoundOutcome", "RoundReport"]

RoundOutcome = Literal["accepted", "fell_back", "kept"]
"""The model made by the plan's rule is the next one; that of the geometric median is, as the rule's
was not accepted; or the model stays as it was."""


@dataclass(frozen=True, kw_only=True)
class ClientRow:
    """One client's training in one round.

    Attributes:
        client: its name.
        outcome: "diverged" sent no update.
        message: what the run said last; empty if it finished.
        sequences: completions that it trained on.
        reward_start: mean reward of its first local round; None if none ended.
        reward_end: of its last.
        accuracy: of its own model on the server's items, where that was asked.
        seconds: that it trained.
    """

    client: str
    outcome: Literal["trained", "diverged"]
    message: str
    sequences: int
    reward_start: float | None
    reward_end: float | None
    accuracy: float | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class PoolGap:
    """How far a model is from the exact geometric mean of the clients' policies.

    Attributes:
        gap: mean over positions of KL(new model || log-linear pool), nats; at least 0.
        spread: mean over positions of sum_k a_k KL(new model || client k), nats: what the gap is to
            be held against.
        positions: next-token distributions compared.
    """

    gap: float
    spread: float
    positions: int


@dataclass(frozen=True, kw_only=True)
class Attempted:
    """One way of making the round's model, and what became of it.

    Attributes:
        version: of the model that was made.
        aggregation: rule, coefficients and what was left out, as `Aggregation.as_dict`.
        decision: of the gate, as `GateDecision.as_dict`; None where there was nothing to decide.
        is_accepted: whether the next round begins with it.
        why: what was decided by, in a sentence.
    """

    version: str
    aggregation: Mapping[str, Any]
    decision: Mapping[str, Any] | None
    is_accepted: bool
    why: str


@dataclass(frozen=True, kw_only=True)
class RoundReport:
    """One federated round.

    Attributes:
        number: from 1 on.
        outcome: of the round.
        sentence: what happened, for people.
        base: version that the round began with.
        model: version that it ended with.
        folder: of that model, below the federation's.
        clients: their training.
        attempts: models that were made, in order.
        accuracy: of `model`, by suite.
        gap: of the accepted model to the exact pool, where it was measured.
        seconds: that the round took, less what an earlier call had done of it.
    """

    number: int
    outcome: RoundOutcome
    sentence: str
    base: str
    model: str
    folder: str
    clients: tuple[ClientRow, ...]
    attempts: tuple[Attempted, ...]
    accuracy: Mapping[str, float]
    gap: PoolGap | None
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """As JSON; `from_dict` brings it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> RoundReport:
        """As `as_dict` wrote it."""
        found = dict(table)
        found["clients"] = tuple(ClientRow(**row) for row in table["clients"])
        found["attempts"] = tuple(Attempted(**one) for one in table["attempts"])
        found["gap"] = None if table["gap"] is None else PoolGap(**table["gap"])
        return cls(**found)
