"""The gateway: OpenAI's routes over a router of backends."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from gmpo import __version__
from gmpo.serving import faults
from gmpo.serving.access import ApiKeys
from gmpo.serving.admission import Admission, AdmissionLimits
from gmpo.serving.answering import Answering, Observer, RunningAnswer
from gmpo.serving.backend import AnswerReport, GenerationRequest, Router
from gmpo.serving.bodies import (
    Asker,
    ChatBody,
    CompletionBody,
    chat_requests,
    completion_requests,
)
from gmpo.serving.entrance import Entrance, EntranceLimits
from gmpo.serving.event_stream import EventStream, unless_client_leaves
from gmpo.serving.faults import ApiError, error_body
from gmpo.serving.feedback import FeedbackBody, FeedbackDesk
from gmpo.serving.figures import GatewayFigures
from gmpo.serving.responses import (
    Envelope,
    Gathered,
    gmpo_object,
    report_headers,
    stream_choice,
    stream_object,
    usage_object,
    whole_object,
)

__all__ = ["GatewayLimits", "build_gateway"]

_UNIT_HEADER = "x-gmpo-unit"
_SESSION_HEADER = "x-gmpo-session"
_LONGEST_NAME = 512


@dataclass(frozen=True, kw_only=True)
class GatewayLimits:
    """Attributes:
    entrance: of bodies.
    admission: of what runs at once.
    request_seconds: longest time for an answer, the wait for its turn not included.
    send_seconds: how long a client may leave a piece of a stream unread.
    """

    entrance: EntranceLimits = field(default_factory=EntranceLimits)
    admission: AdmissionLimits = field(default_factory=AdmissionLimits)
    request_seconds: float = 600.0
    send_seconds: float = 30.0


def build_gateway(
    router: Router,
    *,
    limits: GatewayLimits,
    keys: ApiKeys,
    observers: Sequence[Observer] = (),
    figures: GatewayFigures | None = None,
    feedback: FeedbackDesk | None = None,
) -> Entrance:
    """The gateway as an ASGI application.

    Args:
        router: chooses who answers; closed when the application ends.
        limits: of requests.
        keys: who may ask.
        observers: told of every answer that is over, on the event loop.
        figures: what `/metrics` and `/health` tell; None makes new ones.
        feedback: takes what people think of answers; None takes none.
    """
    figures = figures or GatewayFigures()
    admission = Admission(limits.admission)
    answering = Answering(
        router,
        admission,
        request_seconds=limits.request_seconds,
        observers=(figures.observe, *observers),
    )

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None, None]:
        yield
        await router.close()

    app = FastAPI(
        title="gmpo serve",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    faults.install(app)
    _add_answers(app, router, answering, send_seconds=limits.send_seconds)
    _add_feedback(app, feedback)
    entrance = Entrance(app, keys=keys, limits=limits.entrance)
    figures.watch(admission, entrance)
    _add_state(app, router, entrance, figures)
    return entrance


def _add_answers(
    app: FastAPI, router: Router, answering: Answering, *, send_seconds: float
) -> None:
    @app.post("/v1/chat/completions", responses=_ANSWERS)
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        """Answer a chat."""
        asker = _asker(request, "chatcmpl")
        requests = chat_requests(body, await request.json(), asker)
        return await _answer(request, body, requests, _envelope("chat", body, asker))

    @app.post("/v1/completions", responses=_ANSWERS)
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continue one or more prompts."""
        asker = _asker(request, "cmpl")
        requests = completion_requests(body, await request.json(), asker)
        return await _answer(request, body, requests, _envelope("completions", body, asker))

    async def _answer(
        request: Request,
        body: ChatBody | CompletionBody,
        requests: Sequence[GenerationRequest],
        envelope: Envelope,
    ) -> Response:
        if body.model not in router.model_names:
            raise _no_such_model(body.model, router)
        headers = {"x-request-id": envelope.id}
        if body.stream:
            answer = await unless_client_leaves(request, answering.begin(requests))
            if answer is None:
                return Response(status_code=499)
            events = _events(answer, envelope, includes_usage=body.includes_usage)
            headers |= report_headers(answer.reports)
            return EventStream(events, answer, headers, send_seconds=send_seconds)
        whole = await unless_client_leaves(request, _whole(answering, requests, envelope))
        if whole is None:
            return Response(status_code=499)
        content, reports = whole
        return JSONResponse(content, headers=headers | report_headers(reports))


def _add_feedback(app: FastAPI, desk: FeedbackDesk | None) -> None:
    @app.post("/v1/feedback", responses=_ERRORS)
    async def feedback(body: FeedbackBody) -> dict[str, Any]:
        """Say what somebody thinks of an answer."""
        if desk is None:
            raise ApiError(
                404,
                "this server keeps no feedback; start it with --store",
                code="no_store",
            )
        await desk.take(body)
        return {"object": "feedback", "request_id": body.request_id, "score": body.value}


def _add_state(app: FastAPI, router: Router, entrance: Entrance, figures: GatewayFigures) -> None:
    def model(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": figures.created,
            "owned_by": "gmpo",
            "model_version": router.model_version,
        }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """Models that requests may ask for; the first is the default."""
        return {"object": "list", "data": [model(name) for name in router.model_names]}

    @app.get("/v1/models/{name:path}", responses=_ERRORS)
    async def one_model(name: str) -> dict[str, Any]:
        """One model."""
        if name not in router.model_names:
            raise _no_such_model(name, router)
        return model(name)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """The process runs, and how it fares."""
        return {
            "status": "draining" if entrance.is_draining else "ok",
            "model_version": router.model_version,
            **figures.as_dict(),
        }

    @app.get("/ready", responses=_ERRORS)
    async def ready() -> dict[str, str]:
        """Whether a request would be taken now; 503 if not."""
        if entrance.is_draining:
            raise ApiError(503, "the server is ending", code="draining", retry_after_seconds=5.0)
        if not await router.ready():
            raise ApiError(
                503, "no backend takes requests", code="not_ready", retry_after_seconds=1.0
            )
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Figures in Prometheus' text format."""
        return Response(figures.exposition(), media_type=figures.media_type)


_ERRORS: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": "Refused or failed, in OpenAI's form.",
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["error"],
                    "properties": {
                        "error": {
                            "type": "object",
                            "required": ["message", "type", "param", "code"],
                            "properties": {
                                "message": {"type": "string"},
                                "type": {"type": "string"},
                                "param": {"type": ["string", "null"]},
                                "code": {"type": ["string", "null"]},
                            },
                        }
                    },
                }
            }
        },
    }
}

_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with `stream`, in events.",
        "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}},
    },
    **_ERRORS,
}


def _envelope(
    route: Literal["chat", "completions"], body: ChatBody | CompletionBody, asker: Asker
) -> Envelope:
    # False and None ask for none; 0 alternatives still ask for the tokens' own.
    shows = body.logprobs is not None and body.logprobs is not False
    return Envelope(id=asker.id, route=route, model=body.model, shows_logprobs=shows)


def _asker(request: Request, kind: str) -> Asker:
    names = {}
    for header in (_UNIT_HEADER, _SESSION_HEADER):
        names[header] = request.headers.get(header, "")
        if len(names[header]) > _LONGEST_NAME:
            raise ApiError(
                400,
                f"header {header} has {len(names[header])} characters, and at most "
                f"{_LONGEST_NAME} are taken; shorten it",
                param=header,
            )
    return Asker(
        id=f"{kind}-{uuid.uuid4().hex}",
        unit=names[_UNIT_HEADER],
        session=names[_SESSION_HEADER] or None,
    )


def _no_such_model(name: str, router: Router) -> ApiError:
    return ApiError(
        404,
        f"there is no model {ascii(name)[:80]}; there are: {', '.join(router.model_names)}",
        param="model",
        code="model_not_found",
    )


async def _whole(
    answering: Answering, requests: Sequence[GenerationRequest], envelope: Envelope
) -> tuple[dict[str, Any], Sequence[AnswerReport]]:
    """A response in one piece, and how its answers came about."""
    answer = await answering.begin(requests)
    choices = [Gathered() for _ in range(answer.num_choices)]
    pieces = answer.pieces()
    try:
        async for index, chunk in pieces:
            choices[index].add(chunk)
    finally:
        await pieces.aclose()
    reports = answer.reports
    return whole_object(envelope, choices, usage=answer.usage, reports=reports), reports


async def _events(
    answer: RunningAnswer, envelope: Envelope, *, includes_usage: bool
) -> AsyncGenerator[tuple[str, bool], None]:
    """A stream's events, and whether they are the last.

    What follows the last token goes with it in one piece: each piece costs as much as a token does,
    here and where it is read. An answer that breaks off ends with an error and without [DONE].
    """
    gathered = [Gathered() for _ in range(answer.num_choices)]
    silent: dict[str, Any] = {"usage": None} if includes_usage else {}
    pieces = answer.pieces()
    held: dict[str, Any] | None = None

    def event(choices: Sequence[Mapping[str, Any]], extra: Mapping[str, Any] = silent) -> str:
        return _event(stream_object(envelope, choices, reports=answer.reports, extra=extra))

    try:
        async for index, chunk in pieces:
            # The report is whole only after the last piece, and the last event carries it.
            if held is not None:
                yield event([held]), False
            choice = stream_choice(envelope, index, chunk, gathered[index])
            held = choice if chunk.usage is not None else None
            if held is None:
                yield event([choice]), False
        told = {**silent, "gmpo": gmpo_object(envelope.id, answer.reports)}
        last = event([] if held is None else [held], told)
        if includes_usage:
            last += event([], {"usage": usage_object(answer.usage)})
        yield f"{last}data: [DONE]\n\n", True
    except ApiError as error:
        yield _event(error_body(error)), True
    finally:
        await pieces.aclose()


def _event(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return f"data: {text}\n\n"
