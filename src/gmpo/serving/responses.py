"""OpenAI's response objects, made of chunks."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import quote

from gmpo.serving.backend import AnswerReport, Chunk, TokenLogprob, Usage

__all__ = [
    "Envelope",
    "Gathered",
    "gmpo_object",
    "report_headers",
    "stream_choice",
    "stream_object",
    "usage_object",
    "whole_object",
]

_NEVER = -9999.0
"""OpenAI's value for a token that has no probability: JSON has no infinity."""
_OBJECTS = {
    ("chat", False): "chat.completion",
    ("chat", True): "chat.completion.chunk",
    ("completions", False): "text_completion",
    ("completions", True): "text_completion",
}


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """What all objects of one response have in common.

    Attributes:
        id: of the response.
        route: the endpoint asked.
        model: the name that was asked for.
        shows_logprobs: whether the client asked for log-probabilities.
        created: unix seconds.
    """

    id: str
    route: Literal["chat", "completions"]
    model: str
    shows_logprobs: bool
    created: int = field(default_factory=lambda: int(time.time()))


@dataclass
class Gathered:
    """One choice, as far as it has come.

    Attributes:
        text: echoed prompt and completion.
        logprobs: of the same tokens.
        finish_reason: why it ended; None before it did.
        has_begun: whether any of it was sent in a stream.
        offset: characters of the tokens' texts that were sent, for `text_offset`.
    """

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    has_begun: bool = False
    offset: int = 0

    def add(self, chunk: Chunk) -> None:
        """Take in the choice's next chunk."""
        self.text += chunk.text
        self.logprobs += chunk.logprobs
        self.finish_reason = chunk.finish_reason or self.finish_reason


def whole_object(
    envelope: Envelope,
    choices: Sequence[Gathered],
    *,
    usage: Usage | None,
    reports: Sequence[AnswerReport],
) -> dict[str, Any]:
    """The response of a request that does not stream."""
    return {
        **_head(envelope, reports, is_stream=False),
        "choices": [_whole_choice(envelope, i, choice) for i, choice in enumerate(choices)],
        "usage": usage_object(usage),
        "gmpo": gmpo_object(envelope.id, reports),
    }


def stream_choice(
    envelope: Envelope, index: int, chunk: Chunk, gathered: Gathered
) -> dict[str, Any]:
    """One choice of an event of a stream; what was gathered before it is moved on."""
    shows = envelope.shows_logprobs and bool(chunk.logprobs)
    common = {"index": index, "finish_reason": chunk.finish_reason}
    if envelope.route == "chat":
        delta: dict[str, Any] = {} if gathered.has_begun else {"role": "assistant"}
        if chunk.text or not gathered.has_begun:
            delta["content"] = chunk.text
        gathered.has_begun = True
        logprobs = _chat_logprobs(chunk.logprobs) if shows else None
        return {**common, "delta": delta, "logprobs": logprobs}
    logprobs = _text_logprobs(chunk.logprobs, gathered.offset) if shows else None
    gathered.offset += sum(len(one.token) for one in chunk.logprobs)
    return {**common, "text": chunk.text, "logprobs": logprobs}


def stream_object(
    envelope: Envelope,
    choices: Sequence[Mapping[str, Any]],
    *,
    reports: Sequence[AnswerReport],
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """One event of a stream.

    Args:
        envelope: of the response.
        choices: from `stream_choice`; none in an event about usage alone.
        reports: of each prompt, as far as they are known.
        extra: fields of this event alone.
    """
    return {**_head(envelope, reports, is_stream=True), "choices": list(choices), **extra}


def usage_object(usage: Usage | None) -> dict[str, int] | None:
    """Token counts, where the backend tells them."""
    if usage is None:
        return None
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def gmpo_object(request_id: str, reports: Sequence[AnswerReport]) -> Any:
    """How the answer came about; a list, in their order, of a request with several prompts."""
    told = [
        {
            "request_id": request_id if len(reports) == 1 else f"{request_id}-{place}",
            "quality_score": report.quality,
            "quality_components": report.quality_components,
            "model_version": report.model_version,
            "stability_metric": report.stability,
            "fell_back": report.fell_back,
            "fallback_reason": report.fallback_reason,
            "variant": report.served_variant,
        }
        for place, report in enumerate(reports)
    ]
    return told[0] if len(told) == 1 else told


def report_headers(reports: Sequence[AnswerReport]) -> dict[str, str]:
    """Headers that tell how the answer to one prompt came about, as far as it is known.

    A stream's headers are sent before its quality is known.
    """
    if len(reports) != 1:
        return {}
    (report,) = reports
    told = {
        "x-gmpo-model-version": report.model_version,
        "x-gmpo-variant": report.served_variant,
        "x-gmpo-fell-back": "true" if report.fell_back else "false",
        "x-gmpo-quality-score": None if report.quality is None else f"{report.quality:.4f}",
    }
    return {name: quote(value, safe="/:.,-_ ") for name, value in told.items() if value}


def _head(
    envelope: Envelope, reports: Sequence[AnswerReport], *, is_stream: bool
) -> dict[str, Any]:
    return {
        "id": envelope.id,
        "object": _OBJECTS[envelope.route, is_stream],
        "created": envelope.created,
        "model": envelope.model,
        "system_fingerprint": reports[0].model_version if reports else None,
    }


def _whole_choice(envelope: Envelope, index: int, choice: Gathered) -> dict[str, Any]:
    common = {"index": index, "finish_reason": choice.finish_reason}
    if envelope.route == "chat":
        return {
            **common,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": _chat_logprobs(choice.logprobs) if envelope.shows_logprobs else None,
        }
    return {
        **common,
        "text": choice.text,
        "logprobs": _text_logprobs(choice.logprobs, 0) if envelope.shows_logprobs else None,
    }


def _chat_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    return {
        "content": [
            {**_token(one), "top_logprobs": [_token(other) for other in one.top]} for one in tokens
        ],
        "refusal": None,
    }


def _token(one: TokenLogprob) -> dict[str, Any]:
    # A part of a character decodes to a replacement, whose bytes would be wrong.
    is_whole = "\ufffd" not in one.token
    return {
        "token": one.token,
        "logprob": _finite(one.logprob),
        "bytes": list(one.token.encode()) if is_whole else None,
    }


def _text_logprobs(tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    offsets = []
    for one in tokens:
        offsets.append(offset)
        offset += len(one.token)
    return {
        "tokens": [one.token for one in tokens],
        "token_logprobs": [_finite(one.logprob) for one in tokens],
        "top_logprobs": [_alternatives(one) for one in tokens],
        "text_offset": offsets,
    }


def _alternatives(one: TokenLogprob) -> dict[str, float | None] | None:
    """By text: the likeliest of tokens that look alike, and always the token itself."""
    if one.logprob is None:
        return None
    found: dict[str, float | None] = {}
    for other in one.top:
        found.setdefault(other.token, _finite(other.logprob))
    if one.top:
        found.setdefault(one.token, _finite(one.logprob))
    return found


def _finite(logprob: float | None) -> float | None:
    if logprob is None or math.isfinite(logprob):
        return logprob
    return _NEVER
