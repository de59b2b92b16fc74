"""A gateway whose engine breaks: what clients get at once, and what is recorded of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.gateways import ENGINE_LIMITS, router_of, running_gateway, served
from tests.models import save_tiny

from gmpo.live_shadow import users_answers
from gmpo.sampler.requests import Sampler
from gmpo.serving.engine import EmbeddedBackend
from gmpo.serving.recording import EventWriter
from gmpo.serving.sampling_thread import SamplerSource
from gmpo.store import Store, open_store

ASKED = {"model": "tiny", "prompt": "2+3=", "max_tokens": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("served") / "seed0", seed=0)


class Faulty:
    """A real sampler that raises what it is told to."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self.raises: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)

    def step(self) -> Any:
        if self.raises is not None:
            raise self.raises
        return self._sampler.step()


class Engine:
    """A real engine whose samplers break, and cannot be made anew, as they are told."""

    def __init__(self, folder: str) -> None:
        model = served(folder)
        self._make = model.source._make
        self.cannot_be_made: Exception | None = None
        self.samplers: list[Faulty] = []
        model.source = SamplerSource(self._made)
        self.backend = EmbeddedBackend(model, name="tiny", limits=ENGINE_LIMITS)

    def _made(self) -> Any:
        if self.cannot_be_made is not None:
            raise self.cannot_be_made
        self.samplers.append(Faulty(self._make()))
        return self.samplers[-1]

    def breaks(self, error: Exception | None) -> None:
        self.samplers[-1].raises = error


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
    with recorded(tmp_path / "store.db") as (store, writer):
        with (
            running_gateway(
                router=router_of(engine.backend), observers=[writer.observe]
            ) as gateway,
            gateway.client() as client,
        ):
            statuses = []
            for body in (ASKED, {**ASKED, "stream": True}):
                engine.breaks(RuntimeError("can't allocate memory"))
                statuses.append(client.post("/v1/completions", json=body).status_code)
            statuses += [
                client.post("/v1/completions", json={**ASKED, **more}).status_code
                for more in ({}, {"temprature": 1})
            ]
        writer.close()
        asked = users_answers(store, version, since=0.0)
        assert statuses == [500, 500, 200, 400]
        # What is not allowed says nothing about a version.
        assert [event.payload["status"] for event in asked] == [500, 500, 200]
