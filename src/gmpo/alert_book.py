"""Alerts as they are told, kept in the store: each as it stands, and each change as an event."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from gmpo.errors import StoreError
from gmpo.monitoring.alerts import Notification, fingerprint
from gmpo.store import AlertRow, Event, Store

__all__ = ["AlertBook"]


class AlertBook:
    """Writes alerts; what the store does not take waits for the next look.

    Args:
        store: open for writing.
        is_ours: whether alerts with these labels are of this monitor, and of no other.
    """

    def __init__(self, store: Store, *, is_ours: Callable[[Mapping[str, str]], bool]) -> None:
        self._store = store
        self._is_ours = is_ours
        self._waiting: deque[Notification] = deque()
        self.num_failures = 0
        """Looks at which the store took nothing, or not everything."""

    def write(self, notifications: Sequence[Notification]) -> StoreError | None:
        """Write what is told, after what waited; the error if not all of it could be written."""
        self._waiting.extend(notifications)
        try:
            while self._waiting:
                self._write(self._waiting[0])
                self._waiting.popleft()
        except StoreError as error:
            self.num_failures += 1
            return error
        return None

    @property
    def num_waiting(self) -> int:
        """Changes that are not in the store."""
        return len(self._waiting)

    def end_all_but(self, firing: Sequence[Mapping[str, str]]) -> None:
        """End our alerts that an earlier monitor left firing and that are over.

        Args:
            firing: labels, severity included, of those that last.

        Raises:
            StoreError: the store cannot be read or written.
        """
        lasting = {fingerprint(labels) for labels in firing}
        for row in self._store.alerts(status="firing"):
            labels = row.payload["labels"]
            if row.fingerprint not in lasting and self._is_ours(labels):
                now = time.time()
                self._write(
                    Notification(
                        status="resolved",
                        labels=labels,
                        annotations=row.payload["annotations"],
                        starts_at=row.starts_at,
                        ends_at=now,
                        valid_until=now,
                    )
                )

    def _write(self, one: Notification) -> None:
        payload = {"labels": dict(one.labels), "annotations": dict(one.annotations)}
        row = AlertRow(
            fingerprint=fingerprint(one.labels),
            status=one.status,
            severity=one.labels["severity"],
            starts_at=one.starts_at,
            ends_at=one.ends_at,
            payload=payload,
        )
        # The row first: it may be written twice, an event must not be.
        self._store.put_alert(row)
        change = {**payload, "fingerprint": row.fingerprint, "status": row.status}
        version = one.labels.get("model_version", "none")
        self._store.add_events(
            [
                Event(
                    kind="alert",
                    time=time.time(),
                    payload=change,
                    model_version=None if version == "none" else version,
                )
            ]
        )
