"""A router over backends whose answers, faults and clock are given."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

from gmpo.serving.backend import (
    AnswerReport,
    BackendError,
    BackendFault,
    Chunk,
    GenerationRequest,
    TokenLogprob,
    Usage,
)
from gmpo.serving.breaker import BreakerRules
from gmpo.serving.judging import AnswerJudge, QualityRules
from gmpo.serving.router import VariantRouter

REQUEST = GenerationRequest(id="r", route="completions", model="bot", prompt="a")
STREAM = replace(REQUEST, stream=True)


@dataclass
class Given:
    """A backend that says one token of a given probability, unless it fails first or after it."""

    name: str
    probability: float = 0.5
    fault: BackendFault | None = None
    breaks_off: bool = False
    hangs: bool = False
    says_nothing: bool = False
    echo: str = ""
    retry_after_seconds: float | None = None
    text: str | None = None
    num_asked: int = 0
    num_closed: int = 0
    model_version: str | None = None

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        self.num_asked += 1
        try:
            if self.fault is not None and not self.breaks_off:
                raise BackendError(
                    f"{self.name} fails",
                    fault=self.fault,
                    retry_after_seconds=self.retry_after_seconds,
                )
            if self.says_nothing:
                return
            if self.echo:
                unlikely = TokenLogprob(token=self.echo, logprob=-9.0)
                yield Chunk(text=self.echo, logprobs=(unlikely,), is_echo=True)
            token = TokenLogprob(token="x", logprob=math.log(self.probability))
            version = f"{self.name}-1"
            yield Chunk(text=self.text or self.name, logprobs=(token,), model_version=version)
            if self.hangs:
                await asyncio.sleep(60)
            if self.fault is not None:
                raise BackendError(f"{self.name} fails", fault=self.fault)
            usage = Usage(prompt_tokens=1, completion_tokens=1)
            yield Chunk(finish_reason="stop", usage=usage, model_version=version)
        finally:
            self.num_closed += 1

    async def ready(self) -> bool:
        return self.fault is None

    async def close(self) -> None:
        pass


class Interleaved(Given):
    """Two choices in turns after their prompts; usage follows the ends, as servers send it."""

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        for index in range(2):
            yield Chunk(index=index, text="p", is_echo=True, model_version="a-1")
        for number in range(6):
            token = TokenLogprob(token=f"{number}", logprob=-number)
            text = f"a{number}"
            yield Chunk(index=number % 2, text=text, token_ids=(number,), logprobs=(token,))
        for index, reason in enumerate(("stop", "length")):
            yield Chunk(index=index, finish_reason=reason, model_version="a-1")
        yield Chunk(usage=Usage(prompt_tokens=1, completion_tokens=6))


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Made:
    router: VariantRouter
    clock: Clock
    reports: list[AnswerReport] = field(default_factory=list)

    async def ask(self, request: GenerationRequest = REQUEST) -> str:
        self.reports.append(AnswerReport())
        chunks = await self.router.route(request, self.reports[-1])
        return "".join([chunk.text async for chunk in chunks])

    @property
    def report(self) -> AnswerReport:
        return self.reports[-1]


def made(*backends: Given, rules: BreakerRules | None = None, **quality: Any) -> Made:
    clock = Clock()
    router = VariantRouter(
        "bot",
        {one.name: one for one in backends},
        order=[one.name for one in backends],
        judge=AnswerJudge(QualityRules(**quality)),
        rules=rules or BreakerRules(failures=2, open_seconds=10.0),
        clock=clock,
    )
    return Made(router, clock)


def run(work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    return asyncio.run(work())
