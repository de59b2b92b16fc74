"""What stands behind the gateway: backends that generate, and a router that chooses among them.

A request enters as a `GenerationRequest` of one prompt and a backend answers with `Chunk`s, which
the router hands on; it tells how they came about in an `AnswerReport`.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from gmpo.errors import GmpoError

__all__ = [
    "MAX_COMPLETIONS",
    "AnswerReport",
    "Backend",
    "BackendError",
    "BackendFault",
    "Chunk",
    "GenerationRequest",
    "Router",
    "TokenLogprob",
    "Usage",
]

MAX_COMPLETIONS = 128
"""Of one request, over all its prompts."""

BackendFault = Literal["bad_request", "overloaded", "unavailable", "timeout", "broken", "failed"]
"""Why a backend gave no whole answer.

`bad_request`: the request itself is not allowed; nobody else is asked if nobody was before.
`overloaded`: too many requests; `unavailable`: it cannot be reached, or takes none now.
`timeout`: it took too long. `broken`: its stream was cut or cannot be read.
`failed`: its own error.
"""


class BackendError(GmpoError):
    """A backend gave no whole answer.

    Args:
        message: what is wrong, the value, what is allowed, what to do.
        fault: why; decides whether another backend may be asked.
        param: the request's field at fault, where there is one.
        code: a name for programs, in OpenAI's vocabulary where it has one.
        retry_after_seconds: when to ask again, where that is known.
    """

    def __init__(
        self,
        message: str,
        *,
        fault: BackendFault,
        param: str | None = None,
        code: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.fault: BackendFault = fault
        self.param = param
        self.code = code
        self.retry_after_seconds = retry_after_seconds


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One prompt and how to continue it; exactly one of `messages` and `prompt` is set.

    Attributes:
        id: unique among requests; that of the response, and the prompt's place if it has several.
        response_id: of the response that it is a part of; empty where that is `id`.
        route: the endpoint that was asked.
        model: the name that was asked for.
        messages: turns of a chat, in OpenAI's form with plain text contents.
        prompt: text, or token ids, to be continued as they are.
        n: how many completions, at least 1; choices are numbered 0 to n - 1.
        max_tokens: longest completion; None is what the model's context leaves, within the
            gateway's limit. 0 only together with `echo`.
        temperature: 0 or more; 0 is greedy.
        top_p: in (0, 1]; 1 is all.
        top_k: 0 is all.
        stop: texts that end a completion and are left out of it.
        seed: the same seed gives the same completions; None is a fresh one.
        logprobs: alternatives that the client wants at each token; None: it wants no
            log-probabilities at all, and is shown none.
        echo: whether each choice begins with the prompt (with its log-probabilities, if wanted).
        stream: whether the client reads the answer as it is made; else it is held until whole.
        unit: whom an experiment assigns: the caller's user, or session, or this request.
        covariate: a figure about the unit that the caller knew before; an experiment takes noise
            out of its result by it.
        num_prompts: that share the response which this is a part of.
        session: the caller's name for the conversation, where it has one.
        body: the JSON body as it came; of a body with several prompts, with this one alone.
    """

    id: str
    route: Literal["chat", "completions"]
    model: str
    messages: tuple[Mapping[str, Any], ...] | None = None
    prompt: str | tuple[int, ...] | None = None
    n: int = 1
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    echo: bool = False
    stream: bool = False
    unit: str = ""
    session: str | None = None
    covariate: float | None = None
    response_id: str = ""
    num_prompts: int = 1
    body: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert (self.messages is None) != (self.prompt is None), "either messages or a prompt"


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """A token's text and log-probability in nats; None for the first token of an echoed prompt.

    Attributes:
        token: its text; parts of a character are shown as the tokenizer decodes them.
        logprob: at temperature 1, of the unmodified model.
        token_id: where the backend tells.
        top: the likeliest tokens at this position, likeliest first.
    """

    token: str
    logprob: float | None
    token_id: int | None = None
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens of one request; the completions' are summed over its choices."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A piece of one choice.

    Attributes:
        index: number of the choice.
        text: to be appended to what came before.
        token_ids: the new tokens, as far as the backend tells them; text may lag behind them.
        logprobs: one for each new token wherever the backend has them, asked for or not: the
            quality score reads them, and the gateway shows them only to who asked.
        is_echo: this is the prompt, given back; never more than a choice's first chunk.
        finish_reason: "stop" or "length" on a choice's last chunk, None before.
        usage: on the very last chunk of a request alone.
        model_version: digest or name of the weights, where the backend knows it; one for all
            chunks of a request.
    """

    index: int = 0
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    is_echo: bool = False
    finish_reason: str | None = None
    usage: Usage | None = None
    model_version: str | None = None


@runtime_checkable
class Backend(Protocol):
    """Something that generates: the embedded engine, or a server."""

    @property
    def name(self) -> str:
        """The model's name, as clients ask for it."""

    @property
    def model_version(self) -> str | None:
        """Of the weights that new requests get; None where it is not known."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        """The answer, choice by choice or interleaved; each choice ends with a finish reason.

        A stream that ends before each choice has one raises instead. Closing the generator early
        (`aclose`) ends the work behind it.

        Raises:
            BackendError: there is no answer, or no more of it.
        """

    async def ready(self) -> bool:
        """Whether a request would be taken now."""

    async def close(self) -> None:
        """Let go of everything; running requests end with an error."""


@dataclass(kw_only=True)
class AnswerReport:
    """How an answer came about; filled while it is read, whole once it was read to its end.

    It tells of a request that nobody answered too, as far as it came.

    Attributes:
        backend: name of the backend that answered, or at least began to; empty if none did.
        model_version: of the weights that answered; where none did, of the backend that was asked
            first; None of a request that is not allowed, or that nobody was asked yet.
        experiment: running experiment that the request is part of.
        assigned_variant: what the request's unit was assigned to.
        served_variant: what answered; another one after a fallback.
        fell_back: whether it is not the backend that was asked first.
        fallback_reason: why.
        quality: score of the answer, in (0, 1].
        is_low_quality: whether the score is below the threshold; False where there is none.
        quality_components: what it was made of, each in [0, 1].
        mean_logprob: of the completion's tokens, in nats.
        stability: the article's stability metric, in [0, 1].
    """

    backend: str = ""
    model_version: str | None = None
    experiment: str | None = None
    assigned_variant: str | None = None
    served_variant: str | None = None
    fell_back: bool = False
    fallback_reason: str | None = None
    quality: float | None = None
    is_low_quality: bool = False
    quality_components: dict[str, float] = field(default_factory=dict)
    mean_logprob: float | None = None
    stability: float | None = None

    @property
    def answering_version(self) -> str | None:
        """Of the weights that at least began to answer; None where none did."""
        return self.model_version if self.backend else None


@runtime_checkable
class Router(Protocol):
    """Chooses who answers."""

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names that requests may ask for; the first is the default."""

    @property
    def model_version(self) -> str | None:
        """Of the model that answers unless something else is decided for a request."""

    async def route(
        self, request: GenerationRequest, report: AnswerReport, *, deadline: float = math.inf
    ) -> AsyncGenerator[Chunk, None]:
        """Start an answer; returns once its first chunk is there, or all of one that is held back.

        Args:
            request: what is asked.
            report: filled on the way, also of an answer that fails.
            deadline: in the event loop's time, when the caller waits no more and cancels: that is
                a backend's fault, and not that of a client who left.

        Returns:
            All chunks, the first included; to be read to the end or closed (`aclose`).

        Raises:
            BackendError: nobody answers; once this has returned, the chunks raise it.
        """

    async def ready(self) -> bool:
        """Whether a request would be answered now."""

    async def close(self) -> None:
        """Close all backends."""
