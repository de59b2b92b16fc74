"""The served weights follow the store's champion: promoting a version is what changes them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gmpo.errors import GmpoError, ModelError, StoreError
from gmpo.serving.supervision import Outage
from gmpo.store import ModelVersion, Store

__all__ = ["ChampionFollower"]


@dataclass(kw_only=True)
class _Refused:
    """A champion that could not be served, and when it is tried again."""

    version: str
    seconds: float
    """How long it is left alone after its next failure."""
    until: float = 0.0
    reason: str | None = None
    reason_instead: str | None = None
    """Why nothing else could be served in its place."""


class ChampionFollower:
    """Looks at a champion from time to time, and serves it once it is another one.

    A version that cannot be served is tried again after 10 seconds, then each time after twice as
    long, up to ten minutes; why it cannot be served is told once, and what is to serve in its place
    asked for as often. Memory that is short may be there later, and files may be restored.

    Args:
        store: where the champion is.
        name: of the model.
        serve: serves a version's weights; raises if it cannot.
        served: version that serves now.
        tell: told in one sentence of what cannot be done.
        instead: gives the version that is to serve in place of a champion that cannot be served, as
            `Registry.servable` does; None leaves what serves.
    """

    first_retry_seconds = 10.0
    """Until a champion that could not be served is tried again for the first time."""
    last_retry_seconds = 600.0
    """Longest time until it is tried again."""

    def __init__(
        self,
        store: Store,
        name: str,
        *,
        serve: Callable[[ModelVersion], Awaitable[None]],
        served: Callable[[], str],
        tell: Callable[[str], None],
        instead: Callable[[], ModelVersion] | None = None,
    ) -> None:
        self._store = store
        self._name = name
        self._serve = serve
        self._served = served
        self._tell = tell
        self._instead = instead
        self._wanted: str | None = None
        self._refused: _Refused | None = None
        self._outage = Outage(tell)
        self.num_refused = 0
        """Times that a champion could not be served."""

    @property
    def num_failures(self) -> int:
        """Looks at which the store could not be read; the next one may."""
        return self._outage.num_failures

    @property
    def counts(self) -> Mapping[str, int]:
        """Looks that failed (`champion_unread`), and champions (`champion_not_served`)."""
        return {"champion_unread": self.num_failures, "champion_not_served": self.num_refused}

    def state(self) -> dict[str, Any]:
        """The model's name, version wanted and served, and why these differ, where that is known.

        The version wanted is the champion at the last look; None before the first, or without one.
        """
        refused = self._refused
        reason = None if refused is None else refused.reason
        return {
            "name": self._name,
            "wanted": self._wanted,
            "served": self._served(),
            "reason": self._outage.reason or reason,
        }

    async def run(self, *, seconds: float = 2.0) -> None:
        """Follow until cancelled, so many seconds between two looks."""
        while True:
            await self.look()
            await asyncio.sleep(seconds)

    async def look_again(self) -> None:
        """Look now, and try once more what could not be served."""
        self._refused = None
        await self.look()

    async def look(self) -> None:
        """Serve the champion if another version serves."""
        try:
            wanted, version = await asyncio.to_thread(self._champion)
        except StoreError as error:
            self._outage.goes_on(f"the champion of {self._name!r} cannot be read: {error}")
            return
        self._outage.is_over(f"the champion of {self._name!r} can be read again")
        self._wanted = wanted
        if wanted is None or wanted == self._served():
            self._refused = None
            return
        if self._refused is None or self._refused.version != wanted:
            self._refused = _Refused(version=wanted, seconds=self.first_retry_seconds)
        if time.monotonic() >= self._refused.until:
            await self._try(wanted, version, self._refused)

    async def _try(self, wanted: str, version: ModelVersion | None, refused: _Refused) -> None:
        try:
            if version is None:
                raise ModelError(
                    f"version {wanted} is not registered, so nobody knows where its weights are"
                )
            await self._serve(version)
        except GmpoError as error:
            self.num_refused += 1
            refused.until = time.monotonic() + refused.seconds
            refused.seconds = min(2 * refused.seconds, self.last_retry_seconds)
            if str(error) != refused.reason:
                refused.reason = str(error)
                self._tell(
                    f"champion {wanted} of {self._name!r} cannot be served: {error}; version "
                    f"{self._served()} goes on serving, and the champion is tried again"
                )
            await self._serve_instead(wanted, refused)
        else:
            self._refused = None

    async def _serve_instead(self, champion: str, refused: _Refused) -> None:
        if self._instead is None:
            return
        try:
            version = await asyncio.to_thread(self._instead)
            if version.version in (champion, self._served()):
                return
            await self._serve(version)
        except GmpoError as error:
            if str(error) != refused.reason_instead:
                refused.reason_instead = str(error)
                self._tell(f"nothing can be served in place of champion {champion}: {error}")
            return
        refused.reason_instead = None
        self._tell(f"version {version.version} serves until {champion} is restored")

    def _champion(self) -> tuple[str | None, ModelVersion | None]:
        """The champion's version, and its row where another version serves."""
        champion = self._store.champion(self._name)
        if champion is None:
            return None, None
        if champion.version == self._served():
            return champion.version, None
        return champion.version, self._store.model_version(champion.version)
