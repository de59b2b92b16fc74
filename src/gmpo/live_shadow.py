"""A candidate in the shadow of live traffic: what a cycle asks of gateways, and what came of it.

A cycle that serves its candidate somewhere calls for it in the store. Gateways that follow the
model have users' requests answered there too, unseen, and record how that went.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gmpo.abtest.records import ShadowPair, read_records
from gmpo.store import Event, Store

__all__ = [
    "CONTROLLER_SESSION",
    "LONGEST_ANSWER_SECONDS",
    "ShadowCall",
    "UsersPairs",
    "UsersShadows",
    "called",
    "standing_call",
    "users_answers",
]

CONTROLLER_SESSION = "gmpo-learn"
"""Session of requests that a cycle itself sends to a gateway: they are no users'."""

LONGEST_ANSWER_SECONDS = 3600.0
"""A shadow is recorded later than its request was made, by less than this."""

_KIND = "shadow_call"


@dataclass(frozen=True, kw_only=True)
class ShadowCall:
    """A candidate that gateways are to have answer users' requests, unseen.

    Attributes:
        name: of the model that the gateways follow.
        cycle: that tries the candidate.
        candidate: its version.
        url: of its server, with `/v1`.
        until: unix seconds from which on nobody is to ask it, whatever became of the cycle.
    """

    name: str
    cycle: int
    candidate: str
    url: str
    until: float

    @property
    def experiment(self) -> str:
        """Under which its answers are recorded."""
        return f"learn/{self.name}/{self.cycle}/users"


@dataclass(frozen=True, kw_only=True)
class UsersPairs:
    """Users' requests that both champion and candidate answered.

    Attributes:
        served: quality of what users got, in [0, 1], each user's mean, [U].
        shadow: the same of the candidate's unseen answers, [U].
        num_shadows: requests that the candidate was asked.
        num_failed: of these, requests that it did not answer, though it should have.
        num_trained_on: of the others, requests that ask what it was trained on.
        num_unpaired: others without a known quality on both sides: those that the candidate's
            server does not allow, because its limits are others, among them.
    """

    served: NDArray[np.float64]
    shadow: NDArray[np.float64]
    num_shadows: int
    num_failed: int
    num_trained_on: int
    num_unpaired: int

    @property
    def num_compared(self) -> int:
        """Requests whose two answers are compared."""
        return self.num_shadows - self.num_failed - self.num_trained_on - self.num_unpaired


@contextmanager
def called(store: Store, call: ShadowCall) -> Iterator[None]:
    """Have gateways shadow a candidate while the block runs."""
    _tell(store, call, until=call.until)
    try:
        yield
    finally:
        _tell(store, call, until=time.time())


def standing_call(store: Store, name: str, *, now: float | None = None) -> ShadowCall | None:
    """The candidate that is to be shadowed, or None.

    Args:
        store: of the cycles.
        name: of the model.
        now: unix seconds; None is the clock's.
    """
    found = store.events(kinds=[_KIND], experiment=f"learn/{name}", newest_first=True, limit=1)
    if not found or found[0].payload["until"] <= (time.time() if now is None else now):
        return None
    return ShadowCall(candidate=found[0].model_version or "", **found[0].payload)


def users_answers(
    store: Store, version: str, *, since: float, after_id: int | None = None
) -> list[Event]:
    """What users asked of a version, oldest first: "answer" events but those of cycles.

    Args:
        store: of the gateway.
        version: that answered, or was asked and failed.
        since: unix seconds.
        after_id: of an event; only those that were recorded later. None takes all.
    """
    found = store.events(kinds=["answer"], since=since, model_version=version, after_id=after_id)
    return [event for event in found if event.payload.get("session") != CONTROLLER_SESSION]


class UsersShadows:
    """What comes of a call: users' requests that the candidate answered too.

    What an earlier process of the same cycle gathered counts as well. A look reads what was
    recorded since the one before, and of users' answers those to the same requests alone.

    Args:
        store: of the gateway.
        call: for the candidate.
        champion: version that users are served.
    """

    def __init__(self, store: Store, call: ShadowCall, *, champion: str) -> None:
        self._store = store
        self._call = call
        self._champion = champion
        self._shadows: list[Event] = []
        self._answers: dict[str, Event] = {}

    def look(self, *, trained_on: Set[str] = frozenset()) -> UsersPairs:
        """The pairs so far. Requests of one user are evidence together: one pair of means.

        Args:
            trained_on: ids of requests that ask what the candidate was trained on: whether it
                answers them is counted, what it answers is not compared.
        """
        self._read()
        shadows = self._shadows
        failed = sum(event.payload.get("fault") not in (None, "bad_request") for event in shadows)
        compared = [
            event
            for event in shadows
            if event.request_id not in trained_on or event.payload.get("fault") is not None
        ]
        by_unit: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for pair in read_records([*compared, *self._answers.values()]).shadow_pairs:
            if (both := _qualities(pair)) is not None:
                by_unit[pair.unit].append(both)
        num_pairs = sum(map(len, by_unit.values()))
        means = np.array([np.mean(pairs, axis=0) for pairs in by_unit.values()]).reshape(-1, 2)
        return UsersPairs(
            served=means[:, 0],
            shadow=means[:, 1],
            num_shadows=len(shadows),
            num_failed=failed,
            num_trained_on=len(shadows) - len(compared),
            num_unpaired=len(compared) - failed - num_pairs,
        )

    def _read(self) -> None:
        self._shadows += self._store.events(
            kinds=["shadow"],
            experiment=self._call.experiment,
            model_version=self._call.candidate,
            after_id=self._shadows[-1].id if self._shadows else None,
        )
        # A gateway's events are written in their order, so nearly all of these are there by now.
        for shadow in self._shadows:
            if shadow.request_id is not None and shadow.request_id not in self._answers:
                for event in self._store.events(request_id=shadow.request_id):
                    if self._is_users(event):
                        self._answers[shadow.request_id] = event

    def _is_users(self, event: Event) -> bool:
        """Whether it is what the champion answered a user."""
        is_champions = event.kind == "answer" and event.model_version == self._champion
        return is_champions and event.payload.get("session") != CONTROLLER_SESSION


def _qualities(pair: ShadowPair) -> tuple[float, float] | None:
    if pair.served_quality is None or pair.shadow_quality is None:
        return None
    return pair.served_quality, pair.shadow_quality


def _tell(store: Store, call: ShadowCall, *, until: float) -> None:
    payload = {"name": call.name, "cycle": call.cycle, "url": call.url, "until": until}
    event = Event(
        kind=_KIND,
        time=time.time(),
        payload=payload,
        model_version=call.candidate,
        experiment=f"learn/{call.name}",
    )
    store.add_events([event])
