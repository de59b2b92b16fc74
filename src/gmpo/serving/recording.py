"""Events written to the store beside the requests: a slow or full store never delays an answer."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from gmpo.errors import GmpoError, StoreError, what_was_raised
from gmpo.serving.answer_record import AnswerRecord
from gmpo.serving.supervision import Outage
from gmpo.store import Event, Store

__all__ = ["EventWriter"]

_BATCH = 256
_FIRST_RETRY_SECONDS = 0.1
_LAST_RETRY_SECONDS = 5.0


class EventWriter:
    """A queue in front of a store, emptied by a thread of its own.

    What does not fit into the queue is lost and counted; what the store does not take is tried
    again until it does. Why it does not is told once, and when it does again; so is why no sample
    can be taken, and what no store could hold. Written events are in the order in which they were
    put.

    Args:
        store: stays open; close it after the writer.
        capacity: events that may wait.
        sample: figures of the process, written as a "metric" event every `sample_seconds`.
        sample_seconds: time between two of them.
        record_texts: whether whole answers are kept with their texts, as "text" events, where the
            request allows it.
        tell: told of failures in one sentence, by the thread that writes.
    """

    def __init__(
        self,
        store: Store,
        *,
        capacity: int = 10_000,
        sample: Callable[[], Mapping[str, float]] | None = None,
        sample_seconds: float = 60.0,
        record_texts: bool = False,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._store = store
        self._capacity = capacity
        self._sample = sample
        self._sample_seconds = sample_seconds
        self._record_texts = record_texts
        self._tell = tell
        self._unwritten = Outage(tell)
        self._unsampled = Outage(tell)
        self._queue: deque[Event] = deque()
        self._changed = threading.Condition()
        self._deadline: float | None = None
        self._is_over = False
        self.num_written = 0
        """Events in the store."""
        self.num_lost = 0
        """Events that found no room, or were still waiting when the time for closing was over."""
        self.num_refused = 0
        """Events that no store could hold."""
        self._thread = threading.Thread(target=self._run, name="gmpo-events", daemon=True)
        self._thread.start()

    @property
    def num_failures(self) -> int:
        """Attempts at writing that failed; the same events were tried again."""
        return self._unwritten.num_failures

    @property
    def num_failed_samples(self) -> int:
        """Samples that could not be taken."""
        return self._unsampled.num_failures

    def counts(self) -> dict[str, int]:
        """What became of the events so far."""
        return {
            "written": self.num_written,
            "waiting": len(self._queue),
            "lost": self.num_lost,
            "refused": self.num_refused,
            "failed_writes": self.num_failures,
            "failed_samples": self.num_failed_samples,
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
        """Write what is waiting, for at most so long, and end.

        What is left then is lost, a write that has not returned among it.
        """
        with self._changed:
            self._deadline = time.monotonic() + timeout_seconds
            self._changed.notify()
        self._thread.join(timeout_seconds)
        with self._changed:
            self._is_over = True
            self.num_lost += len(self._queue)
            self._queue.clear()
            self._changed.notify()

    def _run(self) -> None:
        next_sample = time.monotonic() + self._sample_seconds
        while not self._is_over:
            with self._changed:
                while not self._queue and self._deadline is None:
                    if not self._changed.wait(max(0.0, next_sample - time.monotonic())):
                        break
                batch = [self._queue[place] for place in range(min(_BATCH, len(self._queue)))]
            if time.monotonic() >= next_sample:
                self._put_sample()
            while next_sample <= time.monotonic():
                next_sample += self._sample_seconds
            if batch and not self._is_late():
                self._write(batch)
            elif self._deadline is not None:
                return

    def _put_sample(self) -> None:
        if self._sample is None:
            return
        try:
            sampled = dict(self._sample())
        except Exception as error:  # noqa: BLE001  (told, counted; events go on without a sample)
            self._unsampled.goes_on(
                f"the process's figures cannot be taken: {_reason(error)}; they are taken "
                f"again every {self._sample_seconds:g} s"
            )
            return
        self._unsampled.is_over("the process's figures are taken again")
        self.put(Event(kind="metric", time=time.time(), payload=sampled))

    def _write(self, batch: list[Event]) -> None:
        """Write events that stay in the queue until they are in the store."""
        delay = _FIRST_RETRY_SECONDS
        while not self._is_over:
            try:
                self._store.add_events(batch)
            except (StoreError, OSError, MemoryError) as error:
                self._unwritten.goes_on(
                    f"events cannot be written: {_reason(error)}; they wait, up to "
                    f"{self._capacity}, and what comes beyond is lost and counted"
                )
                if self._is_late():
                    return
                with self._changed:
                    self._changed.wait(delay)
                delay = min(2 * delay, _LAST_RETRY_SECONDS)
            except Exception as error:  # noqa: BLE001  (each event is tried alone; told, counted)
                self._write_each(batch, error)
                return
            else:
                self._unwritten.is_over("events are written again")
                self.num_written += self._taken(len(batch))
                return

    def _write_each(self, batch: list[Event], error: Exception) -> None:
        """Write one by one what could not be written together, and leave out what no store holds.

        A store names such an event by a DataError; any other error would come again as well.
        """
        if len(batch) == 1:
            if self.num_refused == 0:
                # A database's own error quotes the row, and with it what users wrote.
                reason = str(error) if isinstance(error, GmpoError) else type(error).__name__
                self._tell(
                    f"an event of kind {batch[0].kind!r} cannot be stored and is left out: "
                    f"{reason}; further ones are counted as `refused`"
                )
            self.num_refused += self._taken(1)
            return
        for event in batch:
            if self._is_over or self._is_late():
                return
            self._write([event])

    def _is_late(self) -> bool:
        return self._deadline is not None and time.monotonic() > self._deadline

    def _taken(self, count: int) -> int:
        """Take so many events out of the queue; none once all were counted as lost."""
        with self._changed:
            if self._is_over:
                return 0
            for _ in range(count):
                self._queue.popleft()
            return count


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, GmpoError) else what_was_raised(error)


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
