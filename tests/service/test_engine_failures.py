"""An engine that breaks: what clients get at once, and what is recorded of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.gateways import ENGINE_LIMITS, router_of, running_gateway, served
from tests.models import save_tiny
from torch import nn

from gmpo.errors import ModelError
from gmpo.live_shadow import users_answers
from gmpo.sampler.requests import Sampler
from gmpo.serving.backend import BackendError, GenerationRequest
from gmpo.serving.engine import EmbeddedBackend, ServedModel
from gmpo.serving.recording import EventWriter
from gmpo.serving.sampling_thread import SamplerSource, SamplingThread
from gmpo.store import Store, open_store

ASKED = {"model": "tiny", "prompt": "2+3=", "max_tokens": 4}
MEMORY = RuntimeError("can't allocate memory\nwith a trace")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("served") / "seed0", seed=0)


class Engine:
    """A real engine whose samplers break, and cannot be made anew, as they are told."""

    def __init__(self, folder: str) -> None:
        model = served(folder)
        self._make = model.source._make
        self.raises: Exception | None = None
        self.lacks: Exception | None = None
        model.source = SamplerSource(self._made)
        self.backend = EmbeddedBackend(model, name="tiny", limits=ENGINE_LIMITS)

    def _made(self) -> Any:
        if self.lacks is not None:
            raise self.lacks
        return Faulty(self._make(), self)

    async def answer(self, name: str = "r") -> str:
        asked = GenerationRequest(
            id=name, route="completions", model="tiny", prompt="2+3=", max_tokens=4
        )
        async with asyncio.timeout(5):
            return "".join([chunk.text async for chunk in self.backend.generate(asked)])

    async def fault(self) -> str:
        with pytest.raises(BackendError) as raised:
            await self.answer()
        return f"{raised.value.fault}: {raised.value}"


class Faulty:
    """A real sampler that raises what its engine is told to."""

    def __init__(self, sampler: Sampler, engine: Engine) -> None:
        self._sampler, self._engine = sampler, engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)

    def step(self) -> Any:
        if self._engine.raises is not None:
            raise self._engine.raises
        return self._sampler.step()


@asynccontextmanager
async def engine_of(folder: str) -> AsyncGenerator[Engine, None]:
    engine = Engine(folder)
    try:
        yield engine
    finally:
        await engine.backend.close()


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(work())


@contextmanager
def recorded(path: Path) -> Iterator[tuple[Store, EventWriter]]:
    with open_store(str(path)) as store:
        writer = EventWriter(store)
        try:
            yield store, writer
        finally:
            writer.close()


def test_a_request_that_fails_before_any_chunk_is_the_failure_of_the_version_it_asked(
    folder: str, tmp_path: Path
):
    engine = Engine(folder)
    version = engine.backend.model_version
    router = router_of(engine.backend)
    with recorded(tmp_path / "store.db") as (store, writer):
        with (
            running_gateway(router=router, observers=[writer.observe]) as gateway,
            gateway.client() as client,
        ):
            statuses = []
            for error, more in (
                (MEMORY, {}),
                (MEMORY, {"stream": True}),
                (None, {}),
                (None, {"temprature": 1}),
            ):
                engine.raises = error
                response = client.post("/v1/completions", json={**ASKED, **more})
                statuses.append(response.status_code)
        writer.close()
        asked = users_answers(store, version, since=0.0)
        assert statuses == [500, 500, 200, 400]
        # What is not allowed says nothing about a version.
        assert [event.payload["status"] for event in asked] == [500, 500, 200]


@pytest.mark.parametrize("error", [ValueError("no such shape"), IndexError(), MEMORY])
def test_whatever_a_model_raises_ends_its_requests_also_while_there_is_no_new_sampler(
    folder: str, error: Exception
):
    async def work() -> None:
        async with engine_of(folder) as engine:
            engine.raises = error
            said = str(error).splitlines()[0] if str(error) else "IndexError"
            assert await engine.fault() == (
                f"failed: the engine failed while this request was running: {said}; ask again"
            )
            engine.raises, engine.lacks = None, MEMORY
            for _ in range(2):
                assert await engine.fault() == (
                    "unavailable: the engine broke and cannot be made anew: can't allocate memory; "
                    "ask again later"
                )
            assert engine.backend.num_failures == 3 and not engine.backend.num_requests
            engine.lacks = None
            assert await engine.answer()

    run(work)


def test_a_sampling_thread_that_ends_by_itself_leaves_nobody_waiting(
    folder: str, monkeypatch: pytest.MonkeyPatch
):
    go_on = threading.Event()

    def ends(thread: SamplingThread) -> None:
        assert go_on.wait(5)
        raise AttributeError("no such letter")

    async def work() -> None:
        async with engine_of(folder) as engine:
            monkeypatch.setattr(SamplingThread, "_deliver", ends)
            first = asyncio.ensure_future(engine.fault())
            while not engine.backend.num_requests:
                await asyncio.sleep(0.01)
            # It waits to be taken while the first one is drawn.
            second = asyncio.ensure_future(engine.fault())
            while engine.backend._thread._commands.empty():
                await asyncio.sleep(0.01)
            go_on.set()
            said = "unavailable: the engine's thread has ended: no such letter; restart the server"
            assert [await first, await second, await engine.fault()] == [said] * 3
            assert not await engine.backend.ready() and engine.backend.num_failures == 1

    run(work)


def test_an_engine_that_closes_while_it_loads_leaves_the_event_loop_free(folder: str):
    begun, go_on = threading.Event(), threading.Event()

    async def work() -> None:
        async with engine_of(folder) as engine:

            def load() -> ServedModel:
                begun.set()
                assert go_on.wait(5), "the event loop stood still"
                return engine.backend._model

            swap = asyncio.ensure_future(engine.backend.swap(load))
            assert await asyncio.to_thread(begun.wait, 5)
            closing = asyncio.ensure_future(engine.backend.close())
            await asyncio.sleep(0.1)
            assert not closing.done()
            go_on.set()
            await asyncio.gather(swap, closing)

    run(work)


def test_a_swap_that_fails_for_whatever_reason_is_a_models_error_and_changes_nothing(
    folder: str, monkeypatch: pytest.MonkeyPatch
):
    def short(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")

    async def work() -> None:
        async with engine_of(folder) as engine:
            monkeypatch.setattr(nn.Module, "to", short)
            with pytest.raises(ModelError, match=r"OutOfMemoryError: tried to allocate 2.00 GiB"):
                await engine.backend.swap(lambda: served(folder))
            assert await engine.answer()

    run(work)
