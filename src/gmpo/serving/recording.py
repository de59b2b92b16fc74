"""Events written to the store beside the requests: a slow or full store never delays an answer."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from gmpo.errors import DataError, StoreError
from gmpo.serving.answer_record import AnswerRecord
from gmpo.store import Event, Store

__all__ = ["EventWriter"]

_BATCH = 256
_FIRST_RETRY_SECONDS = 0.1
_LAST_RETRY_SECONDS = 5.0


class EventWriter:
    """A queue in front of a store, emptied by a thread of its own.

    What does not fit into the queue is lost and counted; what the store does not take is tried
    again until it does. Written events are in the order in which they were put.

    Args:
        store: stays open; close it after the writer.
        capacity: events that may wait.
        sample: figures of the process, written as a "metric" event every `sample_seconds`.
        sample_seconds: time between two of them.
        record_texts: whether whole answers are kept with their texts, as "text" events, where the
            request allows it.
    """

    def __init__(
        self,
        store: Store,
        *,
        capacity: int = 10_000,
        sample: Callable[[], Mapping[str, float]] | None = None,
        sample_seconds: float = 60.0,
        record_texts: bool = False,
    ) -> None:
        self._store = store
        self._capacity = capacity
        self._sample = sample
        self._sample_seconds = sample_seconds
        self._record_texts = record_texts
        self._queue: deque[Event] = deque()
        self._changed = threading.Condition()
        self._deadline: float | None = None
        self.num_written = 0
        """Events in the store."""
        self.num_lost = 0
        """Events that found no room, or were still waiting when the time for closing was over."""
        self.num_refused = 0
        """Events that no store could hold."""
        self.num_failures = 0
        """Attempts at writing that failed; the same events were tried again."""
        self._thread = threading.Thread(target=self._run, name="gmpo-events", daemon=True)
        self._thread.start()

    def counts(self) -> dict[str, int]:
        """What became of the events so far."""
        return {
            "written": self.num_written,
            "waiting": len(self._queue),
            "lost": self.num_lost,
            "refused": self.num_refused,
            "failed_writes": self.num_failures,
        }

    def observe(self, record: AnswerRecord) -> None:
        """Put the "answer" event of an answer that is over, and its texts apart from it."""
        self.put(_event_of(record, "answer", record.payload()))
        texts = record.text_payload() if self._record_texts else None
        if texts is not None:
            self.put(_event_of(record, "text", texts))

    def put(self, event: Event) -> None:
        """Have an event written soon; never waits."""
        with self._changed:
            if self._deadline is not None or len(self._queue) >= self._capacity:
                self.num_lost += 1
                return
            self._queue.append(event)
            self._changed.notify()

    def close(self, *, timeout_seconds: float = 10.0) -> None:
        """Write what is waiting, for at most so long, and end."""
        with self._changed:
            self._deadline = time.monotonic() + timeout_seconds
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        next_sample = time.monotonic() + self._sample_seconds
        while True:
            with self._changed:
                while not self._queue and self._deadline is None:
                    if not self._changed.wait(max(0.0, next_sample - time.monotonic())):
                        break
                batch = [self._queue[place] for place in range(min(_BATCH, len(self._queue)))]
            if self._sample is not None and time.monotonic() >= next_sample:
                sampled = dict(self._sample())
                self.put(Event(kind="metric", time=time.time(), payload=sampled))
            while next_sample <= time.monotonic():
                next_sample += self._sample_seconds
            if batch:
                self._write(batch)
            elif self._deadline is not None:
                return

    def _write(self, batch: list[Event]) -> None:
        """Write events that stay in the queue until they are in the store."""
        delay = _FIRST_RETRY_SECONDS
        while True:
            try:
                self._store.add_events(batch)
            except DataError:
                if len(batch) > 1:
                    for event in batch:
                        self._write([event])
                    return
                self._take(1)
                self.num_refused += 1
                return
            except StoreError:
                self.num_failures += 1
                if self._is_late():
                    self._take(len(batch))
                    self.num_lost += len(batch)
                    return
                with self._changed:
                    self._changed.wait(delay)
                delay = min(2 * delay, _LAST_RETRY_SECONDS)
            else:
                self._take(len(batch))
                self.num_written += len(batch)
                return

    def _is_late(self) -> bool:
        return self._deadline is not None and time.monotonic() > self._deadline

    def _take(self, count: int) -> None:
        with self._changed:
            for _ in range(count):
                self._queue.popleft()


def _event_of(record: AnswerRecord, kind: str, payload: dict[str, Any]) -> Event:
    report = record.report
    return Event(
        kind=kind,
        time=record.time,
        payload=payload,
        model_version=report.model_version,
        experiment=report.experiment,
        unit=record.request.unit or None,
        request_id=record.request.id,
    )
