"""Who answers a request, and who instead if that fails: backends in order, breakers, quality.

Another backend is asked only while nothing was sent to the client, whose text would come twice: of
a stream until its first token, of a plain answer, which is held back, until it is whole. What a
unit is assigned never depends on which backends are healthy.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Protocol, TypeVar

from gmpo.serving import breaker
from gmpo.serving.backend import (
    AnswerReport,
    Backend,
    BackendError,
    BackendFault,
    Chunk,
    GenerationRequest,
)
from gmpo.serving.breaker import BreakerRules, BreakerState, Phase, Ticket
from gmpo.serving.judging import AnswerJudge, Tally
from gmpo.serving.quality import QualityScore

__all__ = ["Lane", "Route", "Shadowing", "Splitting", "VariantRouter"]

_Value = TypeVar("_Value")

_TIMER_SECONDS = 0.005
"""So much before its time a timer may fire: uvloop's count whole milliseconds."""


@dataclass(frozen=True, kw_only=True)
class Route:
    """Whom a request goes to, before anything is known about who is healthy.

    Attributes:
        backend: name of the one that is asked first.
        experiment: that the request is part of.
        variant: that its unit is assigned.
        variants: variant of each backend that is an arm, by the backend's name.
    """

    backend: str
    experiment: str | None = None
    variant: str | None = None
    variants: Mapping[str, str] = field(default_factory=dict)


class Splitting(Protocol):
    """Assigns requests to the variants of an experiment."""

    def assign(self, request: GenerationRequest) -> Route | None:
        """The request's route; None while no experiment runs."""


class Shadowing(Protocol):
    """Has another backend answer the same request, for nobody to see."""

    def begin(self, request: GenerationRequest, report: AnswerReport, route: Route) -> None:
        """Called once an answer was served; must not wait."""

    async def close(self) -> None:
        """End what still runs."""


@dataclass(eq=False)
class Lane:
    """A backend with its breaker."""

    backend: Backend
    rules: BreakerRules
    clock: Callable[[], float]
    state: BreakerState = field(default_factory=BreakerState)
    _probing: tuple[int, frozenset[str]] = (0, frozenset())
    """An epoch, and the responses that have a probe in it."""

    def admit(self, request: GenerationRequest) -> Ticket | None:
        """Ask for a request to be let through; None is no.

        Prompts of one response pass together: if only the first did, the response would fail for
        want of the others, its probe would be withdrawn, and the breaker never closed.
        """
        self.state, ticket = breaker.admit(self.state, self.rules, now=self.clock())
        if self.state.phase != "half_open":
            return ticket
        of, epoch = request.response_id or request.id, self.state.epoch
        known = self._probing[1] if self._probing[0] == epoch else frozenset()
        if ticket is not None:
            self._probing = epoch, known | {of}
        elif of in known:
            return Ticket(epoch, is_probe=False)
        return ticket

    def settle(self, ticket: Ticket, fault: BackendFault | None) -> None:
        """Report how a request ended: its fault, or None for a whole answer."""
        # A request that is not allowed says nothing against the backend.
        end = breaker.succeeded if fault in (None, "bad_request") else breaker.failed
        self.state = end(self.state, self.rules, ticket, now=self.clock())

    def withdraw(self, ticket: Ticket) -> None:
        """Report that a request ended before it said anything about the backend."""
        self.state = breaker.withdrawn(self.state, ticket)

    async def ready(self) -> bool:
        """Whether a request would be let through and taken now; asking lets none through."""
        _, ticket = breaker.admit(self.state, self.rules, now=self.clock())
        return ticket is not None and await self.backend.ready()

    @property
    def retry_after_seconds(self) -> float:
        """Until it lets a request through again."""
        return breaker.retry_after(self.state, now=self.clock())


@dataclass(eq=False, kw_only=True)
class _Attempt:
    """An answer of one backend, its first chunk read; all of it where the answer is held back."""

    lane: Lane
    first: Chunk
    rest: AsyncGenerator[Chunk, None]
    tally: Tally
    score: QualityScore | None = None
    is_whole: bool = False
    reason: str | None = None
    """Why this backend was asked, where another one was asked first."""

    @property
    def rank(self) -> float:
        return self.score.score if self.score is not None and self.score.score else 0.0


class VariantRouter:
    """`Router` over several backends.

    Args:
        name: of the model, as clients ask for it.
        backends: by name.
        order: names: the first is asked where no experiment decides, the others when one that was
            asked before fails.
        judge: scores answers.
        rules: of the breakers.
        clock: seconds, for the breakers.
    """

    def __init__(
        self,
        name: str,
        backends: Mapping[str, Backend],
        *,
        order: Sequence[str],
        judge: AnswerJudge,
        rules: BreakerRules | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        rules = rules or BreakerRules()
        self._name = name
        self._order = tuple(order)
        self._lanes = {key: Lane(one, rules, clock) for key, one in backends.items()}
        self._judge = judge
        self.splitting: Splitting | None = None
        """An experiment's assignment, where there is one."""
        self.shadowing: Shadowing | None = None
        """Has answers made for nobody to see, where asked for."""
        self.counts: Counter[str] = Counter()
        """What happened: `fallback_REASON`, `low_quality`, `low_quality_served`, `cut_streams`,
        `unanswered`, `refused_later` (by a backend after another one had failed or answered)."""

    @property
    def model_names(self) -> tuple[str, ...]:
        """The one name that stands for all backends."""
        return (self._name,)

    @property
    def model_version(self) -> str | None:
        """Of the backend that is asked where no experiment decides."""
        return self._lanes[self._order[0]].backend.model_version

    @property
    def phases(self) -> dict[str, Phase]:
        """Of each backend's breaker."""
        return {name: lane.state.phase for name, lane in self._lanes.items()}

    async def route(
        self, request: GenerationRequest, report: AnswerReport, *, deadline: float = math.inf
    ) -> AsyncGenerator[Chunk, None]:
        """Ask backends in order until one answers.

        A request that the first one asked does not allow goes to nobody else. What a later one
        refuses may still be right: its refusal stands behind what the earlier ones did.

        Raises:
            BackendError: the request is not allowed, or nobody answers.
        """
        route = self._route_of(request)
        report.experiment, report.assigned_variant = route.experiment, route.variant
        order = [route.backend, *(name for name in self._order if name != route.backend)]
        # A plain answer of the engine is one chunk: what fails before it is of this version too.
        report.model_version = self._lanes[route.backend].backend.model_version
        failures: dict[str, BackendError] = {}
        best: _Attempt | None = None
        reason: str | None = None
        for name in order:
            try:
                found = await self._begun(self._lanes[name], request, deadline)
                found.reason = reason
                self._tell(found, report, route)
                if self._judge.rules.is_buffered or not request.stream:
                    await self._hold(found, request, report)
            except BackendError as failure:
                if failure.fault == "bad_request":
                    if best is None and not failures:
                        report.model_version = None  # it says nothing about the version
                        raise
                    self.counts["refused_later"] += 1
                    continue
                failures[name] = failure
                reason = reason or failure.code or failure.fault
                continue
            if best is None or found.rank > best.rank:
                best = found
            is_low = self._judge.is_low(found.score)
            self.counts["low_quality"] += is_low
            if not (is_low and self._judge.rules.is_buffered):
                break
            reason = reason or "low_quality"
        if best is None:
            self.counts["unanswered"] += 1
            raise self._nobody(failures)
        self._tell(best, report, route)
        if report.fell_back:
            self.counts[f"fallback_{best.reason}"] += 1
        return self._served(best, request, report, route)

    async def ready(self) -> bool:
        """Whether any backend in order would take a request, its breaker not being open."""
        found = await asyncio.gather(*(self._lanes[name].ready() for name in self._order))
        return any(found)

    async def close(self) -> None:
        """End shadows, then close all backends."""
        if self.shadowing is not None:
            await self.shadowing.close()
        for lane in self._lanes.values():
            await lane.backend.close()
        await asyncio.to_thread(self._judge.close)

    def _route_of(self, request: GenerationRequest) -> Route:
        found = None if self.splitting is None else self.splitting.assign(request)
        return found or Route(backend=self._order[0])

    async def _begun(self, lane: Lane, request: GenerationRequest, deadline: float) -> _Attempt:
        """Ask one backend for its first chunk.

        Raises:
            BackendError: it does not answer, or its breaker is open.
        """
        ticket = lane.admit(request)
        if ticket is None:
            raise BackendError(
                "it failed several times and is left alone for a while",
                fault="unavailable",
                code="breaker_open",
                retry_after_seconds=lane.retry_after_seconds,
            )
        tally = Tally(request)
        chunks = _watched(lane, ticket, request, tally, deadline=deadline)
        first = await anext(chunks, None)
        assert first is not None, "an answer without a chunk is not whole"
        return _Attempt(lane=lane, first=first, rest=chunks, tally=tally)

    async def _hold(
        self, attempt: _Attempt, request: GenerationRequest, report: AnswerReport
    ) -> None:
        """Read an answer to its end and score it, before any of it is sent.

        Raises:
            BackendError: it broke off.
        """
        held = [attempt.first]
        async with aclosing(attempt.rest) as chunks:
            async for chunk in chunks:
                held.append(chunk)
                report.mean_logprob = attempt.tally.mean_logprob
        attempt.first, *rest = _joined(held)
        attempt.rest, attempt.is_whole = _replayed(rest), True
        attempt.score = await self._judge.judge(request, attempt.tally)

    async def _served(
        self, attempt: _Attempt, request: GenerationRequest, report: AnswerReport, route: Route
    ) -> AsyncGenerator[Chunk, None]:
        """The answer's chunks; the report follows them."""
        chunk: Chunk | None = attempt.first
        try:
            async with aclosing(attempt.rest):
                while chunk is not None:
                    yield chunk
                    if not attempt.is_whole:
                        report.mean_logprob = attempt.tally.mean_logprob
                    chunk = await anext(attempt.rest, None)
        except BackendError:
            self.counts["cut_streams"] += 1
            raise
        if not attempt.is_whole:
            attempt.score = await self._judge.judge(request, attempt.tally)
            self.counts["low_quality"] += self._judge.is_low(attempt.score)
        self._judge.enter(report, attempt.tally, attempt.score)
        self.counts["low_quality_served"] += report.is_low_quality
        if self.shadowing is not None and request.max_tokens != 0:
            self.shadowing.begin(request, report, route)

    def _tell(self, attempt: _Attempt, report: AnswerReport, route: Route) -> None:
        """What is known of an answer as soon as it begins, should it be the one that is served."""
        name = attempt.lane.backend.name
        report.backend = name
        report.served_variant = route.variants.get(name, name)
        report.model_version = attempt.tally.model_version or attempt.lane.backend.model_version
        report.fell_back = name != route.backend
        report.fallback_reason = attempt.reason if report.fell_back else None
        report.mean_logprob = attempt.tally.mean_logprob

    def _nobody(self, failures: Mapping[str, BackendError]) -> BackendError:
        """One error for all that failed."""
        if len(failures) == 1:
            (only,) = failures.values()
            if only.code != "breaker_open":
                return only
        faults = {failure.fault for failure in failures.values()}
        known = [one.retry_after_seconds for one in failures.values() if one.retry_after_seconds]
        told = "; ".join(f"{name}: {failure}" for name, failure in failures.items())
        return BackendError(
            f"no backend answers now ({told}); ask again later"[:500],
            fault=faults.pop() if len(faults) == 1 else "unavailable",
            code="no_backend",
            retry_after_seconds=min(known, default=None),
        )


async def _watched(
    lane: Lane, ticket: Ticket, request: GenerationRequest, tally: Tally, *, deadline: float
) -> AsyncGenerator[Chunk, None]:
    """A backend's chunks, tallied; the breaker learns how they ended."""
    settle = partial(lane.settle, ticket, "failed")
    try:
        async with aclosing(lane.backend.generate(request)) as chunks:
            async for chunk in chunks:
                tally.add(chunk)
                yield chunk
        if not tally.is_whole:
            raise BackendError(
                "its answer ended before each choice had ended; ask again", fault="broken"
            )
        settle = partial(lane.settle, ticket, None)
    except BackendError as failure:
        settle = partial(lane.settle, ticket, failure.fault)
        raise
    except asyncio.CancelledError:
        # Whoever waits for a chunk when the time is over waits for the backend; a client that left
        # says nothing about it.
        if asyncio.get_running_loop().time() >= deadline - _TIMER_SECONDS:
            settle = partial(lane.settle, ticket, "timeout")
        else:
            settle = partial(lane.withdraw, ticket)
        raise
    except GeneratorExit:
        settle = partial(lane.withdraw, ticket)
        raise
    finally:
        settle()


def _joined(chunks: Sequence[Chunk]) -> list[Chunk]:
    """A whole answer in one chunk a choice, and one for its echoed prompt.

    Each chunk costs on its way to the client; of an answer that was held back all of that would
    come after the last token, and keep others waiting.
    """
    pieces: dict[tuple[int, bool], list[Chunk]] = {}
    for chunk in chunks:
        pieces.setdefault((chunk.index, chunk.is_echo), []).append(chunk)
    joined = [
        Chunk(
            index=index,
            text="".join(one.text for one in of_one),
            token_ids=tuple(chain.from_iterable(one.token_ids for one in of_one)),
            logprobs=tuple(chain.from_iterable(one.logprobs for one in of_one)),
            is_echo=is_echo,
            finish_reason=_last(one.finish_reason for one in of_one),
            model_version=_last(one.model_version for one in of_one),
        )
        for (index, is_echo), of_one in pieces.items()
    ]
    return [*joined[:-1], replace(joined[-1], usage=_last(one.usage for one in chunks))]


def _last(values: Iterable[_Value | None]) -> _Value | None:
    """The last that is known."""
    return next((value for value in reversed(list(values)) if value is not None), None)


async def _replayed(chunks: Sequence[Chunk]) -> AsyncGenerator[Chunk, None]:
    for chunk in chunks:
        yield chunk
