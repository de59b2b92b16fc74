"""A model behind any server that speaks OpenAI's interface: vLLM, llama.cpp, another gateway."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

import httpx2
from pydantic import Field

from gmpo.errors import ConfigError
from gmpo.serving.backend import BackendError, BackendFault, Chunk, GenerationRequest
from gmpo.serving.upstream_events import EventDecoder, UpstreamAnswer, told_error
from gmpo.task_config import Table

__all__ = ["UpstreamBackend", "UpstreamSettings"]

_PATHS = {"chat": "chat/completions", "completions": "completions"}
_JSON = {"content-type": "application/json"}
_FAULTS: dict[int, BackendFault] = {
    400: "bad_request",
    408: "timeout",
    413: "bad_request",
    422: "bad_request",
    429: "overloaded",
    502: "unavailable",
    503: "unavailable",
    504: "timeout",
}
_MAY_PASS: tuple[BackendFault, ...] = ("overloaded", "unavailable", "broken")
"""Faults that another try may not meet; one after a time-out would double the wait."""
_UNSUPPORTED = ("tools", "functions", "audio", "web_search_options")
"""Fields that make answers which a chunk cannot carry."""
_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 2.0
_LONGEST_REFUSAL = 1 << 16
_LONGEST_DIGITS = 9
_CLOSING_SECONDS = 1.0
_READY_SECONDS = 2.0


class UpstreamSettings(Table):
    """Where a server is, and how long it may take."""

    url: str = Field(pattern=r"^https?://")
    """Its base, with `/v1`."""
    model: str = Field(min_length=1)
    """The model's name there."""
    api_key_env: str | None = None
    """Environment variable with the key that it wants; None sends none."""
    version: str | None = None
    """Version of the model, for records; None takes the server's `system_fingerprint`, or else the
    model's name."""
    connect_seconds: float = Field(default=5.0, gt=0)
    """Longest time for a connection."""
    first_token_seconds: float = Field(default=60.0, gt=0)
    """Longest time from asking to the first token, the wait in the server's queue included."""
    stall_seconds: float = Field(default=30.0, gt=0)
    """Longest time between two tokens."""
    retries: int = Field(default=2, ge=0)
    """How often it is asked again, before the first token, when it is not reached, is overloaded or
    breaks off; after a time-out never."""
    logprobs: bool = True
    """Whether log-probabilities are asked for: the quality score reads them, but some servers give
    none."""


class UpstreamBackend:
    """`Backend` over an OpenAI-compatible server.

    It is always asked for a stream, so that a client that leaves ends the work there, and what
    breaks off is told from what ended. Only echoed prompts come in one piece.

    Args:
        name: of the backend.
        settings: where it is, and time limits.
        api_key: that it wants, in place of the one in the settings' variable.
        random_source: of the pauses before it is asked again.

    Raises:
        ConfigError: the environment variable with its key is not set.
    """

    def __init__(
        self,
        name: str,
        settings: UpstreamSettings,
        *,
        api_key: str | None = None,
        random_source: random.Random | None = None,
    ) -> None:
        self._name = name
        self._settings = settings
        self._random = random_source or random.Random()
        key = _key_of(name, settings) if api_key is None else api_key
        authorization = {} if key is None else {"authorization": f"Bearer {key}"}
        self._client = httpx2.AsyncClient(
            base_url=settings.url.rstrip("/") + "/",
            headers={"accept-encoding": "identity", **authorization},
            timeout=httpx2.Timeout(None, connect=settings.connect_seconds),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=32),
        )
        self.num_retries = 0
        """Times that it was asked again."""

    @property
    def name(self) -> str:
        """Of the backend."""
        return self._name

    @property
    def model_version(self) -> str | None:
        """As configured, or else the model's name there."""
        return self._settings.version or self._settings.model

    async def ready(self) -> bool:
        """Whether the server lists its models."""
        try:
            response = await self._client.get("models", timeout=_READY_SECONDS)
        except httpx2.RequestError:
            return False
        return response.is_success

    async def close(self) -> None:
        """Close the connections; running requests end with an error."""
        await self._client.aclose()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        """The answer, token by token.

        Raises:
            BackendError: there is no answer, or no more of it.
        """
        body = _encoded(self._body(request))
        first_seconds = None if request.echo else self._settings.first_token_seconds
        attempt = 0
        while True:
            chunks = self._whole(request, body) if request.echo else self._streamed(request, body)
            try:
                first = await self._next(chunks, first_seconds)
                break
            except BackendError as error:
                if attempt == self._settings.retries or error.fault not in _MAY_PASS:
                    raise
                pause = self._pause(attempt, error.retry_after_seconds)
            attempt += 1
            self.num_retries += 1
            await asyncio.sleep(pause)
        async with aclosing(chunks):
            while first is not None:
                yield first
                first = await self._next(chunks, self._settings.stall_seconds)

    async def _next(
        self, chunks: AsyncGenerator[Chunk, None], seconds: float | None
    ) -> Chunk | None:
        try:
            async with asyncio.timeout(seconds):
                return await anext(chunks, None)
        except TimeoutError:
            raise BackendError(
                f"backend {self._name!r} gave no token for {seconds:g} seconds; ask again later",
                fault="timeout",
            ) from None

    def _pause(self, attempt: int, asked: float | None) -> float:
        """Between nothing and twice as much each time, so that many do not come back at once."""
        longest = min(_FIRST_PAUSE_SECONDS * 2.0**attempt, _LONGEST_PAUSE_SECONDS)
        return max(self._random.uniform(0.0, longest), min(asked or 0.0, _LONGEST_PAUSE_SECONDS))

    def _body(self, request: GenerationRequest) -> dict[str, Any]:
        """What the client sent, with what this server adds or keeps to itself."""
        for name in _UNSUPPORTED:
            if request.body.get(name):
                raise BackendError(
                    f"this server does not pass on {name!r}; leave it out",
                    fault="bad_request",
                    param=name,
                    code="unsupported_parameter",
                )
        # `metadata` may hold the right answer, by which answers are verified here; `store` allows
        # this server alone to keep texts.
        kept = {
            name: value
            for name, value in request.body.items()
            if name not in ("metadata", "store", "stream", "stream_options")
        }
        settings = self._settings
        body = {
            **kept,
            "model": settings.model,
            "n": request.n,
            "temperature": request.temperature,
            "top_p": request.top_p,
        }
        if request.route == "completions":
            # The one limit by the name that all servers know on this route.
            body.pop("max_completion_tokens", None)
            body["max_tokens"] = request.max_tokens
        if settings.logprobs and request.route == "chat":
            body |= {"logprobs": True, "top_logprobs": request.logprobs or 0}
        elif settings.logprobs:
            body["logprobs"] = request.logprobs or 0
        if not request.echo:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body

    async def _streamed(
        self, request: GenerationRequest, body: bytes
    ) -> AsyncGenerator[Chunk, None]:
        answer = self._answer(request)
        decoder = EventDecoder()
        try:
            async with self._client.stream(
                "POST", _PATHS[request.route], content=body, headers=_JSON
            ) as response:
                if not response.is_success:
                    raise await self._refusal(response)
                pieces = response.aiter_bytes()
                async for data in pieces:
                    for event in decoder.feed(data):
                        for chunk in answer.read(event):
                            yield chunk
                    if answer.is_done:
                        break
                for chunk in answer.end():
                    yield chunk
                await _read_on(pieces)
        except httpx2.RequestError as error:
            raise self._unreached(error) from None

    async def _whole(self, request: GenerationRequest, body: bytes) -> AsyncGenerator[Chunk, None]:
        answer = self._answer(request)
        try:
            async with self._client.stream(
                "POST", _PATHS[request.route], content=body, headers=_JSON
            ) as response:
                if not response.is_success:
                    raise await self._refusal(response)
                text = (await response.aread()).decode(errors="replace")
        except httpx2.RequestError as error:
            raise self._unreached(error) from None
        for chunk in [*answer.read_whole(text), *answer.end()]:
            yield chunk

    def _answer(self, request: GenerationRequest) -> UpstreamAnswer:
        settings = self._settings
        return UpstreamAnswer(request, version=settings.version, model=settings.model)

    async def _refusal(self, response: httpx2.Response) -> BackendError:
        """An error status as a fault; what a refusal of the request says is passed on."""
        told: Mapping[str, Any] = {}
        text = b""
        async for data in response.aiter_bytes():
            text += data
            if len(text) > _LONGEST_REFUSAL:
                break
        told = told_error(text.decode(errors="replace"))
        status = response.status_code
        fault = _FAULTS.get(status, "failed")
        if fault == "bad_request":
            param, code = told.get("param"), told.get("code")
            return BackendError(
                str(told.get("message") or f"the model's server refuses this request ({status})"),
                fault=fault,
                param=param if isinstance(param, str) else None,
                code=code if isinstance(code, str) else None,
            )
        why = {
            401: "it wants another API key than this server has",
            403: "it wants another API key than this server has",
            404: f"it has no model {self._settings.model!r}, or no such route",
        }.get(status, "ask again later")
        return BackendError(
            f"backend {self._name!r} answered with status {status}: {why}",
            fault=fault,
            retry_after_seconds=_seconds(response.headers.get("retry-after")),
        )

    def _unreached(self, error: httpx2.RequestError) -> BackendError:
        before = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)
        if isinstance(error, before):
            return BackendError(
                f"backend {self._name!r} cannot be reached; ask again later", fault="unavailable"
            )
        return BackendError(
            f"backend {self._name!r} broke the connection ({type(error).__name__}); ask again",
            fault="broken",
        )


def _key_of(name: str, settings: UpstreamSettings) -> str | None:
    variable = settings.api_key_env
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(
            f"backend {name!r} takes its API key from {variable}, which is not set; set it, or "
            "leave api_key_env out"
        )
    return key


def _encoded(body: Mapping[str, Any]) -> bytes:
    """The body as JSON.

    Fields that this server does not know hold whatever the client sent: NaN too, which Python's
    JSON reads and nobody's writes. That is the request's fault; passed off as the backend's, a few
    such requests would open its breaker for everybody. Lists in lists are refused when they are
    read; that they may be read and still not written is only guarded against.
    """
    try:
        # Halves of surrogate pairs go on as they came, as escapes.
        return json.dumps(body, separators=(",", ":"), allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise BackendError(
            "the body holds NaN, an infinity, or lists nested too deeply, which JSON does not "
            "have or servers do not read; leave them out",
            fault="bad_request",
        ) from None


def _seconds(text: str | None) -> float | None:
    """Of a Retry-After header; dates, and numbers that no clock has, are not looked at."""
    if text is None or not (text.isascii() and text.isdigit()) or len(text) > _LONGEST_DIGITS:
        return None
    return float(text)


async def _read_on(pieces: Any) -> None:
    """Read what is left of a body whose answer is whole, so that its connection can be used again.

    A server that never ends it costs the connection, not the answer.
    """
    try:
        async with asyncio.timeout(_CLOSING_SECONDS):
            async for _ in pieces:
                pass
    except (TimeoutError, httpx2.RequestError):
        return
