"""A request's way through the gateway, against the clock."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from gmpo.serving.answer_record import AnswerBook
from gmpo.serving.answering import RunningAnswer
from gmpo.serving.backend import Chunk, GenerationRequest
from gmpo.serving.faults import ApiError


@pytest.mark.parametrize("num_prompts", [1, 2])
def test_a_client_that_reads_slowly_keeps_its_turn_no_longer_than_an_answer_may_take(
    num_prompts: int,
):
    request = GenerationRequest(id="r", route="completions", model="m", prompt="a", stream=True)
    num_closed, ends = 0, list[int]()

    async def at_once() -> AsyncGenerator[Chunk, None]:
        nonlocal num_closed
        try:
            for _ in range(1000):
                yield Chunk(text="a")
                if num_prompts > 1:
                    await asyncio.sleep(0.01)
        finally:
            num_closed += 1

    async def read() -> None:
        clock = asyncio.get_running_loop().time
        deadline = clock() + 0.2
        answer = RunningAnswer(
            [at_once() for _ in range(num_prompts)],
            books=[AnswerBook(request) for _ in range(num_prompts)],
            deadline=deadline,
            end=lambda status, _: ends.append(status),
        )
        async for _ in answer.pieces():
            # Two prompts would last for more than a second: their chunks wait in a queue.
            assert clock() < deadline + 0.5
            await asyncio.sleep(0.03)

    with pytest.raises(ApiError, match="longer than this server allows"):
        asyncio.run(asyncio.wait_for(read(), 5))
    assert (num_closed, ends) == (num_prompts, [504])
