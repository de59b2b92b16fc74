"""A request's tokens, as the sampler draws them, turned into chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from gmpo.sampler.requests import Completion, SampledToken, TokenAlternative
from gmpo.serving.backend import Chunk, GenerationRequest, TokenLogprob, Usage
from gmpo.serving.sampling_thread import SamplerEvent
from gmpo.serving.text import TextStream

__all__ = ["EngineAnswer", "TokenTexts"]


@dataclass(frozen=True, kw_only=True)
class TokenTexts:
    """Texts of tokens.

    Attributes:
        of_completion: of many together, without end tokens.
        of_prompt: of many together, with all.
        of_token: of one.
    """

    of_completion: Callable[[Sequence[int]], str]
    of_prompt: Callable[[Sequence[int]], str]
    of_token: Callable[[int], str]


@dataclass
class _Choice:
    """What was said of one completion so far."""

    text: TextStream
    num_tokens: int = 0
    has_begun: bool = False


class EngineAnswer:
    """Chunks of one request, all by one version.

    Args:
        request: what was asked.
        prompt_ids: its prompt, as the model reads it.
        texts: of the model's tokens.
        version: of the weights.
    """

    def __init__(
        self,
        request: GenerationRequest,
        *,
        prompt_ids: tuple[int, ...],
        texts: TokenTexts,
        version: str,
    ) -> None:
        self._request = request
        self._prompt_ids = prompt_ids
        self._texts = texts
        self._version = version
        self._choices = [
            _Choice(TextStream(texts.of_completion, stop=request.stop)) for _ in range(request.n)
        ]
        self._num_open = request.n
        self._num_tokens = 0

    @property
    def is_finished(self) -> bool:
        """Whether every choice has ended."""
        return not self._num_open

    def chunks_of(self, events: Sequence[SamplerEvent]) -> Iterator[Chunk]:
        """At most an echo and one more chunk a choice."""
        by_index: dict[int, list[SamplerEvent]] = {}
        for event in events:
            by_index.setdefault(event.index, []).append(event)
        for index, of_one in by_index.items():
            last = of_one[-1]
            ended = last if isinstance(last, Completion) else None
            if self._request.echo and not self._choices[index].has_begun:
                yield self._echo(index, ended)
            self._choices[index].has_begun = True
            yield self._chunk(index, of_one, ended)

    def _echo(self, index: int, ended: Completion | None) -> Chunk:
        prompt = self._request.prompt
        logprobs: tuple[TokenLogprob, ...] = ()
        if self._request.logprobs is not None:
            assert ended is not None, "scored prompts are not streamed"
            values = (None, *ended.prompt_logprobs)
            tops = ended.prompt_top_logprobs or ((),) * len(ended.prompt_logprobs)
            logprobs = tuple(
                self._logprob(token_id, value, top)
                for token_id, value, top in zip(self._prompt_ids, values, ((), *tops), strict=True)
            )
        return Chunk(
            index=index,
            text=prompt if isinstance(prompt, str) else self._texts.of_prompt(self._prompt_ids),
            token_ids=self._prompt_ids,
            logprobs=logprobs,
            is_echo=True,
            model_version=self._version,
        )

    def _chunk(self, index: int, events: Sequence[SamplerEvent], ended: Completion | None) -> Chunk:
        choice = self._choices[index]
        tokens = tuple(self._new_tokens(choice, events))
        ids = tuple(token.token_id for token in tokens if token.token_id is not None)
        text = choice.text.add(ids)
        choice.num_tokens += len(ids)
        self._num_tokens += len(ids)
        if ended is not None:
            text += choice.text.finish()
            self._num_open -= 1
        return Chunk(
            index=index,
            text=text,
            token_ids=ids,
            logprobs=tokens,
            finish_reason=None if ended is None else self._finish_reason(choice, ended),
            usage=self._usage() if self.is_finished else None,
            model_version=self._version,
        )

    def _new_tokens(
        self, choice: _Choice, events: Sequence[SamplerEvent]
    ) -> Iterator[TokenLogprob]:
        """Streamed ones one by one; what was not streamed with the completion."""
        if self._request.max_tokens == 0:
            return  # the one that was drawn is no part of the answer
        known = choice.num_tokens
        for event in events:
            if isinstance(event, SampledToken):
                known += 1
                yield self._logprob(event.token_id, event.logprob, event.alternatives)
                continue
            ids, values = event.token_ids.tolist()[known:], event.logprobs.tolist()[known:]
            tops = event.top_logprobs[known:] or ((),) * len(ids)
            for token_id, value, top in zip(ids, values, tops, strict=True):
                yield self._logprob(token_id, value, top)

    def _logprob(
        self, token_id: int, logprob: float | None, top: Sequence[TokenAlternative]
    ) -> TokenLogprob:
        text = self._texts.of_token
        alternatives = tuple(
            TokenLogprob(
                token=text(one.token_id),
                # Both are the same number but for rounding, and clients compare them exactly.
                logprob=logprob if one.token_id == token_id else one.logprob,
                token_id=one.token_id,
            )
            for one in top
        )
        return TokenLogprob(
            token=text(token_id), logprob=logprob, token_id=token_id, top=alternatives
        )

    def _finish_reason(self, choice: _Choice, ended: Completion) -> str:
        if self._request.max_tokens == 0:
            return "length"
        return "stop" if choice.text.is_stopped else ended.finish_reason

    def _usage(self) -> Usage:
        return Usage(prompt_tokens=len(self._prompt_ids), completion_tokens=self._num_tokens)
