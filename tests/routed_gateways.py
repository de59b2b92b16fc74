"""A gateway over several upstreams by name, with its store, experiment, shadow and feedback."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tests.gateways import RunningGateway, running_gateway
from tests.upstreams import Behaviour, Body, Upstream, running_upstream

from gmpo.serving.breaker import BreakerRules
from gmpo.serving.candidate_shadow import CandidateShadow
from gmpo.serving.feedback import FeedbackDesk
from gmpo.serving.figures import GatewayFigures
from gmpo.serving.judging import AnswerJudge, QualityRules
from gmpo.serving.recording import EventWriter
from gmpo.serving.router import VariantRouter
from gmpo.serving.shadowing import ShadowSettings, ShadowTraffic
from gmpo.serving.splitting import TrafficSplit, outcome_event
from gmpo.serving.upstream import UpstreamBackend, UpstreamSettings
from gmpo.store import Event, Experiment, Store, open_store

ASKED: dict[str, Any] = {"model": "bot", "prompt": "12+3=", "max_tokens": 64}
STREAMED = {**ASKED, "stream": True}
CONFIG: dict[str, Any] = {
    "salt": "s",
    "models": {"control": "a", "candidate": "b"},
    "weights": {"control": 0.5, "candidate": 0.5},
}
"""Plan of an experiment between the upstreams `a` and `b`."""


class Served:
    """A gateway over upstreams by name, with its store."""

    def __init__(self, gateway: RunningGateway, store: Store, writer: EventWriter) -> None:
        self.gateway, self.store, self.writer = gateway, store, writer
        self.upstreams: dict[str, Upstream] = {}
        self.told: list[str] = []

    def post(self, path: str, body: Body, **headers: str) -> Any:
        with self.gateway.client(headers=headers) as client:
            return client.post(f"/v1/{path}", json=body)

    def ask(self, body: Body = ASKED, **headers: str) -> Body:
        response = self.post("completions", body, **headers)
        assert response.status_code == 200, response.text
        answer: Body = response.json()
        return answer

    def health(self) -> Body:
        with self.gateway.client() as client:
            health: Body = client.get("/health").json()
            return health

    def events(self, *kinds: str, count: int) -> list[Event]:
        """Events of these kinds, once there are so many."""
        deadline = time.monotonic() + 10
        while True:
            found = self.store.events(kinds=list(kinds))
            if len(found) >= count or time.monotonic() > deadline:
                assert len(found) == count, found
                return found
            time.sleep(0.01)


@contextmanager
def served(
    store_path: Path,
    behaviours: Mapping[str, Behaviour],
    *,
    quality: QualityRules | None = None,
    experiment: str | None = None,
    shadow: ShadowSettings | None = None,
    upstream: Mapping[str, Any] | None = None,
    before: Callable[[Store], None] = lambda _: None,
    clock: Callable[[], float] = time.time,
    breaker_clock: Callable[[], float] = time.monotonic,
    follow: str | None = None,
) -> Iterator[Served]:
    """Serve until the block ends.

    Args:
        store_path: of the store, which stays.
        behaviours: of each upstream; the first is asked first.
        quality: how answers are scored.
        experiment: that splits the traffic.
        shadow: who answers unseen.
        upstream: settings of all upstreams.
        before: told of the store before anything is served.
        clock: unix seconds, by which the experiment ends.
        breaker_clock: seconds, by which breakers open and close.
        follow: model whose cycles may call for a shadow.
    """
    with ExitStack() as stack:
        upstreams = {
            name: stack.enter_context(running_upstream(behave))
            for name, behave in behaviours.items()
        }
        store = stack.enter_context(open_store(str(store_path)))
        before(store)
        writer = EventWriter(store)
        stack.callback(writer.close)
        patient = {"retries": 0, "first_token_seconds": 10.0, "stall_seconds": 10.0}
        more = {**patient, **(upstream or {})}
        backends = {
            name: UpstreamBackend(
                name,
                UpstreamSettings(url=one.url, model=f"{name}-model", **more),
                random_source=random.Random(0),
            )
            for name, one in upstreams.items()
        }
        judge = AnswerJudge(quality or QualityRules())
        router = VariantRouter(
            "bot",
            backends,
            order=list(backends),
            judge=judge,
            rules=BreakerRules(failures=2, open_seconds=0.4),
            clock=breaker_clock,
        )
        told: list[str] = []
        split = None
        if experiment is not None:
            router.splitting = split = TrafficSplit(
                store,
                experiment,
                backend_of={name: name for name in backends},
                put=writer.put,
                tell=told.append,
                clock=clock,
            )
        if shadow is not None:
            router.shadowing = ShadowTraffic(
                backends[shadow.backend], shadow, judge=judge, put=writer.put
            )
        candidates = None
        if follow is not None:
            candidates = CandidateShadow(
                store, follow, judge=judge, put=writer.put, tell=told.append
            )
            router.shadowing = candidates
        figures = GatewayFigures(events=writer.counts)
        figures.watch_routing(
            lambda: {
                **router.counts,
                **({} if split is None else split.counts),
                **({} if candidates is None else candidates.counts),
            },
            lambda: router.phases,
            lambda: None if split is None else split.state(),
        )
        desk = FeedbackDesk(store, writer.put)

        def outcome(record: Any) -> None:
            event = outcome_event(record)
            if event is not None:
                writer.put(event)

        gateway = stack.enter_context(
            running_gateway(
                router=router,
                figures=figures,
                feedback=desk,
                observers=[writer.observe, outcome, desk.observe],
                beside=[] if candidates is None else [partial(candidates.run, seconds=0.02)],
            )
        )
        made = Served(gateway, store, writer)
        made.upstreams, made.told = upstreams, told
        yield made


def begin(store: Store, **changes: Any) -> None:
    """Put the experiment `e` of `CONFIG` into a store."""
    config = {**CONFIG, **changes}
    begun = Experiment(name="e", created=1.0, status="running", config=config)
    store.put_experiment(begun, expected=store.experiment("e"))
