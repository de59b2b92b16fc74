"""A real gateway on a loopback port, over a tiny model in this process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import httpx2

from gmpo.config import ModelConfig
from gmpo.serving.access import ApiKeys
from gmpo.serving.answering import Observer
from gmpo.serving.app import GatewayLimits, build_gateway
from gmpo.serving.backend import (
    Backend,
    BackendError,
    Chunk,
    GenerationRequest,
    Router,
    Usage,
)
from gmpo.serving.breaker import BreakerRules
from gmpo.serving.engine import EmbeddedBackend, EngineLimits, ServedModel, load_served_model
from gmpo.serving.entrance import Entrance
from gmpo.serving.feedback import FeedbackDesk
from gmpo.serving.figures import GatewayFigures
from gmpo.serving.judging import AnswerJudge, QualityRules
from gmpo.serving.router import VariantRouter
from gmpo.serving.server import GatewayServer, ServerSettings, bound_socket

ENGINE_LIMITS = EngineLimits(max_rows=8, max_prompt_tokens=120, max_tokens=64)


@dataclass(frozen=True, kw_only=True)
class RunningGateway:
    """Where it listens, and what it is made of."""

    url: str
    port: int
    router: Router
    backend: Backend | None
    """Of a gateway that was given one."""
    entrance: Entrance
    server: GatewayServer
    loop: asyncio.AbstractEventLoop

    def client(self, **more) -> httpx2.Client:
        return httpx2.Client(**{"base_url": self.url, "timeout": 30, **more})

    def drain(self) -> None:
        self.loop.call_soon_threadsafe(self.server.drain)


def tiny_backend(folder: str, *, limits: EngineLimits = ENGINE_LIMITS) -> EmbeddedBackend:
    return EmbeddedBackend(served(folder, limits=limits), name="tiny", limits=limits)


def served(folder: str, *, limits: EngineLimits = ENGINE_LIMITS) -> ServedModel:
    return load_served_model(ModelConfig(name=folder, dtype="fp32"), max_rows=limits.max_rows)


def router_of(backend: Backend, rules: BreakerRules | None = None) -> VariantRouter:
    """What `gmpo serve` puts before one backend."""
    name = backend.name
    judge = AnswerJudge(QualityRules())
    return VariantRouter(name, {name: backend}, order=(name,), judge=judge, rules=rules)


class BreakingBackend:
    """Answers with one word until it is told to break."""

    name = "tiny"
    model_version = "ab12"
    is_broken = False

    async def generate(self, _: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        if self.is_broken:
            raise BackendError("the engine is gone", fault="unavailable")
        yield Chunk(
            text="five",
            finish_reason="stop",
            usage=Usage(prompt_tokens=3, completion_tokens=1),
            model_version=self.model_version,
        )

    async def ready(self) -> bool:
        return not self.is_broken

    async def close(self) -> None:
        pass


@contextmanager
def running_gateway(
    make_backend: Callable[[], Backend] | None = None,
    *,
    router: Router | None = None,
    figures: GatewayFigures | None = None,
    feedback: FeedbackDesk | None = None,
    beside: Sequence[Callable[[], Awaitable[None]]] = (),
    limits: GatewayLimits | None = None,
    keys: Sequence[str] = (),
    settings: ServerSettings | None = None,
    observers: Sequence[Observer] = (),
) -> Iterator[RunningGateway]:
    """Serve a backend, or what a router chooses, on a thread of its own until the block ends."""
    bound = bound_socket("127.0.0.1", 0)
    port = bound.getsockname()[1]
    backend = None
    if router is None:
        assert make_backend is not None
        backend = make_backend()
        router = router_of(backend)
    entrance = build_gateway(
        router,
        limits=limits or GatewayLimits(),
        keys=ApiKeys(keys),
        observers=observers,
        figures=figures,
        feedback=feedback,
    )
    server = GatewayServer(
        entrance, settings=settings or ServerSettings(drain_seconds=5), beside=beside
    )
    loop = server.new_loop()

    def run() -> None:
        loop.run_until_complete(server.serve(sockets=[bound]))
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_served(url, thread)
        yield RunningGateway(
            url=url,
            port=port,
            router=router,
            backend=backend,
            entrance=entrance,
            server=server,
            loop=loop,
        )
    finally:
        if not loop.is_closed() and not entrance.is_draining:
            loop.call_soon_threadsafe(server.drain)
        thread.join()


def _wait_until_served(url: str, thread: threading.Thread) -> None:
    for _ in range(1000):
        assert thread.is_alive(), "the gateway ended while it started"
        try:
            if httpx2.get(f"{url}/health").status_code == 200:
                return
        except httpx2.TransportError:
            pass
        threading.Event().wait(0.01)
    raise AssertionError("the gateway did not answer within 10 seconds")
