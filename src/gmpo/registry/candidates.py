"""What the gate decided about a model's versions, and who waits for a person by that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gmpo.store import Store

__all__ = ["Candidate", "newest_decision", "waiting"]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A version that passed the gate against the version that serves.

    Attributes:
        version: of the model.
        time: unix seconds of the decision.
        evidence: the decision.
    """

    version: str
    time: float
    evidence: Mapping[str, Any]


def waiting(store: Store, name: str) -> list[Candidate]:
    """Versions that passed against the champion that serves now, oldest first."""
    champion = store.champion(name)
    if champion is None:
        return []
    found: dict[str, Candidate] = {}
    # The revision says since when, not a time: clocks of machines differ, and are set back.
    for event in store.events(kinds=["gate"]):
        keys = ("name", "champion", "champion_revision")
        about = tuple(event.payload.get(key) for key in keys)
        candidate = event.payload.get("candidate")
        serving = (name, champion.version, champion.revision)
        if about != serving or not isinstance(candidate, str):
            continue
        found.pop(candidate, None)
        if event.payload.get("outcome") == "pass":
            found[candidate] = Candidate(version=candidate, time=event.time, evidence=event.payload)
    return list(found.values())


def newest_decision(
    store: Store, name: str, candidate: str, *, revision: int | None = None
) -> dict[str, Any] | None:
    """What the gate last said about a version, whatever it said; None if it was not asked.

    Args:
        store: with the decisions.
        name: of the model.
        candidate: version that they are about.
        revision: of the champion that it was compared with; None takes any.
    """
    for event in store.events(kinds=["gate"], model_version=candidate, newest_first=True):
        told = event.payload
        if told.get("name") == name and revision in (None, told.get("champion_revision")):
            return told
    return None
