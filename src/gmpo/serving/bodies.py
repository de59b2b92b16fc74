"""Bodies of requests in OpenAI's form, and what they ask of a backend."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from gmpo.serving.backend import MAX_COMPLETIONS, GenerationRequest
from gmpo.serving.faults import ApiError

__all__ = ["Asker", "ChatBody", "CompletionBody", "chat_requests", "completion_requests"]

_MAX_LOGPROBS = 20
_LARGEST_SEED = 2**63 - 1
_LARGEST_COVARIATE = 1e9
_DECIMAL = re.compile(r"[+-]?[0-9]{1,30}(\.[0-9]{0,30})?([eE][+-]?[0-9]{1,2})?")
_DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's own default of the plain endpoint."""


def _whole(text: str) -> str:
    """Refuse what JSON can say and no encoding can: a tokenizer would fail on it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it has half of a surrogate pair; send whole characters") from None
    return text


def _not_blank(value: object) -> object:
    """Refuse a right answer that nothing can be graded against, rather than leave it ungraded."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError('it must be the right answer as a text that is not blank, such as "42"')
    return value


def _covariate(told: Any) -> float:
    """A figure of a unit: a number, or a text of one, because OpenAI's metadata holds texts."""
    figure = float(told) if isinstance(told, str) and _DECIMAL.fullmatch(told) else told
    is_number = isinstance(figure, int | float) and not isinstance(figure, bool)
    # Beyond the limit squares may overflow, and one unit would be all that others are held to.
    if not is_number or not abs(figure) <= _LARGEST_COVARIATE:
        limit = f"{_LARGEST_COVARIATE:.0f}"
        raise ValueError(f"it must be a number from -{limit} to {limit}, or a text of one")
    return float(figure)


_Text = Annotated[str, AfterValidator(_whole)]
_Reference = Annotated[_Text, BeforeValidator(_not_blank)]
_Stop = Annotated[str, Field(min_length=1, max_length=256)]
_TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]


class _Body(BaseModel):
    # Fields that are not named here go to the backend, which follows or refuses them.
    model_config = ConfigDict(extra="allow", strict=True, frozen=True)


class _TextPart(BaseModel):
    """A part of a message; text is the only kind."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    type: Literal["text"]
    text: _Text


class _ChatMessage(_Body):
    """One turn of a chat."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: _Text | list[_TextPart]


class _StreamOptions(BaseModel):
    """What a stream tells besides the answer; no backend is passed them, so others are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    include_usage: bool | None = None
    # OpenAI's and vLLM's: this server does neither, and may be told so.
    include_obfuscation: Literal[False] | None = None
    continuous_usage_stats: Literal[False] | None = None


class _Metadata(_Body):
    """What a client notes about its request; of the rest, what a task's scorer needs is read."""

    reference: _Reference | None = None
    covariate: (
        Annotated[
            float,
            Field(ge=-_LARGEST_COVARIATE, le=_LARGEST_COVARIATE),
            BeforeValidator(_covariate),
        ]
        | None
    ) = None


class _Common(_Body):
    model: Annotated[str, Field(min_length=1, max_length=512)]
    n: Annotated[int, Field(ge=1, le=MAX_COMPLETIONS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=-_LARGEST_SEED, le=_LARGEST_SEED)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    metadata: _Metadata | None = None
    # It is recorded, and databases take no NUL.
    user: Annotated[str, Field(max_length=512, pattern=r"^[^\x00]*$")] | None = None

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ChatBody(_Common):
    """Of `/v1/chat/completions`."""

    messages: Annotated[list[_ChatMessage], Field(min_length=1, max_length=4096)]
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=_MAX_LOGPROBS)] | None = None


class CompletionBody(_Common):
    """Of `/v1/completions`."""

    prompt: (
        _Text
        | Annotated[list[_Text], Field(min_length=1, max_length=MAX_COMPLETIONS)]
        | Annotated[list[_TokenId], Field(min_length=1)]
        | Annotated[
            list[Annotated[list[_TokenId], Field(min_length=1)]],
            Field(min_length=1, max_length=MAX_COMPLETIONS),
        ]
    )
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=_MAX_LOGPROBS)] | None = None
    echo: bool | None = None

    @property
    def prompts(self) -> list[str | tuple[int, ...]]:
        """The prompts, one or several."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [tuple(token for token in self.prompt if isinstance(token, int))]
        return [one if isinstance(one, str) else tuple(_ids(one)) for one in self.prompt]


@dataclass(frozen=True, kw_only=True)
class Asker:
    """Who asks, beside what is asked.

    Attributes:
        id: of the request.
        unit: whom an experiment assigns; empty for the body's user, else the session, else the
            request itself.
        session: name of the conversation, if it has one.
    """

    id: str
    unit: str = ""
    session: str | None = None


def chat_requests(body: ChatBody, raw: Mapping[str, Any], asker: Asker) -> list[GenerationRequest]:
    """The one request that a chat is.

    Raises:
        ApiError: fields contradict one another.
    """
    wants_logprobs = bool(body.logprobs)
    if body.top_logprobs and not wants_logprobs:
        raise ApiError(
            400,
            f"top_logprobs is {body.top_logprobs}, and without logprobs none would be listed; "
            "set logprobs to true, or leave top_logprobs out",
            param="top_logprobs",
        )
    return [
        GenerationRequest(
            id=asker.id,
            route="chat",
            messages=tuple(_turn(message) for message in body.messages),
            max_tokens=_longest(body, body.max_tokens),
            logprobs=(body.top_logprobs or 0) if wants_logprobs else None,
            body=raw,
            **_common(body, asker),
        )
    ]


def completion_requests(
    body: CompletionBody, raw: Mapping[str, Any], asker: Asker
) -> list[GenerationRequest]:
    """One request for each prompt.

    Raises:
        ApiError: they ask for too many completions together, or fields contradict one another.
    """
    longest = _longest(body, body.max_tokens)
    prompts = body.prompts
    common = _common(body, asker)
    num_completions = len(prompts) * common["n"]
    if num_completions > MAX_COMPLETIONS:
        # Each limit alone would let one request ask for 16,384, and nobody else gets a turn.
        raise ApiError(
            400,
            f"{len(prompts)} prompts with n {common['n']} are {num_completions} completions, and "
            f"at most {MAX_COMPLETIONS} are made for one request; ask for fewer",
            param="n",
        )
    return [
        GenerationRequest(
            id=asker.id if len(prompts) == 1 else f"{asker.id}-{place}",
            response_id=asker.id,
            num_prompts=len(prompts),
            route="completions",
            prompt=prompt,
            max_tokens=_DEFAULT_COMPLETION_TOKENS if longest is None else longest,
            logprobs=body.logprobs,
            echo=bool(body.echo),
            body={**raw, "prompt": prompt if isinstance(prompt, str) else list(prompt)},
            **common,
        )
        for place, prompt in enumerate(prompts)
    ]


def _longest(body: _Common, max_tokens: int | None) -> int | None:
    """The limit of a completion, by whichever name it was given."""
    if max_tokens is None:
        return body.max_completion_tokens
    if body.max_completion_tokens is not None:
        raise ApiError(
            400,
            f"max_tokens is {max_tokens} and max_completion_tokens {body.max_completion_tokens}, "
            "and both limit the completion; give one of them",
            param="max_completion_tokens",
        )
    return max_tokens


def _common(body: _Common, asker: Asker) -> dict[str, Any]:
    if body.stream_options is not None and not body.stream:
        raise ApiError(
            400,
            "stream_options says what a stream tells, and this answer comes in one piece; set "
            "stream to true, or leave stream_options out",
            param="stream_options",
        )
    stop = body.stop
    return {
        "model": body.model,
        "n": body.n or 1,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "top_k": max(0, body.top_k or 0),  # -1 is a common way to say "all"
        "stop": () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop),
        "seed": body.seed,
        "stream": bool(body.stream),
        "unit": asker.unit or body.user or asker.session or asker.id,
        "session": asker.session,
        "covariate": None if body.metadata is None else body.metadata.covariate,
    }


def _turn(message: _ChatMessage) -> dict[str, Any]:
    """A turn with its text in one piece."""
    content = message.content
    text = content if isinstance(content, str) else "".join(part.text for part in content)
    return {**message.model_dump(), "content": text}


def _ids(prompt: object) -> list[int]:
    assert isinstance(prompt, list)
    return prompt
