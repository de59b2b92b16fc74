"""What is kept of an answer once it is over: the "answer" event of the store."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gmpo.serving.backend import AnswerReport, Chunk, GenerationRequest, Usage

__all__ = ["AnswerBook", "AnswerRecord"]


@dataclass(frozen=True, kw_only=True)
class AnswerRecord:
    """One answered, refused or broken request for one prompt.

    Attributes:
        request: what was asked.
        report: how the answer came about, as far as it came.
        time: when the request came, in unix seconds.
        status: of HTTP; 499 where the client left, 502 where a stream was cut.
        finish_reason: "length" if any choice was cut by its limit, else how they ended.
        usage: tokens; None where they are not known.
        latency_seconds: from the request to its end, the wait for a turn included.
        first_token_seconds: from the request to the first text of a stream.
        error: why there is no whole answer.
        texts: of the choices, in their order, where the request allowed that they are kept.
    """

    request: GenerationRequest
    report: AnswerReport
    time: float
    status: int
    finish_reason: str | None
    usage: Usage | None
    latency_seconds: float
    first_token_seconds: float | None
    error: str | None
    texts: tuple[str, ...] | None = None

    def payload(self) -> dict[str, Any]:
        """The event's payload; seconds, tokens and nats."""
        report = self.report
        tokens = None if self.usage is None else self.usage.completion_tokens
        return {
            "route": self.request.route,
            "assigned_variant": report.assigned_variant,
            "served_variant": report.served_variant,
            "backend": report.backend or None,
            "fell_back": report.fell_back,
            "fallback_reason": report.fallback_reason,
            "status": self.status,
            "finish_reason": self.finish_reason,
            "prompt_tokens": None if self.usage is None else self.usage.prompt_tokens,
            "completion_tokens": tokens,
            "latency_s": self.latency_seconds,
            "first_token_s": self.first_token_seconds,
            "tokens_per_s": tokens / self.latency_seconds if tokens else None,
            "quality": report.quality,
            "mean_logprob": report.mean_logprob,
            "quality_components": dict(report.quality_components),
            "error": self.error,
            "session": self.request.session,
        }

    def text_payload(self) -> dict[str, Any] | None:
        """What was asked and answered; None for a part of an answer, or one not to be kept.

        Token ids are no text, so a prompt of them is None.
        """
        if self.texts is None or self.status != 200:
            return None
        prompt = self.request.prompt
        return {
            "messages": None if self.request.messages is None else list(self.request.messages),
            "prompt": prompt if isinstance(prompt, str) else None,
            "completions": list(self.texts),
            "finish_reason": self.finish_reason,
            "consent": True,
        }


@dataclass
class AnswerBook:
    """One prompt's answer while it is read."""

    request: GenerationRequest
    report: AnswerReport = field(default_factory=AnswerReport)
    began: float = field(default_factory=time.perf_counter)
    time: float = field(default_factory=time.time)
    first_token: float | None = None
    usage: Usage | None = None
    finish_reasons: dict[int, str] = field(default_factory=dict)
    pieces: dict[int, list[str]] = field(default_factory=dict)

    def add(self, chunk: Chunk) -> None:
        """Note what a chunk tells."""
        if self.first_token is None and not chunk.is_echo and self.request.stream:
            self.first_token = time.perf_counter() - self.began
        if chunk.finish_reason is not None:
            self.finish_reasons[chunk.index] = chunk.finish_reason
        self.usage = chunk.usage or self.usage
        if self.may_be_kept and not chunk.is_echo:
            self.pieces.setdefault(chunk.index, []).append(chunk.text)

    @property
    def may_be_kept(self) -> bool:
        """Whether the client allows that its texts are kept: OpenAI's `store`, true and no less."""
        return self.request.body.get("store") is True

    @property
    def is_whole(self) -> bool:
        """Whether every choice has ended."""
        return len(self.finish_reasons) == self.request.n

    def close(self, status: int, error: str | None) -> AnswerRecord:
        """The record of an answer that is over."""
        return AnswerRecord(
            request=self.request,
            report=self.report,
            time=self.time,
            status=status,
            finish_reason=_of_all(list(self.finish_reasons.values())),
            usage=self.usage,
            latency_seconds=time.perf_counter() - self.began,
            first_token_seconds=self.first_token,
            error=error,
            texts=self._texts() if self.may_be_kept else None,
        )

    def _texts(self) -> tuple[str, ...]:
        return tuple("".join(self.pieces.get(index, ())) for index in range(self.request.n))


def _of_all(reasons: Sequence[str]) -> str | None:
    if not reasons:
        return None
    return "length" if "length" in reasons else reasons[0]
