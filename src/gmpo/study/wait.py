"""How long a call on a study waits for what other calls hold, and what it says meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gmpo.errors import StillHeld
from gmpo.locks import Holder

__all__ = ["WAIT_MINUTES", "Held", "Patience", "signs_of_runs"]

WAIT_MINUTES = 60.0
"""Without a sign of life, before a call gives up on others: a round of training is far shorter."""

_SAY_EVERY_SECONDS = 60


@dataclass(frozen=True, kw_only=True)
class Held:
    """What another call holds.

    Attributes:
        what: in a few words.
        holder: None if it is not known.
        signs: files and folders that change while it gets on.
    """

    what: str
    holder: Holder | None
    signs: tuple[Path, ...]

    def __str__(self) -> str:
        return f"{self.what} ({self.holder or 'of a process that is not known'})"


def signs_of_runs(study: Path, runs: Path, name: str = "*") -> tuple[Path, ...]:
    """What runs of a study folder write, `name` being one of them or a pattern."""
    found = list(study.glob(f"logs/{name}.log"))
    for run in runs.glob(name):
        found += [run, *(run / part for part in ("metrics.jsonl", "rounds", "checkpoints"))]
    return tuple(sorted(found))


class Patience:
    """Waits until what is held changes no more.

    Args:
        minutes: without any change, after which it gives up; 0 does not wait.
        say: told once a minute who is waited for.
        go_on: how to go on later, for the message, which it begins a sentence of.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        *,
        minutes: float,
        say: Callable[[str], None],
        go_on: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._minutes = minutes
        self._say = say
        self._go_on = go_on[0].upper() + go_on[1:]
        self._clock = clock
        self._state: object = None
        self._changed = self._said = clock()

    def wait_for(self, held: Sequence[Held]) -> None:
        """Say for whom this call waits, when it is time to; nothing held ends the waiting.

        Raises:
            StillHeld: nothing has changed for as long as it may.
        """
        now, before = self._clock(), self._state
        self._state = [(one.what, one.holder, list(_changes(one.signs))) for one in held] or None
        if not held:
            return
        if self._state != before:
            self._changed = now
        names = ", ".join(map(str, held))
        quiet = (now - self._changed) / 60
        if quiet >= self._minutes:
            raise StillHeld(
                f"not over in other calls: {names}; nothing has come of that for "
                f"{_minutes(self._minutes)}, as long as --wait allows. {self._go_on} once that is "
                "over, or its process is ended, which leaves what it holds to the next call"
            )
        if before is None or now - self._said >= _SAY_EVERY_SECONDS:
            self._said = now
            self._say(
                f"waiting for other calls: {names}; nothing new for {int(quiet)} of at most "
                f"{_minutes(self._minutes)}"
            )


def _changes(signs: Sequence[Path]) -> Iterator[tuple[Path, int, int]]:
    for path in signs:
        try:
            state = path.stat()
        except OSError:
            continue  # not there yet, or gone meanwhile
        yield path, state.st_size, state.st_mtime_ns


def _minutes(count: float) -> str:
    return "1 minute" if count == 1 else f"{count:g} minutes"
