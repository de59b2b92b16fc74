"""Rows on their way to trackers: training hands them over and goes on, whatever a tracker does."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from gmpo.trackers.tools import OPENERS, Row, TrackedRun, Tracker

__all__ = ["Trackers"]

_MOST_WAITING_ROWS = 1000
"""Rows kept for a tracker that is behind; about 200 rounds of 4 steps."""
_FAILURES_TO_OFF = 5
"""Failures in a row after which a tracker gets nothing more from this process."""
_CLOSING_SECONDS = 30.0
"""Longest wait for all trackers together when training ends."""


class Trackers:
    """Hands a run's rows to its trackers, each in a thread of its own.

    A call that raises is counted and made again with the next row; after 5 failures in a row the
    tracker is off. A call that never returns holds up its own thread only: up to 1,000 rows wait,
    further ones are dropped and counted. What is missing is sent when the run is resumed.

    Args:
        names: keys of `OPENERS`.
        run: what the trackers are told about it.
        earlier: rows of `metrics.jsonl` so far; those a tracker lacks are sent first.
        warn: told in one sentence what fails, once a tracker and kind of failure; called from the
            trackers' threads.
    """

    def __init__(
        self,
        names: Iterable[str],
        run: TrackedRun,
        *,
        earlier: Iterable[Row] = (),
        warn: Callable[[str], None],
    ) -> None:
        rows = list(earlier)
        self._warn = warn
        self._feeds = [_Feed(name, OPENERS[name], run, rows, warn) for name in names]
        self._counted = {"errors": 0, "dropped": 0}

    def send(self, row: Row) -> None:
        """Hand a row over; returns at once."""
        for feed in self._feeds:
            feed.send(row)

    def new_counts(self) -> dict[str, float]:
        """Failed calls and dropped rows since this was last asked; empty without trackers."""
        if not self._feeds:
            return {}
        now = {
            "errors": sum(feed.num_errors for feed in self._feeds),
            "dropped": sum(feed.num_dropped for feed in self._feeds),
        }
        before, self._counted = self._counted, now
        return {f"tracking/{what}_total": float(now[what] - before[what]) for what in now}

    def close(self) -> None:
        """Let the trackers finish, for at most 30 seconds; rows that did not arrive are named."""
        for feed in self._feeds:
            feed.end()
        deadline = time.monotonic() + _CLOSING_SECONDS
        for feed in self._feeds:
            has_ended = feed.has_ended(within=max(0.0, deadline - time.monotonic()))
            num_left = feed.give_up()
            if num_left or not has_ended:
                how = "ended" if has_ended else f"has not ended after {_CLOSING_SECONDS:g} s,"
                self._warn(
                    f"tracker {feed.name!r} {how} with {num_left} rows not written; "
                    "metrics.jsonl has them all, and a resumed run sends them"
                )


class _Feed:
    """One tracker's thread, what waits for it, and what went wrong."""

    def __init__(
        self,
        name: str,
        opener: Callable[[TrackedRun], Tracker],
        run: TrackedRun,
        earlier: Sequence[Row],
        warn: Callable[[str], None],
    ) -> None:
        self.name = name
        self.num_errors = 0
        self.num_dropped = 0
        self._open = partial(opener, run)
        self._tracker: Tracker | None = None
        self._waiting: deque[Row] = deque(earlier)
        self._most_waiting = len(earlier) + _MOST_WAITING_ROWS
        self._failures_in_a_row = 0
        self._has_news = self._is_off = self._is_ending = False
        self._has_warned = {"failed": False, "behind": False}
        self._warn = warn
        self._changed = threading.Condition()
        # A daemon: a call that never returns must not keep the process alive.
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def send(self, row: Row) -> None:
        with self._changed:
            is_behind = len(self._waiting) >= self._most_waiting
            if self._is_off or is_behind:
                self.num_dropped += 1
            else:
                self._waiting.append(row)
                self._has_news = True
                self._changed.notify()
        if is_behind:
            self._warn_once(
                "behind",
                f"tracker {self.name!r} is {_MOST_WAITING_ROWS} rows behind; further ones are "
                "dropped until it goes on, metrics.jsonl has them all and a resumed run sends them",
            )

    def end(self) -> None:
        with self._changed:
            self._is_ending = True
            self._changed.notify()

    def has_ended(self, *, within: float) -> bool:
        self._thread.join(timeout=within)
        return not self._thread.is_alive()

    def give_up(self) -> int:
        """Write nothing more, should a call ever return; rows that had not been written."""
        with self._changed:
            self._is_off = True
            num_left = len(self._waiting)
            self._waiting.clear()
        return num_left

    def _work(self) -> None:
        """Deliver what waits, again whenever there is news, and once more after the end."""
        while True:
            with self._changed:
                is_last, self._has_news = self._is_ending, False
            self._try(self._deliver)
            with self._changed:
                if self._is_off or is_last:
                    break
                self._changed.wait_for(lambda: self._has_news or self._is_ending)
        if self._tracker is not None:
            self._try(self._tracker.close)

    def _deliver(self) -> None:
        if self._tracker is None:
            self._tracker = self._open()
        while (row := self._next()) is not None:
            if not self._tracker.holds(row):
                self._tracker.write(row)
            with self._changed:
                if self._waiting:
                    self._waiting.popleft()

    def _next(self) -> Row | None:
        with self._changed:
            return self._waiting[0] if self._waiting else None

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - whatever third-party code raises is counted
            self._note_failure(error)
        else:
            self._failures_in_a_row = 0

    def _note_failure(self, error: Exception) -> None:
        self._failures_in_a_row += 1
        reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        with self._changed:
            self.num_errors += 1
            if self._is_off:
                return  # given up already, and said so
            self._is_off = self._failures_in_a_row >= _FAILURES_TO_OFF
            if self._is_off:
                self.num_dropped += len(self._waiting)
                self._waiting.clear()
        self._warn_once(
            "failed",
            f"tracker {self.name!r} failed ({reason}); training goes on, metrics.jsonl has every "
            "row, and it is tried again with the next one",
        )
        if self._is_off:
            self._warn(
                f"tracker {self.name!r} is off after {_FAILURES_TO_OFF} failures in a row (the "
                f"last: {reason}); a resumed run sends it what it lacks"
            )

    def _warn_once(self, what: str, sentence: str) -> None:
        if not self._has_warned[what]:
            self._has_warned[what] = True
            self._warn(sentence)
