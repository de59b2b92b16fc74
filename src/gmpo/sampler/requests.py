"""What a sampler is asked and what it answers; no torch, so that any engine can stand behind it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from gmpo.records import FinishReason

__all__ = ["Completion", "SampleRequest", "SampledToken", "Sampler", "TokenAlternative", "complete"]


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """One prompt and how to continue it.

    Attributes:
        id: the caller's name for the request; unique among requests in flight.
        token_ids: the prompt.
        media: inputs of other modalities; the local sampler takes none.
        num_completions: how many to draw.
        max_tokens: longest completion, the stop token included.
        temperature: divides the logits; 0 is greedy, and nothing lies between that and 1e-4.
        top_p: smallest set of tokens with this probability is sampled from; 1 is all.
        top_k: the k likeliest tokens are sampled from; 0 is all.
        stop_ids: token ids that end a completion; the one sampled stays in it.
        stop_strings: texts that end a completion.
        key: what the completions' randomness depends on, beside their index and position.
        first_index: number of the first completion; the others follow.
        first_position: number of the first token drawn in its completion, above 0 where
            `token_ids` end in a completion's beginning.
        top_logprobs: likeliest alternatives reported at each position.
        prompt_logprobs: whether to report log-probabilities of the prompt's own tokens, with
            as many alternatives.
        stream: whether each token is reported when it is drawn.
    """

    id: str
    token_ids: Sequence[int]
    media: tuple[Any, ...] = ()
    num_completions: int = 1
    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    key: tuple[int | str, ...] = (0,)
    first_index: int = 0
    first_position: int = 0
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    stream: bool = False


@dataclass(frozen=True, kw_only=True)
class TokenAlternative:
    """A token that could have been drawn, with its log-probability in nats."""

    token_id: int
    logprob: float


@dataclass(frozen=True, kw_only=True)
class SampledToken:
    """One token of a streamed completion, as it was drawn."""

    request_id: str
    index: int
    position: int
    token_id: int
    logprob: float
    alternatives: tuple[TokenAlternative, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One finished completion.

    `logprobs` are those of the unmodified model at temperature 1, `sampled_logprobs` those of the
    distribution that was sampled (temperature, top-p and top-k applied; 0 when greedy), in nats.
    `prompt_logprobs` and `prompt_top_logprobs` are those of the prompt's second token and on.
    """

    request_id: str
    index: int
    token_ids: Int[np.ndarray, " T"]
    logprobs: Float[np.ndarray, " T"]
    sampled_logprobs: Float[np.ndarray, " T"]
    finish_reason: FinishReason
    first_version: int
    last_version: int
    top_logprobs: tuple[tuple[TokenAlternative, ...], ...] = ()
    prompt_logprobs: tuple[float, ...] = ()
    prompt_top_logprobs: tuple[tuple[TokenAlternative, ...], ...] = ()


@runtime_checkable
class Sampler(Protocol):
    """Requests in, completions out; used by training, evaluation and serving alike."""

    def submit(self, request: SampleRequest) -> None:
        """Queue a request.

        Raises:
            gmpo.errors.GmpoError: the request cannot be served as asked; nothing was queued.
        """

    def cancel(self, request_id: str) -> None:
        """End a request; its completions so far come back with finish reason "cancelled"."""

    def forget(self) -> None:
        """Drop every request, unanswered: what is left to do where submitting or a step raised."""

    def step(self) -> list[SampledToken | Completion]:
        """Draw one token of every running completion; empty when nothing is left to do."""

    def load_weights(self, version: int, named_tensors: Iterable[tuple[str, Any]]) -> None:
        """Sample from these weights from now on, and stamp completions with their version."""

    @property
    def is_idle(self) -> bool:
        """Whether no request is queued or running."""

    @property
    def version(self) -> int:
        """Version of the weights that are sampled from."""


def complete(sampler: Sampler, requests: Iterable[SampleRequest]) -> dict[str, list[Completion]]:
    """Run requests to their end; completions by request id, in order of their index.

    Whatever is raised, a refusal of a request or Ctrl-C, the idle sampler is left idle.
    """
    finished: dict[str, list[Completion]] = {}
    try:
        for request in requests:
            sampler.submit(request)
            finished[request.id] = []
        while not sampler.is_idle:
            for event in sampler.step():
                if isinstance(event, Completion):
                    finished[event.request_id].append(event)
    finally:
        if not sampler.is_idle:
            sampler.forget()
    for completions in finished.values():
        completions.sort(key=lambda completion: completion.index)
    return finished
