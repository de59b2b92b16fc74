"""A candidate of continual learning in the shadow of what serves: it answers users unseen."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping

from gmpo.errors import StoreError
from gmpo.live_shadow import CONTROLLER_SESSION, ShadowCall, standing_call
from gmpo.own_servers import own_api_key
from gmpo.serving.backend import AnswerReport, GenerationRequest
from gmpo.serving.judging import AnswerJudge
from gmpo.serving.router import Route, Shadowing
from gmpo.serving.shadowing import ShadowSettings, ShadowTraffic
from gmpo.serving.supervision import Outage
from gmpo.serving.upstream import UpstreamBackend, UpstreamSettings
from gmpo.store import Event, Store

__all__ = ["CandidateShadow"]

_NAME = "candidate"


class CandidateShadow:
    """Asks the candidate that a cycle calls for, once a user's answer is whole.

    Args:
        store: where cycles call.
        name: of the model whose cycles are listened to.
        judge: scores its answers as it does the served ones.
        put: takes events without waiting.
        tell: told in one sentence of what begins, or cannot be done.
        beside: another shadow that goes on as before.
    """

    max_running = 2
    """Requests of users that it answers at once; others are left out and counted."""

    def __init__(
        self,
        store: Store,
        name: str,
        *,
        judge: AnswerJudge,
        put: Callable[[Event], None],
        tell: Callable[[str], None],
        beside: Shadowing | None = None,
    ) -> None:
        self._store = store
        self._name = name
        self._judge = judge
        self._put = put
        self._tell = tell
        self._beside = beside
        self._call: ShadowCall | None = None
        self._backend: UpstreamBackend | None = None
        self._traffic: ShadowTraffic | None = None
        self._before: Counter[str] = Counter()
        self._outage = Outage(tell)
        self._num_unreached = 0

    @property
    def num_failures(self) -> int:
        """Looks at which the store could not be read; the next one may."""
        return self._outage.num_failures

    @property
    def counts(self) -> Mapping[str, int]:
        """Of all candidates: `candidate_shadows`, those that failed and were skipped.

        `candidate_unread` and `candidate_unreached` are looks at which the store could not be read,
        and at which the candidate's server did not answer.
        """
        now = Counter() if self._traffic is None else self._traffic.counts
        return {
            **{f"candidate_{name}": count for name, count in (self._before + now).items()},
            "candidate_unread": self.num_failures,
            "candidate_unreached": self._num_unreached,
        }

    def begin(self, request: GenerationRequest, report: AnswerReport, route: Route) -> None:
        """Have a user's request answered by the candidate, if there is one."""
        if self._beside is not None:
            self._beside.begin(request, report, route)
        is_over = self._call is None or self._call.until <= time.time()
        if self._traffic is not None and not is_over and request.session != CONTROLLER_SESSION:
            self._traffic.begin(request, report, route)

    async def run(self, *, seconds: float = 1.0) -> None:
        """Listen until cancelled, so many seconds between two looks."""
        while True:
            await self.look()
            await asyncio.sleep(seconds)

    async def look(self) -> None:
        """Begin with the candidate that is called for, or end with one that is not any more."""
        try:
            wanted = await asyncio.to_thread(standing_call, self._store, self._name)
        except StoreError as error:
            self._outage.goes_on(
                f"what is to be shadowed of {self._name!r} cannot be read: {error}"
            )
            return
        self._outage.is_over(f"what is to be shadowed of {self._name!r} can be read again")
        if wanted == self._call:
            # A server that did not answer at one look may at the next.
            if wanted is not None and self._traffic is None:
                await self._begin_with(wanted, is_told=True)
            return
        if self._traffic is not None and self._call is not None:
            self._tell(f"candidate {self._call.candidate} answers no more of users' requests")
        await self._end()
        self._call = wanted
        if wanted is not None:
            await self._begin_with(wanted, is_told=False)

    async def close(self) -> None:
        """End what runs, and the shadow beside it."""
        await self._end()
        if self._beside is not None:
            await self._beside.close()

    async def _begin_with(self, call: ShadowCall, *, is_told: bool) -> None:
        """Ask the candidate's server, if it answers; `is_told` is whether it was said not to."""
        settings = UpstreamSettings(
            url=call.url,
            model=self._name,
            version=call.candidate,
            retries=0,
        )
        # The candidate's server has the keys of this environment, or of one that was set alike.
        backend = UpstreamBackend(_NAME, settings, api_key=own_api_key())
        if not await backend.ready():
            await backend.close()
            self._num_unreached += 1
            if not is_told:
                self._tell(
                    f"candidate {call.candidate} of cycle {call.cycle} is not shadowed while its "
                    f"server at {call.url} does not answer here"
                )
            return
        self._backend = backend
        self._traffic = ShadowTraffic(
            backend,
            ShadowSettings(backend=_NAME, share=1.0, max_running=self.max_running),
            judge=self._judge,
            put=self._put,
            experiment=call.experiment,
        )
        self._tell(f"candidate {call.candidate} of cycle {call.cycle} answers users' requests too")

    async def _end(self) -> None:
        if self._traffic is not None:
            await self._traffic.close()
            self._before += self._traffic.counts
        if self._backend is not None:
            await self._backend.close()
        self._traffic = self._backend = None
