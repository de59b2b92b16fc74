"""Users' requests that ask what a cycle trained on: they say nothing of what the model learned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import asdict
from pathlib import Path

from gmpo.continual.plan import suite_prompts
from gmpo.feedback import asked_chat, chat_digest
from gmpo.store import Store

__all__ = ["TRAINED_ROWS", "TrainedRequests"]

TRAINED_ROWS = "train.jsonl"
"""File of the rows that a run trains on, in the folder of its step."""


class TrainedRequests:
    """Requests whose prompts are among a cycle's training rows, as far as texts are recorded.

    Prompts are one where their turns are, system turns, case and white space aside. Each look reads
    only what was recorded after the one before.

    Args:
        store: of the gateways.
        update: folder of the cycle's step `update`.
        since: unix seconds before which no request is looked at.

    Raises:
        DataError: the file of training rows is missing or damaged.
    """

    def __init__(self, store: Store, update: Path, *, since: float) -> None:
        self._store = store
        self._since = since
        self._trained = {
            _digest(asdict(turn) for turn in prompt.messages or ())
            for prompt in suite_prompts(str(update / TRAINED_ROWS))
        }
        self._last_id: int | None = None
        self._found: set[str] = set()

    def look(self) -> Set[str]:
        """The requests' ids, as far as they are known by now."""
        for event in self._store.events(kinds=["text"], since=self._since, after_id=self._last_id):
            self._last_id = event.id
            if event.request_id is None:
                continue
            if _digest(asked_chat(event.payload)) in self._trained:
                self._found.add(event.request_id)
        return self._found


def _digest(chat: Iterable[Mapping[str, str]]) -> str:
    return chat_digest([turn for turn in chat if turn["role"] != "system"])
