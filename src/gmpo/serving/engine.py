"""The embedded engine: a model in this process behind the `Backend` protocol.

It is the training sampler, run on a thread of its own. The one module of `serving` that loads
torch.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import secrets
import sys
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from huggingface_hub import try_to_load_from_cache
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gmpo.config import ModelConfig
from gmpo.engine import build_sampler
from gmpo.errors import DataError, GmpoError, ModelError, what_was_raised
from gmpo.inputs import resolve_model
from gmpo.model_files import holds_weights, weights_version
from gmpo.policy.load import (
    context_length,
    end_token_ids,
    load_policy,
    load_tokenizer,
    model_folder,
    model_version,
)
from gmpo.records import Message, Prompt
from gmpo.rollouts import PromptRenderer, decode_text
from gmpo.sampler.requests import SampleRequest
from gmpo.serving.backend import MAX_COMPLETIONS, BackendError, Chunk, GenerationRequest
from gmpo.serving.engine_answer import EngineAnswer, TokenTexts
from gmpo.serving.engine_options import refuse_what_is_not_done
from gmpo.serving.sampling_thread import SamplerSource, SamplingThread

__all__ = ["EmbeddedBackend", "EngineLimits", "ServedModel", "Swap", "load_served_model"]

_ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}


@dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """How much is decoded at once, and how long a request may be.

    Attributes:
        max_rows: completions decoded together; the others wait.
        max_prompt_tokens: longest prompt.
        max_tokens: longest completion, also where a request names no limit.
    """

    max_rows: int = 32
    max_prompt_tokens: int = 2048
    max_tokens: int = 1024


@dataclass(frozen=True, kw_only=True)
class Swap:
    """A change of the weights that new requests get; both versions are equal if none was due."""

    previous: str
    version: str
    seconds: float


@dataclass(eq=False, kw_only=True)
class ServedModel:
    """A loaded model with all that is needed to answer with it.

    Attributes:
        version: digest of the weights, by which the registry and the run know them too.
        tokenizer: of the model.
        renderer: turns a chat into token ids as in training.
        stop_ids: token ids that end a completion.
        context: tokens of a prompt and its completion.
        source: of samplers over the weights.
        texts: of its tokens.
    """

    version: str
    tokenizer: PreTrainedTokenizerBase
    renderer: PromptRenderer
    stop_ids: tuple[int, ...]
    context: int
    source: SamplerSource
    texts: TokenTexts


def load_served_model(
    config: ModelConfig, *, max_rows: int, warn: Callable[[str], None] = lambda _: None
) -> ServedModel:
    """Load a model and its tokenizer, on a thread that ends with it.

    A thread on which torch has run keeps a pool of OpenMP workers for itself until it ends. Beside
    that of the thread which samples they would be more than the processors, and OpenMP's workers
    then sleep between any two operations: on two cores a step takes twice as long.

    Raises:
        gmpo.errors.GmpoError: there is no such model, or it cannot be used: memory for it is short,
            or whatever else its own code or a library raised.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="gmpo-loading") as passing:
        try:
            return passing.submit(_load, config, max_rows, warn).result()
        except GmpoError:
            raise
        except Exception as error:
            raise ModelError(
                f"cannot load model {config.name!r}: {what_was_raised(error)}; if memory is short, "
                "free some or take a smaller model"
            ) from error


def _load(config: ModelConfig, max_rows: int, warn: Callable[[str], None]) -> ServedModel:
    config = resolve_model(config, warn=warn)
    policy = load_policy(config.name, device=config.device, dtype=config.dtype, warn=warn)
    tokenizer = load_tokenizer(config.name)
    return ServedModel(
        version=_version(config.name, policy.model),
        tokenizer=tokenizer,
        renderer=PromptRenderer(
            tokenizer,
            prompt_format=config.prompt_format,
            system=config.system,
            max_prompt_tokens=sys.maxsize,  # the engine has limits of its own and names them
        ),
        stop_ids=end_token_ids(policy.model, tokenizer),
        context=context_length(policy.model),
        source=SamplerSource(lambda: build_sampler(policy, tokenizer, max_rows=max_rows)),
        texts=_token_texts(tokenizer),
    )


def _version(name: str, model: PreTrainedModel) -> str:
    """The digest of the weights as they lie on disk: one name in whatever precision they serve.

    Weights that have none there (other files than safetensors, quantised ones) are not in any
    registry; they are known by what was loaded.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = Path(model_folder(name))
    if not folder.is_dir():
        cached = try_to_load_from_cache(name, "config.json")
        folder = Path(cached).parent if isinstance(cached, str) else folder
    if not holds_weights(folder):
        return model_version(model)
    try:
        return weights_version(folder)
    except ModelError:
        return model_version(model)


def _token_texts(tokenizer: PreTrainedTokenizerBase) -> TokenTexts:
    def with_all(token_ids: Sequence[int]) -> str:
        return cast(str, tokenizer.decode(list(token_ids)))

    return TokenTexts(
        of_completion=functools.partial(decode_text, tokenizer),
        of_prompt=with_all,
        of_token=functools.lru_cache(maxsize=None)(lambda token_id: with_all([token_id])),
    )


class EmbeddedBackend:
    """`Backend` over models in this process; its weights can be changed while requests run.

    Args:
        model: answers from now on.
        name: as clients ask for it.
        limits: of requests.
    """

    def __init__(self, model: ServedModel, *, name: str, limits: EngineLimits) -> None:
        self._model = model
        self._name = name
        self._limits = limits
        self._thread = SamplingThread()
        # One at a time: tokenizers may keep a state while they encode.
        self._encoding = ThreadPoolExecutor(max_workers=1, thread_name_prefix="gmpo-tokenizing")
        self._loading = ThreadPoolExecutor(max_workers=1, thread_name_prefix="gmpo-loading")
        self._numbers = itertools.count()

    @property
    def name(self) -> str:
        """The model's name, as clients ask for it."""
        return self._name

    @property
    def model_version(self) -> str:
        """Digest of the weights that new requests get."""
        return self._model.version

    @property
    def num_requests(self) -> int:
        """Requests that are being answered or wait for a row."""
        return self._thread.num_requests

    @property
    def num_failures(self) -> int:
        """Times the sampler broke, or could not be made anew; its requests got an error."""
        return self._thread.num_failures

    async def ready(self) -> bool:
        """Whether a request would be taken now."""
        return self._thread.is_running

    async def close(self) -> None:
        """End the thread; running requests end with an error."""
        await asyncio.to_thread(self._thread.close)
        # A model that is being loaded is waited for elsewhere: the event loop takes signals.
        for work in (self._encoding, self._loading):
            await asyncio.to_thread(work.shutdown, cancel_futures=True)

    async def swap(self, load: Callable[[], ServedModel]) -> Swap:
        """Load other weights beside the ones that serve, then give them to all new requests.

        Requests in flight end on the weights that they began with, which are then let go, so for a
        while both models are in memory. If loading fails, the old ones go on serving.

        Raises:
            gmpo.errors.GmpoError: the other model cannot be loaded.
        """
        start = time.perf_counter()
        loaded = await asyncio.get_running_loop().run_in_executor(self._loading, load)
        # Another change may have come first: what serves now counts, not what served when asked.
        previous = self._model.version
        if loaded.version != previous:
            self._model = loaded
        return Swap(previous=previous, version=loaded.version, seconds=time.perf_counter() - start)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        """The answer, by the weights that serve when the request comes.

        Raises:
            BackendError: the request is not allowed, or the engine broke or was closed.
        """
        model = self._model
        refuse_what_is_not_done(request)
        prompt_ids = await asyncio.get_running_loop().run_in_executor(
            self._encoding, _encode, model, request
        )
        sample = self._sample_request(request, prompt_ids, model)
        answer = EngineAnswer(
            request, prompt_ids=prompt_ids, texts=model.texts, version=model.version
        )
        mailbox = self._thread.submit(model.source, sample)
        try:
            while not answer.is_finished:
                for chunk in answer.chunks_of(await mailbox.get()):
                    yield chunk
        finally:
            if not answer.is_finished:
                self._thread.cancel(sample.id)

    def _sample_request(
        self, request: GenerationRequest, prompt_ids: tuple[int, ...], model: ServedModel
    ) -> SampleRequest:
        seed = secrets.randbits(63) if request.seed is None else request.seed
        scores_prompt = request.echo and request.logprobs is not None
        max_tokens = self._max_tokens(request, len(prompt_ids), model)
        self._refuse_endless_lists(request, len(prompt_ids), max_tokens)
        return SampleRequest(
            id=f"{request.id}/{next(self._numbers)}",
            token_ids=prompt_ids,
            num_completions=request.n,
            # One token is drawn and left out where none is wanted: scoring a prompt alone is not
            # among the sampler's requests.
            max_tokens=max(1, max_tokens),
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            stop_ids=model.stop_ids,
            stop_strings=request.stop,
            key=(seed,),
            top_logprobs=request.logprobs or 0,
            prompt_logprobs=scores_prompt,
            # A prompt's scores come with the finished completion, and before all else in the text.
            stream=request.stream and not scores_prompt,
        )

    def _refuse_endless_lists(
        self, request: GenerationRequest, num_prompt_tokens: int, max_tokens: int
    ) -> None:
        """Refuse an answer whose log-probabilities would fill the memory.

        Tokens are limited, but each lists up to 20 alternatives, and each choice its echoed prompt.
        """
        if request.logprobs is None:
            return
        longest = self._limits.max_prompt_tokens + self._limits.max_tokens
        allowed = MAX_COMPLETIONS * longest // request.num_prompts
        tokens = max_tokens + (num_prompt_tokens if request.echo else 0)
        listed = request.n * tokens * (1 + request.logprobs)
        if listed > allowed:
            raise BackendError(
                f"{request.n} completions of up to {tokens} tokens"
                f"{' with their prompt' if request.echo else ''}, {request.logprobs} alternatives "
                f"at each, list {listed} log-probabilities, and at most {allowed} are given for "
                f"one of {request.num_prompts} prompts; ask for fewer alternatives, completions, "
                "prompts or tokens",
                fault="bad_request",
                param="logprobs",
                code="too_many_logprobs",
            )

    def _max_tokens(
        self, request: GenerationRequest, num_prompt_tokens: int, model: ServedModel
    ) -> int:
        limits = self._limits
        if num_prompt_tokens > limits.max_prompt_tokens:
            raise _too_long(
                f"the prompt has {num_prompt_tokens} tokens, and this server takes "
                f"{limits.max_prompt_tokens}; shorten it"
            )
        left = model.context - num_prompt_tokens
        asked = request.max_tokens
        if asked is None:
            if left < 1:
                raise _too_long(
                    f"the prompt has {num_prompt_tokens} tokens, and the model's context "
                    f"{model.context}, so that no completion fits; shorten the prompt"
                )
            return min(limits.max_tokens, left)
        if asked > limits.max_tokens:
            other = "max_completion_tokens"
            field = "max_tokens" if request.body.get(other) is None else other
            raise BackendError(
                f"{field} is {asked}, and this server gives at most {limits.max_tokens}; ask "
                "for fewer",
                fault="bad_request",
                param=field,
            )
        if max(1, asked) > left:
            raise _too_long(
                f"{num_prompt_tokens} prompt tokens plus max_tokens {asked} exceed the model's "
                f"context of {model.context}; shorten one of them"
            )
        return asked


def _too_long(message: str) -> BackendError:
    return BackendError(
        message, fault="bad_request", param="prompt", code="context_length_exceeded"
    )


def _encode(model: ServedModel, request: GenerationRequest) -> tuple[int, ...]:
    """The prompt's token ids, as training would render them."""
    if request.messages is not None:
        turns = tuple(_message(place, turn) for place, turn in enumerate(request.messages))
        try:
            return model.renderer.render(Prompt(id="chat", messages=turns)).token_ids or ()
        except (DataError, TemplateError) as error:
            raise BackendError(
                f"the messages cannot be rendered: {error}", fault="bad_request", param="messages"
            ) from None
    prompt = request.prompt
    token_ids = (
        tuple(cast(list[int], model.tokenizer(prompt)["input_ids"]))
        if isinstance(prompt, str)
        else prompt
    )
    if not token_ids:
        raise BackendError(
            "the prompt is empty; give at least one token", fault="bad_request", param="prompt"
        )
    return token_ids


def _message(place: int, turn: Mapping[str, Any]) -> Message:
    where = f"messages[{place}]"
    beyond = [name for name in turn if name not in ("role", "content") and turn[name]]
    if beyond:
        raise BackendError(
            f"{where} has {beyond[0]!r}, which the embedded engine does not follow; leave it out",
            fault="bad_request",
            param=f"{where}.{beyond[0]}",
            code="unsupported_parameter",
        )
    if turn["role"] not in _ROLES:
        raise BackendError(
            f"{where} has the role {turn['role']!r}; the embedded engine knows {', '.join(_ROLES)}",
            fault="bad_request",
            param=f"{where}.role",
        )
    return Message(role=_ROLES[turn["role"]], content=turn["content"])
