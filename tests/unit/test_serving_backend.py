"""The protocol between gateway, router and backends, with a backend whose chunks are given."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

import pytest

from gmpo.serving.backend import (
    AnswerReport,
    Backend,
    BackendError,
    Chunk,
    GenerationRequest,
    OneBackendRouter,
    Router,
    TokenLogprob,
)

REQUEST = GenerationRequest(id="r", route="completions", model="m", prompt="a")


class GivenChunks:
    """A backend that answers with given chunks, then an error if there is one."""

    name = "given"
    model_version = "v1"

    def __init__(self, chunks: Sequence[Chunk], error: BackendError | None = None) -> None:
        self._chunks, self._error = chunks, error
        self.num_closed = 0

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        try:
            for chunk in self._chunks:
                yield chunk
            if self._error:
                raise self._error
        finally:
            self.num_closed += 1

    async def ready(self) -> bool:
        return True

    async def close(self) -> None:
        pass


def chunk(text: str, logprob: float, **more) -> Chunk:
    one = TokenLogprob(token=text, logprob=logprob)
    return Chunk(text=text, logprobs=(one,), model_version="v1", **more)


def test_the_one_backend_router_passes_chunks_on_and_averages_their_logprobs():
    # The echoed prompt does not count: (-1 - 3) / 2 = -2.
    chunks = [chunk("p", -9.0, is_echo=True), chunk("a", -1.0), chunk("b", -3.0)]
    backend = GivenChunks(chunks)
    router = OneBackendRouter(backend)
    assert isinstance(backend, Backend) and isinstance(router, Router)

    async def run():
        report = AnswerReport()
        return [one async for one in await router.route(REQUEST, report)], report

    seen, report = asyncio.run(run())
    assert seen == chunks
    assert (report.mean_logprob, report.model_version, report.fell_back) == (-2.0, "v1", False)
    assert backend.num_closed == 1


def test_an_error_before_the_first_chunk_is_raised_by_route():
    error = BackendError("gone", fault="unavailable", retry_after_seconds=2.0)
    router = OneBackendRouter(GivenChunks([], error))
    with pytest.raises(BackendError, match="gone") as caught:
        asyncio.run(router.route(REQUEST, AnswerReport()))
    assert (caught.value.fault, caught.value.retry_after_seconds) == ("unavailable", 2.0)


def test_an_answer_of_nothing_is_an_error():
    with pytest.raises(BackendError, match="before the first token") as caught:
        asyncio.run(OneBackendRouter(GivenChunks([])).route(REQUEST, AnswerReport()))
    assert caught.value.fault == "broken"


def test_an_error_after_the_first_chunk_comes_out_of_the_chunks():
    error = BackendError("cut", fault="broken")
    router = OneBackendRouter(GivenChunks([chunk("a", -1.0)], error))

    async def run():
        chunks = await router.route(REQUEST, AnswerReport())
        seen = []
        with pytest.raises(BackendError, match="cut"):
            async for one in chunks:
                seen.append(one.text)
        return seen

    assert asyncio.run(run()) == ["a"]


def test_closing_an_answer_early_closes_the_backends_generator():
    backend = GivenChunks([chunk("a", -1.0), chunk("b", -1.0)])

    async def run():
        chunks = await OneBackendRouter(backend).route(REQUEST, AnswerReport())
        await anext(chunks)
        await chunks.aclose()

    asyncio.run(run())
    assert backend.num_closed == 1


def test_a_request_has_either_messages_or_a_prompt():
    with pytest.raises(AssertionError, match="either"):
        GenerationRequest(id="r", route="chat", model="m")
