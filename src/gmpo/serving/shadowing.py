"""Shadow traffic: another backend answers the same request, and only its figures are kept."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from pydantic import Field

from gmpo.abtest.assignment import position
from gmpo.serving.backend import AnswerReport, Backend, BackendError, GenerationRequest
from gmpo.serving.judging import AnswerJudge, Tally
from gmpo.serving.router import Route
from gmpo.store import Event
from gmpo.task_config import Table

__all__ = ["ShadowSettings", "ShadowTraffic"]


class ShadowSettings(Table):
    """Which backend answers unseen, and how often."""

    backend: str
    """Its name; an upstream, because an engine here would take the served answers' cores."""
    share: float = Field(default=0.1, gt=0, le=1)
    """Share of the served requests that it is asked too."""
    max_running: int = Field(default=2, ge=1)
    """Shadow answers at once; requests beyond it get none, and are counted."""
    seconds: float = Field(default=120.0, gt=0)
    """Longest time for one."""


class ShadowTraffic:
    """Asks a backend once the served answer is whole, so that it never slows one.

    Args:
        backend: that is asked.
        settings: share and limits.
        judge: scores its answers as it does the served ones.
        put: takes events without waiting.
        experiment: that all its answers are evidence of, as the candidate's; None is the request's,
            where the backend is an arm of it.
    """

    def __init__(
        self,
        backend: Backend,
        settings: ShadowSettings,
        *,
        judge: AnswerJudge,
        put: Callable[[Event], None],
        experiment: str | None = None,
    ) -> None:
        self._backend = backend
        self._settings = settings
        self._judge = judge
        self._put = put
        self._experiment = experiment
        self._running: set[asyncio.Task[None]] = set()
        self.counts: Counter[str] = Counter()
        """`shadows` that were answered, that `shadows_failed`, and that were `shadows_skipped`
        because too many ran."""

    def begin(self, request: GenerationRequest, report: AnswerReport, route: Route) -> None:
        """Have the request answered, if its turn is among the share and somebody else served it."""
        if report.backend == self._backend.name:
            return
        if position("shadow", self._settings.backend, request.id) >= self._settings.share:
            return
        if len(self._running) >= self._settings.max_running:
            self.counts["shadows_skipped"] += 1
            return
        task = asyncio.create_task(self._answer(request, route))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def close(self) -> None:
        """End what still runs; it is not recorded."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _answer(self, request: GenerationRequest, route: Route) -> None:
        began = time.perf_counter()
        tally, score, error, fault = Tally(request), None, None, None
        try:
            async with asyncio.timeout(self._settings.seconds):
                chunks = self._backend.generate(replace(request, stream=False))
                async with aclosing(chunks):
                    async for chunk in chunks:
                        tally.add(chunk)
            seconds = time.perf_counter() - began
            score = await self._judge.judge(request, tally)
        except (BackendError, TimeoutError) as failure:
            seconds = time.perf_counter() - began
            error = str(failure) or f"it took more than {self._settings.seconds:g} seconds"
            fault = failure.fault if isinstance(failure, BackendError) else "timeout"
        self.counts["shadows" if error is None else "shadows_failed"] += 1
        figures = {
            "quality": None if score is None else score.score,
            "latency_s": seconds if error is None else None,
            "mean_logprob": tally.mean_logprob,
            "error": error,
            "fault": fault,
        }
        self._put(self._event(request, route, tally, figures))

    def _event(
        self,
        request: GenerationRequest,
        route: Route,
        tally: Tally,
        figures: Mapping[str, Any],
    ) -> Event:
        name = self._backend.name
        # A backend that is no arm says nothing about an experiment of the request's.
        arm_of = route.experiment if name in route.variants else None
        return Event(
            kind="shadow",
            time=time.time(),
            payload={
                "variant": route.variants.get(name, name),
                "backend": name,
                **figures,
            },
            model_version=tally.model_version or self._backend.model_version,
            experiment=self._experiment or arm_of,
            unit=request.unit or None,
            request_id=request.id,
        )
