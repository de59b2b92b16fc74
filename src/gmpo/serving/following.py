"""The served weights follow the store's champion: promoting a version is what changes them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from gmpo.errors import GmpoError, StoreError
from gmpo.store import ModelVersion, Store

__all__ = ["ChampionFollower"]


class ChampionFollower:
    """Looks at a champion from time to time, and serves it once it is another one.

    A version that cannot be served is told once and left alone until the champion changes; what
    is to serve in its place is asked for once.

    Args:
        store: where the champion is.
        name: of the model.
        serve: serves a version's weights; raises if it cannot.
        served: version that serves now.
        tell: told in one sentence of what cannot be done.
        instead: gives the version that is to serve in place of a champion that cannot be served, as
            `Registry.servable` does; None leaves what serves.
    """

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
        self._given_up: str | None = None
        self.num_failures = 0
        """Looks at which the store could not be read; the next one may."""

    async def run(self, *, seconds: float = 2.0) -> None:
        """Follow until cancelled, so many seconds between two looks."""
        while True:
            await self.look()
            await asyncio.sleep(seconds)

    async def look_again(self) -> None:
        """Look now, and try once more what could not be served."""
        self._given_up = None
        await self.look()

    async def look(self) -> None:
        """Serve the champion if another version serves."""
        try:
            wanted = await asyncio.to_thread(self._champion)
        except StoreError as error:
            if not self.num_failures:
                self._tell(f"the champion of {self._name!r} cannot be read: {error}")
            self.num_failures += 1
            return
        if wanted != self._given_up:
            self._given_up = None
        if wanted is None or wanted in (self._served(), self._given_up):
            return
        try:
            version = await asyncio.to_thread(self._store.model_version, wanted)
            if version is None:
                raise StoreError(
                    f"version {wanted} is not registered, so nobody knows where its weights are"
                )
            await self._serve(version)
        except GmpoError as error:
            self._given_up = wanted
            self._tell(
                f"champion {wanted} of {self._name!r} cannot be served: {error}; version "
                f"{self._served()} goes on serving"
            )
            await self._serve_instead(wanted)

    async def _serve_instead(self, champion: str) -> None:
        if self._instead is None:
            return
        try:
            version = await asyncio.to_thread(self._instead)
            if version.version in (champion, self._served()):
                return
            await self._serve(version)
        except GmpoError as error:
            self._tell(f"nothing can be served in place of champion {champion}: {error}")
            return
        self._tell(f"version {version.version} serves until {champion} is restored")

    def _champion(self) -> str | None:
        champion = self._store.champion(self._name)
        return None if champion is None else champion.version
