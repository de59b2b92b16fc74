"""A request's way through the gateway: its turn, its answers, its record."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from functools import partial
from itertools import accumulate

from gmpo.serving.admission import Admission
from gmpo.serving.answer_record import AnswerBook, AnswerRecord
from gmpo.serving.backend import (
    AnswerReport,
    BackendError,
    Chunk,
    GenerationRequest,
    Router,
    Usage,
)
from gmpo.serving.faults import ApiError, from_backend

__all__ = ["Answering", "Observer", "RunningAnswer"]

Observer = Callable[[AnswerRecord], None]
"""Told of each answer that is over, on the event loop: it must not wait for anything."""

_CLIENT_LEFT = 499
"""Status, in records alone, of a request whose client did not wait for the answer."""


class RunningAnswer:
    """Answers to the prompts of one request, each begun, or whole if it was held back.

    Args:
        chunks: of each prompt.
        books: of the same prompts.
        deadline: of the whole answer, in the event loop's time.
        end: gives back the turn and tells observers.
    """

    def __init__(
        self,
        chunks: Sequence[AsyncGenerator[Chunk, None]],
        *,
        books: Sequence[AnswerBook],
        deadline: float,
        end: Callable[[int, str | None], None],
    ) -> None:
        self._chunks = chunks
        self._books = books
        self._deadline = deadline
        self._end = end
        self._is_over = False

    @property
    def reports(self) -> list[AnswerReport]:
        """Of each prompt; whole once the answer was read to its end."""
        return [book.report for book in self._books]

    @property
    def num_choices(self) -> int:
        """Of all prompts."""
        return sum(book.request.n for book in self._books)

    @property
    def usage(self) -> Usage | None:
        """Of all prompts together; None where one is not known."""
        known = [book.usage for book in self._books if book.usage is not None]
        if len(known) < len(self._books):
            return None
        return Usage(
            prompt_tokens=sum(one.prompt_tokens for one in known),
            completion_tokens=sum(one.completion_tokens for one in known),
        )

    async def pieces(self) -> AsyncGenerator[tuple[int, Chunk], None]:
        """Chunks with the number of their choice among those of all prompts.

        Raises:
            ApiError: an answer broke off, or took too long.
        """
        firsts = list(accumulate((book.request.n for book in self._books), initial=0))
        status, error = 500, "the server failed"
        clock = asyncio.get_running_loop().time
        try:
            async with aclosing(self._merged()) as merged:
                async for place, chunk in merged:
                    # Chunks that are there already come without a wait that a timer could end.
                    if clock() >= self._deadline:
                        raise _took_too_long()
                    self._books[place].add(chunk)
                    yield firsts[place] + chunk.index, chunk
            if not all(book.is_whole for book in self._books):
                raise BackendError(
                    "the backend ended its answer before each choice had ended", fault="broken"
                )
            status, error = 200, ""
        except BackendError as broken:
            told = from_backend(broken)
            status, error = told.status, told.message
            raise told from None
        except (asyncio.CancelledError, GeneratorExit):
            status = _CLIENT_LEFT
            error = "the client left, or the server ended, before the answer was whole"
            raise
        finally:
            self._finish(status, error or None)

    async def close(self) -> None:
        """Let go of an answer of which nothing, or not all, was read."""
        for chunks in self._chunks:
            await chunks.aclose()
        self._finish(_CLIENT_LEFT, "the client left before the answer began")

    def _finish(self, status: int, error: str | None) -> None:
        if not self._is_over:
            self._is_over = True
            self._end(status, error)

    async def _merged(self) -> AsyncGenerator[tuple[int, Chunk], None]:
        """Chunks of all prompts as they come, with the prompt's place."""
        if len(self._chunks) == 1:
            async with aclosing(self._within_time(self._chunks[0])) as chunks:
                async for chunk in chunks:
                    yield 0, chunk
            return
        arrived: asyncio.Queue[tuple[int, Chunk | None]] = asyncio.Queue()

        async def pump(place: int, of_one: AsyncGenerator[Chunk, None]) -> None:
            try:
                async with aclosing(self._within_time(of_one)) as chunks:
                    async for chunk in chunks:
                        arrived.put_nowait((place, chunk))
            finally:
                arrived.put_nowait((place, None))

        tasks = [asyncio.create_task(pump(place, one)) for place, one in enumerate(self._chunks)]
        try:
            num_open = len(tasks)
            while num_open:
                place, item = await arrived.get()
                if item is None:
                    num_open -= 1
                    await tasks[place]  # raises what ended it, if anything did
                else:
                    yield place, item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _within_time(
        self, chunks: AsyncGenerator[Chunk, None]
    ) -> AsyncGenerator[Chunk, None]:
        try:
            while True:
                async with asyncio.timeout_at(self._deadline):
                    chunk = await anext(chunks, None)
                if chunk is None:
                    return
                yield chunk
        except TimeoutError:
            raise _took_too_long() from None
        finally:
            await chunks.aclose()


def _took_too_long() -> BackendError:
    return BackendError(
        "the answer took longer than this server allows; ask for fewer tokens", fault="timeout"
    )


class Answering:
    """Begins answers.

    Args:
        router: chooses who answers.
        admission: gives turns.
        request_seconds: longest time for an answer, the wait for its turn not included.
        observers: told of every answer that is over.
    """

    def __init__(
        self,
        router: Router,
        admission: Admission,
        *,
        request_seconds: float,
        observers: Sequence[Observer],
    ) -> None:
        self._router = router
        self._admission = admission
        self._request_seconds = request_seconds
        self._observers = observers

    async def begin(self, requests: Sequence[GenerationRequest]) -> RunningAnswer:
        """Wait for a turn and then for each prompt's answer: its first chunk, or all if it is held.

        Raises:
            ApiError: there is no turn or no answer; it has been recorded.
        """
        books = [AnswerBook(request) for request in requests]
        num_completions = sum(request.n for request in requests)
        cost, status, error, is_begun = 0, 500, "the server failed", False
        try:
            cost = await self._admission.enter(num_completions)
            deadline = asyncio.get_running_loop().time() + self._request_seconds
            chunks = await self._route(books, deadline)
            is_begun = True
        except BackendError as failure:
            told = from_backend(failure)
            status, error = told.status, told.message
            raise told from None
        except ApiError as refusal:
            status, error = refusal.status, refusal.message
            raise
        except asyncio.CancelledError:
            status = _CLIENT_LEFT
            error = "the client left, or the server ended, before the answer began"
            raise
        finally:
            if not is_begun:
                self._end(books, cost, status, error)
        return RunningAnswer(
            chunks, books=books, deadline=deadline, end=partial(self._end, books, cost)
        )

    async def _route(
        self, books: Sequence[AnswerBook], deadline: float
    ) -> list[AsyncGenerator[Chunk, None]]:
        """All prompts' answers, or none."""
        try:
            async with asyncio.timeout_at(deadline):
                if len(books) > 1:
                    return await self._all_routed(books, deadline)
                (book,) = books
                return [await self._router.route(book.request, book.report, deadline=deadline)]
        except TimeoutError:
            raise BackendError(
                "no answer was there within the time that this server allows; ask for fewer "
                "tokens, or again later",
                fault="timeout",
            ) from None

    async def _all_routed(
        self, books: Sequence[AnswerBook], deadline: float
    ) -> list[AsyncGenerator[Chunk, None]]:
        """Several prompts' answers, asked for at once."""
        tasks = [
            asyncio.create_task(self._router.route(book.request, book.report, deadline=deadline))
            for book in books
        ]
        is_begun = False
        try:
            routed = await asyncio.gather(*tasks)
            is_begun = True
            return routed
        finally:
            if not is_begun:
                for task in tasks:
                    task.cancel()
                for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                    if not isinstance(outcome, BaseException):
                        await outcome.aclose()

    def _end(self, books: Sequence[AnswerBook], cost: int, status: int, error: str | None) -> None:
        """Give the turn back, and tell of the answers."""
        self._admission.leave(cost)
        for book in books:
            record = book.close(status, error)
            for observer in self._observers:
                observer(record)
