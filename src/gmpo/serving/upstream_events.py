"""What an OpenAI-compatible server sends, read as chunks; anything else is a broken stream."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gmpo.serving.backend import BackendError, Chunk, GenerationRequest, TokenLogprob, Usage

__all__ = ["EventDecoder", "UpstreamAnswer", "told_error"]

_LONGEST_EVENT = 4 << 20
_DONE = "[DONE]"
_NOT_WHOLE = ("abort", "error")
"""Finish reasons by which servers say that a completion did not come to its end."""


class EventDecoder:
    """Server-sent events out of pieces of a body; lines end with LF or CRLF.

    Args:
        max_bytes: longest event; a longer one is broken rather than kept in memory.
    """

    def __init__(self, *, max_bytes: int = _LONGEST_EVENT) -> None:
        self._max_bytes = max_bytes
        self._rest = b""
        self._lines: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> Iterator[str]:
        """The data of the events that end in this piece.

        Raises:
            BackendError: an event is too long, or not UTF-8.
        """
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._lines.append(line[5:].removeprefix(b" "))
                self._size += len(line)
            elif not line and self._lines:
                joined, self._lines, self._size = b"\n".join(self._lines), [], 0
                yield _text(joined)
        if self._size + len(self._rest) > self._max_bytes:
            raise _broken(f"an event has more than {self._max_bytes} bytes")


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


_Logprob = Annotated[float, Field(le=1e-3, allow_inf_nan=False)]


class _Token(_Part):
    token: str
    logprob: _Logprob
    top_logprobs: list[_Token] | None = None

    def as_record(self) -> TokenLogprob:
        return TokenLogprob(
            token=self.token,
            logprob=self.logprob,
            top=tuple(
                TokenLogprob(token=one.token, logprob=one.logprob)
                for one in self.top_logprobs or ()
            ),
        )


class _ChatLogprobs(_Part):
    content: list[_Token] | None = None

    def records(self) -> tuple[TokenLogprob, ...]:
        return tuple(one.as_record() for one in self.content or ())


class _TextLogprobs(_Part):
    tokens: list[str]
    token_logprobs: list[_Logprob | None]
    top_logprobs: list[dict[str, _Logprob] | None] | None = None
    text_offset: list[int] | None = None

    @model_validator(mode="after")
    def _one_of_each(self) -> _TextLogprobs:
        lists = (self.token_logprobs, self.top_logprobs, self.text_offset)
        if any(one is not None and len(one) != len(self.tokens) for one in lists):
            raise ValueError("its lists have different lengths")
        return self

    def prompt_size(self, num_prompt_tokens: int, text: str) -> int:
        """Characters of the prompt at the beginning of the text."""
        starts: Iterable[int] | None = self.text_offset
        if starts is None:
            starts = accumulate((len(token) for token in self.tokens[:-1]), initial=0)
        ends = [*starts, len(text)]
        return ends[min(num_prompt_tokens, len(ends) - 1)]

    def records(self) -> tuple[TokenLogprob, ...]:
        tops: Sequence[Mapping[str, float] | None] = self.top_logprobs or [None] * len(self.tokens)
        return tuple(
            TokenLogprob(
                token=token,
                logprob=logprob,
                top=tuple(TokenLogprob(token=text, logprob=of) for text, of in (top or {}).items()),
            )
            for token, logprob, top in zip(self.tokens, self.token_logprobs, tops, strict=True)
        )


class _Delta(_Part):
    # What else a delta says must not be lost without a word, so it is kept to be looked at.
    model_config = ConfigDict(extra="allow", frozen=True)

    role: str | None = None
    content: str | None = None


class _Choice(_Part):
    index: int = 0
    delta: _Delta | None = None
    text: str | None = None
    logprobs: _ChatLogprobs | _TextLogprobs | None = Field(default=None, union_mode="left_to_right")
    finish_reason: str | None = None


class _ChatChoice(_Choice):
    delta: _Delta
    logprobs: _ChatLogprobs | None = None


class _TextChoice(_Choice):
    text: str
    logprobs: _TextLogprobs | None = None


class _Usage(_Part):
    prompt_tokens: Annotated[int, Field(ge=0)]
    completion_tokens: Annotated[int, Field(ge=0)] = 0


class _Event(_Part):
    choices: Sequence[_Choice]
    usage: _Usage | None = None
    system_fingerprint: str | None = None


class _ChatEvent(_Event):
    choices: Sequence[_ChatChoice]


class _TextEvent(_Event):
    choices: Sequence[_TextChoice]


class UpstreamAnswer:
    """One answer, event by event.

    The piece that ends the last choice is held back until the number of tokens is known.

    Args:
        request: what was asked.
        version: of the model; None takes what the server says (`system_fingerprint`), or else
            `model`.
        model: the model's name at the server.
    """

    def __init__(self, request: GenerationRequest, *, version: str | None, model: str) -> None:
        self._request = request
        self._version = version
        self._model = model
        self._event = _ChatEvent if request.route == "chat" else _TextEvent
        self._open = set(range(request.n))
        self._held: Chunk | None = None
        self._usage: Usage | None = None
        self.is_done = False
        """Whether the server has said that nothing more comes."""

    def read(self, data: str) -> Iterator[Chunk]:
        """The chunks that an event is; those that say nothing are left out.

        Raises:
            BackendError: the event is an error, is no event of OpenAI's, or carries what a chunk
                cannot.
        """
        if data.strip() == _DONE:
            self.is_done = True
            return
        for choice in self._parsed(data).choices:
            chunk = self._chunk(choice, echo=())
            if self._held is not None:
                raise _broken("text came after the last choice had ended")
            if not self._open:
                self._held = chunk
            elif chunk.text or chunk.logprobs or chunk.finish_reason is not None:
                yield chunk

    def read_whole(self, data: str) -> Iterator[Chunk]:
        """The chunks of a completions response in one piece, which begins with the prompt.

        Raises:
            BackendError: as for `read`, or the prompt's end cannot be told.
        """
        event = self._parsed(data)
        if self._usage is None:
            raise _broken("the response does not tell how many tokens the prompt has")
        for choice in event.choices:
            echo, rest = self._split(choice, self._usage.prompt_tokens)
            yield echo
            chunk = self._chunk(rest, echo=echo.logprobs)
            if self._open:
                yield chunk
            else:
                self._held = chunk

    def end(self) -> Iterator[Chunk]:
        """The last chunk, once no more events come.

        Raises:
            BackendError: a choice has not ended, so the answer was cut.
        """
        if self._open:
            raise _broken("its answer was cut before the end")
        assert self._held is not None, "the choice that ended last is held"
        yield Chunk(
            index=self._held.index,
            text=self._held.text,
            logprobs=self._held.logprobs,
            finish_reason=self._held.finish_reason,
            usage=self._usage,
            model_version=self._held.model_version,
        )

    def _parsed(self, data: str) -> _Event:
        if data.lstrip().startswith('{"error"'):
            raise self._error(data)
        try:
            event = self._event.model_validate_json(data)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "the event"
            raise _broken(f"{place}: {first['msg']}") from None
        if event.usage is not None:
            self._usage = Usage(
                prompt_tokens=event.usage.prompt_tokens,
                completion_tokens=event.usage.completion_tokens,
            )
        # One version for all chunks: the first event settles it.
        self._version = self._version or event.system_fingerprint or self._model
        return event

    def _chunk(self, choice: _Choice, *, echo: Sequence[TokenLogprob]) -> Chunk:
        if choice.index not in self._open:
            raise _broken(f"choice {choice.index} was not asked for, or had ended")
        if choice.finish_reason in _NOT_WHOLE:
            raise _broken(f"it gave choice {choice.index} up ({choice.finish_reason})")
        if choice.delta is not None:
            for name, value in (choice.delta.model_extra or {}).items():
                if value:
                    raise BackendError(
                        f"the model answered with {name!r}, which this server does not pass on; "
                        "it passes on text",
                        fault="failed",
                    )
        if choice.finish_reason is not None:
            self._open.remove(choice.index)
        logprobs = () if choice.logprobs is None else choice.logprobs.records()
        return Chunk(
            index=choice.index,
            text=(choice.delta.content if choice.delta is not None else choice.text) or "",
            logprobs=logprobs[len(echo) :],
            finish_reason=choice.finish_reason,
            model_version=self._version,
        )

    def _split(self, choice: _Choice, num_prompt_tokens: int) -> tuple[Chunk, _Choice]:
        """The prompt given back, and the choice with the rest of its text."""
        text = choice.text or ""
        prompt = self._request.prompt
        records: tuple[TokenLogprob, ...] = ()
        told = choice.logprobs if isinstance(choice.logprobs, _TextLogprobs) else None
        if told is not None:
            records = told.records()[:num_prompt_tokens]
        # Servers list tokens that the prompt's text does not show, so the text comes first.
        if isinstance(prompt, str) and text.startswith(prompt):
            size = len(prompt)
        elif told is not None:
            size = told.prompt_size(num_prompt_tokens, text)
        else:
            raise _broken("where the echoed prompt ends cannot be told without log-probabilities")
        echo = Chunk(
            index=choice.index,
            text=text[:size],
            logprobs=records,
            is_echo=True,
            model_version=self._version,
        )
        return echo, choice.model_copy(update={"text": text[size:]})

    def _error(self, data: str) -> BackendError:
        told = told_error(data)
        code = told.get("code")
        is_refusal = code in (400, 422) and len(self._open) == self._request.n
        return BackendError(
            f"the model's server broke off: {told.get('message') or 'it gave no reason'}"[:300],
            fault="bad_request" if is_refusal else "broken",
        )


def told_error(data: str) -> dict[str, Any]:
    """The fields of an error object in OpenAI's form; none where it is something else."""
    try:
        told = json.loads(data)["error"]
    except (ValueError, KeyError, TypeError):
        return {}
    return told if isinstance(told, dict) else {"message": str(told)}


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise _broken("an event is not UTF-8") from None


def _broken(what: str) -> BackendError:
    return BackendError(
        f"the model's server sent what cannot be used: {what}"[:300], fault="broken"
    )
