"""The store as the page sees it: read-only, and every event read once."""

from __future__ import annotations

import threading

from gmpo.dashboard.traffic import Traffic, TrafficLog
from gmpo.store import Store, open_store

__all__ = ["StoreWatch"]

_AT_ONCE = 10_000


class StoreWatch:
    """Traffic of a store that is written while it is watched; threads may share one.

    Args:
        url: path or URL.
        max_events: how far back the first look goes, in events of all kinds; what lies before is
            not read, and counted.

    Raises:
        StoreError: as for `open_store`.
        ConfigError: as for `open_store`.
    """

    def __init__(self, url: str, *, max_events: int = 500_000) -> None:
        self.store: Store = open_store(url, read_only=True)
        self._max_events = max_events
        self._lock = threading.Lock()
        self._log = TrafficLog()
        self._last_id: int | None = None
        self.num_skipped = 0
        """Events that were there before the first look and too many to read."""

    def traffic(self) -> Traffic:
        """Everything up to now; only what came since the last call is read.

        Raises:
            StoreError: the store cannot be read now; a later call may.
        """
        with self._lock:
            if self._last_id is None:
                self._last_id = self._where_to_begin()
            while True:
                # No filter by kind: ids are the table's own order, so nothing has to be sorted.
                events = self.store.events(after_id=self._last_id, limit=_AT_ONCE)
                if not events:
                    return self._log.traffic()
                self._log.add(events)
                assert events[-1].id is not None
                self._last_id = events[-1].id

    def _where_to_begin(self) -> int:
        newest = self.store.events(newest_first=True, limit=1)
        if not newest or newest[0].id is None:
            return 0
        begin = max(0, newest[0].id - self._max_events)
        if begin:
            self.num_skipped = self.store.count_events() - self.store.count_events(after_id=begin)
        return begin
