"""Rollouts by a function of the user's: tools, several turns, another engine.

    def rollout(prompts, context):
        ...
        return [[RolloutResult(...) for each of the G rollouts] for each prompt]

Tokens that the policy sampled are marked `from_policy` and are trained on; tokens that a tool or
an environment put in stay in the completion, are seen by the policy, and get no gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, cast, get_args

import numpy as np
from transformers import PreTrainedTokenizerBase

from gmpo.errors import DataError, GmpoError, what_was_raised
from gmpo.records import FinishReason, Group, Prompt, Rollout
from gmpo.rollouts import SamplingSettings, decode_text, prompt_keys
from gmpo.sampler.requests import Completion, Sampler, SampleRequest, complete

__all__ = [
    "Continuation",
    "FunctionRollouts",
    "RolloutContext",
    "RolloutDraft",
    "RolloutFunction",
    "RolloutResult",
]

_ROUNDING = 1e-6
"""How far above 0 a log-probability may lie, in nats: the rounding of a log-softmax."""


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """What to draw next for one rollout.

    Attributes:
        prompt: place of its prompt among those of the call.
        index: its number among the prompt's rollouts, from 0.
        completion_ids: its completion so far, what tools put in included.
        max_tokens: most tokens to draw; None takes the settings' limit.
        stop_strings: texts that end the drawing, beside the end tokens; None takes the settings'.
        attempt: another number draws other tokens at the same place.
    """

    prompt: int
    index: int
    completion_ids: Sequence[int] = ()
    max_tokens: int | None = None
    stop_strings: tuple[str, ...] | None = None
    attempt: int = 0


@dataclass(frozen=True, kw_only=True)
class RolloutResult:
    """One finished rollout, as a rollout function returns it.

    Attributes:
        token_ids: the whole completion.
        from_policy: for each token, whether the policy sampled it.
        logprobs: for each token, the log-probability in nats of the distribution that it was
            sampled from; anything where the policy did not sample it.
        finish_reason: "length" where a limit cut it.
        text: what reward functions read; None decodes all tokens.
        error: why it failed; it is then counted and not trained on, and may be empty.
    """

    token_ids: Sequence[int]
    from_policy: Sequence[bool]
    logprobs: Sequence[float]
    finish_reason: FinishReason = "stop"
    text: str | None = None
    error: str | None = None


@dataclass(kw_only=True)
class RolloutDraft:
    """A rollout in the making: sampled and given tokens in the order they came."""

    token_ids: list[int] = field(default_factory=list)
    from_policy: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason = "stop"

    def add_sampled(self, completion: Completion) -> None:
        """Tokens that the policy drew."""
        self.token_ids += completion.token_ids.tolist()
        self.from_policy += [True] * len(completion.token_ids)
        self.logprobs += completion.sampled_logprobs.tolist()
        self.finish_reason = completion.finish_reason

    def add_given(self, token_ids: Sequence[int]) -> None:
        """Tokens that a tool or an environment puts in."""
        self.token_ids += token_ids
        self.from_policy += [False] * len(token_ids)
        self.logprobs += [0.0] * len(token_ids)

    def result(self, *, text: str | None = None, error: str | None = None) -> RolloutResult:
        """The rollout as it stands."""
        return RolloutResult(
            token_ids=self.token_ids,
            from_policy=self.from_policy,
            logprobs=self.logprobs,
            finish_reason=self.finish_reason,
            text=text,
            error=error,
        )


class RolloutFunction(Protocol):
    """For each prompt its G rollouts, G being `context.settings.num_completions`."""

    def __call__(
        self, prompts: Sequence[Prompt], context: RolloutContext
    ) -> Sequence[Sequence[RolloutResult]]:
        """The rollouts, in the order of the prompts and of their indices."""


class RolloutContext:
    """What a rollout function works with, for the time of one call.

    Attributes:
        settings: how completions are drawn: number, limit, temperature, end tokens.
        tokenizer: the policy's.
        max_length: most tokens of a prompt with its whole completion.
    """

    def __init__(
        self,
        sampler: Sampler,
        prompts: Sequence[Prompt],
        *,
        tokenizer: PreTrainedTokenizerBase,
        settings: SamplingSettings,
        max_length: int,
        key: tuple[int | str, ...],
    ) -> None:
        self.settings = settings
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.dtype: type[np.floating] = np.float32
        self._sampler = sampler
        self._prompts = prompts
        self._keys = list(prompt_keys(prompts, key))

    def generate(self, wanted: Sequence[Continuation]) -> list[Completion]:
        """What the policy draws next for each, in their order.

        The token at position t of rollout i of a prompt always uses the same random number,
        whatever is asked for together and in how many calls.

        Raises:
            DataError: a prompt or index does not exist.
            ConfigError: the sampler refuses a request, for example because of its length.
        """
        requests: list[SampleRequest] = []
        for place, continuation in enumerate(wanted):
            request = self._request(str(place), continuation)
            if requests and _follows(requests[-1], request):
                more = requests[-1].num_completions + 1
                requests[-1] = replace(requests[-1], num_completions=more)
            else:
                requests.append(request)
        finished = complete(self._sampler, requests)
        completions = [completion for request in requests for completion in finished[request.id]]
        if any(completion.sampled_logprobs.dtype == np.float64 for completion in completions):
            self.dtype = np.float64
        return completions

    def encode(self, text: str) -> list[int]:
        """Token ids of a text that a tool puts in, without special tokens."""
        return cast(list[int], self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        return decode_text(self.tokenizer, token_ids)

    def _request(self, name: str, continuation: Continuation) -> SampleRequest:
        number, index = continuation.prompt, continuation.index
        settings = self.settings
        if not 0 <= number < len(self._prompts) or not 0 <= index < settings.num_completions:
            raise DataError(
                f"a continuation is for prompt {number}, rollout {index}; there are "
                f"{len(self._prompts)} prompts with {settings.num_completions} rollouts each, "
                "counted from 0"
            )
        attempt = ("attempt", continuation.attempt) if continuation.attempt else ()
        limit, stops = continuation.max_tokens, continuation.stop_strings
        return SampleRequest(
            id=name,
            token_ids=(*(self._prompts[number].token_ids or ()), *continuation.completion_ids),
            max_tokens=settings.max_tokens if limit is None else limit,
            temperature=settings.temperature,
            stop_ids=settings.stop_ids,
            stop_strings=settings.stop_strings if stops is None else stops,
            key=(*self._keys[number], *attempt),
            first_index=index,
            first_position=len(continuation.completion_ids),
        )


@dataclass(frozen=True, kw_only=True)
class FunctionRollouts:
    """Groups made by a rollout function, checked; called like `sample_groups` bound to a sampler.

    Attributes:
        function: the user's.
        sampler: idle; it keeps its weights for a whole call.
        tokenizer: the policy's.
        max_length: most tokens of a prompt with its whole completion.
        vocabulary_size: token ids lie below it.
    """

    function: RolloutFunction
    sampler: Sampler
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    vocabulary_size: int

    def __call__(
        self, prompts: Sequence[Prompt], *, settings: SamplingSettings, key: tuple[int | str, ...]
    ) -> list[Group]:
        """One group a prompt, in the prompts' order.

        Raises:
            DataError: the function raised, or returned what cannot be trained on; prompt, rollout
                and value are named.
        """
        context = RolloutContext(
            self.sampler,
            prompts,
            tokenizer=self.tokenizer,
            settings=settings,
            max_length=self.max_length,
            key=key,
        )
        try:
            returned = self.function(prompts, context)
        except GmpoError:
            raise
        except (Exception, SystemExit) as error:
            raise DataError(
                f"the rollout function raised {what_was_raised(error)}, called with "
                f"{len(prompts)} prompts, {prompts[0].id!r} to {prompts[-1].id!r}; catch what "
                "concerns one rollout and return it with error='...'"
            ) from error
        _require_count(returned, len(prompts), "a list of rollouts for each of the prompts")
        return [
            self._group(prompt, results, context)
            for prompt, results in zip(prompts, returned, strict=True)
        ]

    def _group(
        self, prompt: Prompt, results: Sequence[RolloutResult], context: RolloutContext
    ) -> Group:
        wanted = f"the rollouts of prompt {prompt.id!r}"
        _require_count(results, context.settings.num_completions, wanted)
        return Group(
            prompt=prompt,
            rollouts=tuple(
                self._rollout(prompt, index, result, context)
                for index, result in enumerate(results)
            ),
        )

    def _rollout(
        self, prompt: Prompt, index: int, result: RolloutResult, context: RolloutContext
    ) -> Rollout:
        try:
            token_ids, from_policy, logprobs = _arrays(result, context.dtype)
            for problem in self._problems(prompt, result, token_ids, from_policy, logprobs):
                raise DataError(problem)
        except DataError as error:
            raise DataError(
                f"the rollout function's prompt {prompt.id!r}, rollout {index}: {error}"
            ) from None
        version = self.sampler.version
        return Rollout(
            prompt_id=prompt.id,
            index=index,
            token_ids=token_ids,
            from_policy=from_policy,
            sampler_logprobs=np.where(from_policy, logprobs, 0),
            text=context.decode(token_ids.tolist()) if result.text is None else result.text,
            finish_reason=result.finish_reason,
            first_version=version,
            last_version=version,
            error=result.error,
        )

    def _problems(
        self,
        prompt: Prompt,
        result: RolloutResult,
        token_ids: np.ndarray,
        from_policy: np.ndarray,
        logprobs: np.ndarray,
    ) -> Iterator[str]:
        """What makes the rollout unusable."""
        outside = token_ids[(token_ids < 0) | (token_ids >= self.vocabulary_size)]
        if len(outside):
            yield (
                f"token id {outside[0]} is not one of the policy's, 0 to {self.vocabulary_size - 1}"
            )
        sampled = logprobs[from_policy]
        wrong = sampled[~(np.isfinite(sampled) & (sampled <= _ROUNDING))]
        if len(wrong):
            yield (
                f"the log-probability of a sampled token is {wrong[0]}; it must be finite and not "
                "above 0, as `generate` reports it"
            )
        if not from_policy.any() and result.error is None:
            yield (
                "no token is the policy's, so there is nothing to train on; return it with "
                "error='...'"
            )
        length = len(prompt.token_ids or ()) + len(token_ids)
        if length > self.max_length:
            yield (
                f"prompt and completion have {length} tokens, more than sampling.max_length = "
                f"{self.max_length}; end it earlier, with finish_reason 'length'"
            )
        for name in ("text", "error"):
            value = vars(result)[name]
            if value is not None and not isinstance(value, str):
                yield f"{name} is {value!r}; it must be a text or None"
        reasons = get_args(FinishReason)
        if result.finish_reason not in reasons:
            yield f"finish_reason is {result.finish_reason!r}; it must be one of {reasons}"


def _follows(first: SampleRequest, second: SampleRequest) -> bool:
    """Whether the second asks for the next completion of the very same: one prefill serves both."""
    same = replace(
        second,
        id=first.id,
        first_index=first.first_index,
        num_completions=first.num_completions,
    )
    return same == first and second.first_index == first.first_index + first.num_completions


def _require_count(returned: object, count: int, what: str) -> None:
    if not isinstance(returned, Sequence) or len(returned) != count:
        found = len(returned) if isinstance(returned, Sequence) else type(returned).__name__
        raise DataError(f"the rollout function returned {found} for {what}; it must be {count}")


def _arrays(
    result: RolloutResult, dtype: type[np.floating]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids, marks and log-probabilities as arrays of one length and of the right types."""
    if not isinstance(result, RolloutResult):
        raise DataError(f"it is {type(result).__name__}; it must be a RolloutResult")
    ids, marks, logprobs = map(np.asarray, (result.token_ids, result.from_policy, result.logprobs))
    if not ids.shape == marks.shape == logprobs.shape or ids.ndim != 1:
        raise DataError(
            f"it has {ids.shape} token ids, {marks.shape} marks from_policy and "
            f"{logprobs.shape} log-probabilities; give one of each a token"
        )
    if len(ids) and (ids.dtype.kind not in "iu" or marks.dtype.kind != "b"):
        raise DataError(
            f"token ids are {ids.dtype} and from_policy {marks.dtype}; they must be integers and "
            "bool"
        )
    if logprobs.dtype.kind not in "fiu":
        raise DataError(f"log-probabilities are {logprobs.dtype}; they must be numbers")
    return ids.astype(np.int64), marks.astype(np.bool_), logprobs.astype(dtype)
