"""The local sampler: requests are decoded together in this process, and finished rows make room."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from gmpo.errors import ConfigError
from gmpo.policy.head import widened
from gmpo.records import FinishReason
from gmpo.sampler.decoders import Decoder, Prefill
from gmpo.sampler.drawing import Draw, draw_tokens
from gmpo.sampler.randomness import uniforms
from gmpo.sampler.requests import Completion, SampledToken, SampleRequest, TokenAlternative

__all__ = ["LocalSampler"]

_PREFILL_TOKENS = 2048
"""Prompt tokens run in one prefill, padding included."""
_PATIENCE = 4
"""Steps that a prompt waits for others while many rows run: prefilling one takes about as long as a
step of all rows, and prefilling eight hardly longer."""
_ROWS_A_PREFILL = 8
"""So many running rows for each that may start are enough for a prefill at once."""
_STOP_TAIL_MARGIN = 8
"""Tokens decoded to look for a stop string, beyond one for each of its bytes."""
_LEAST_TEMPERATURE = 1e-4
"""Logits divided by less may overflow in fp32, which would end every running completion."""
_SCORED_AT_ONCE = 128
"""Prompt positions whose probabilities exist together, beside their logits."""


@dataclass(frozen=True, kw_only=True)
class _PromptScores:
    """Log-probability of each prompt token but the first, given those before it."""

    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[tuple[TokenAlternative, ...], ...] = ()


@dataclass
class _Row:
    """One running completion."""

    request: SampleRequest
    index: int
    uniforms: np.ndarray
    first_version: int
    prompt: _PromptScores
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampled_logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[tuple[TokenAlternative, ...]] = field(default_factory=list)


@dataclass
class _Pending:
    """A request with completions that have no row yet."""

    request: SampleRequest
    started: int = 0
    prefill: Prefill | None = None
    scores: _PromptScores = _PromptScores()


class LocalSampler:
    """`Sampler` over one decoder; at most `max_rows` completions run at once, the rest wait.

    Args:
        decoder: the engine.
        context_length: longest prompt plus completion the model takes, in tokens.
        max_rows: completions decoded together.
        decode: token ids to text; needed for stop strings only.
        special_tokens: ids of the tokens that `decode` leaves out, by their own text. A stop string
            that is such a text stops at the token.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        context_length: int,
        max_rows: int,
        decode: Callable[[Sequence[int]], str] | None = None,
        special_tokens: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self._decoder = decoder
        self.context_length = context_length
        self._max_rows = max_rows
        self._decode = decode
        self._special_tokens = special_tokens
        self._version = 0
        self._queue: deque[_Pending] = deque()
        self._rows: list[_Row] = []
        self._is_double = False
        self._steps_waited = 0
        self._cancelled: set[str] = set()

    @property
    def is_idle(self) -> bool:
        """Whether no request is queued or running."""
        return not self._queue and not self._rows

    @property
    def version(self) -> int:
        """Version of the weights that are sampled from; 0 until some were loaded."""
        return self._version

    def submit(self, request: SampleRequest) -> None:
        """Queue a request.

        Raises:
            ConfigError: the request is not allowed; the value and the limit are named.
        """
        problem = self._problem_with(request)
        if problem:
            raise ConfigError(f"request {request.id!r}: {problem}")
        special = self._special_tokens
        stops = [special[stop] for stop in request.stop_strings if stop in special]
        request = replace(request, stop_ids=(*request.stop_ids, *stops))
        self._queue.append(_Pending(request=request))

    def cancel(self, request_id: str) -> None:
        """End a request at the next step; what it has so far comes back as "cancelled"."""
        if request_id in self._ids_in_flight():
            self._cancelled.add(request_id)

    def forget(self) -> None:
        """Drop every request, unanswered: what is left to do where submitting or a step raised."""
        self._queue.clear()
        self._cancelled.clear()
        self._rows.clear()
        self._decoder.clear()  # all rows that it has: what raised may have come between the two

    def load_weights(self, version: int, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Sample from these weights from now on; no completion may be running.

        Requests that wait, wholly or with completions still to be drawn, are drawn from the new
        weights, their prompts run anew; each completion has the version it was drawn from.

        Raises:
            ConfigError: completions are still running.
        """
        if self._rows:
            raise ConfigError(
                f"{len(self._rows)} completions are running; let them finish before new weights"
            )
        for pending in self._queue:
            pending.prefill = None
        self._decoder.load_weights(named_tensors)
        self._version = version

    def step(self) -> list[SampledToken | Completion]:
        """Draw one token of every running completion; finished ones are returned and make room."""
        events: list[SampledToken | Completion] = list(self._drop_cancelled())
        if self._rows:
            last = [row.token_ids[-1] for row in self._rows]
            running = [self._decoder.advance(torch.tensor(last, device=self._decoder.device))]
        else:
            running = []
        logits = running + self._admit()
        if not self._rows:
            return events
        self._draw_and_record(logits[0] if len(logits) == 1 else torch.cat(logits), events)
        finished = {
            place: reason for place, row in enumerate(self._rows) if (reason := self._ends(row))
        }
        events += [self._finish(self._rows[place], reason) for place, reason in finished.items()]
        self._drop(list(finished))
        return events

    def _problem_with(self, request: SampleRequest) -> str | None:
        length, known = len(request.token_ids), self._decoder.vocabulary_size
        special = self._special_tokens
        unknown = [token for token in request.token_ids if not 0 <= token < known]
        checks = (
            (request.id in self._ids_in_flight(), "its id is already in flight; use another"),
            (length == 0, "its prompt is empty; give at least one token"),
            (
                bool(unknown),
                f"prompt token ids {unknown[:3]} are none of the model's, 0 to {known - 1}; "
                "tokenize with the model's own tokenizer",
            ),
            (
                length + request.max_tokens > self.context_length,
                f"{length} prompt tokens plus max_tokens {request.max_tokens} exceed the model's "
                f"context of {self.context_length}; shorten one of them",
            ),
            (
                request.max_tokens < 1 or request.num_completions < 1,
                f"max_tokens {request.max_tokens} and num_completions {request.num_completions} "
                "must be at least 1",
            ),
            (
                request.first_index < 0 or request.first_position < 0,
                f"first_index {request.first_index} and first_position {request.first_position} "
                "must be 0 or more",
            ),
            (
                not (request.temperature == 0 or request.temperature >= _LEAST_TEMPERATURE),
                f"temperature {request.temperature} must be 0, which is greedy, or at least "
                f"{_LEAST_TEMPERATURE}",
            ),
            (not 0 < request.top_p <= 1, f"top_p {request.top_p} must lie in (0, 1]"),
            (request.top_k < 0, f"top_k {request.top_k} must be 0 (off) or more"),
            (
                not 0 <= request.top_logprobs <= known,
                f"top_logprobs {request.top_logprobs} must be 0 to {known}, the vocabulary",
            ),
            ("" in request.stop_strings, "a stop string is empty; every text contains it"),
            (
                any(token in stop != token for token in special for stop in request.stop_strings),
                "a stop string holds a special token and more, which no text does; make the token "
                "a stop string by itself",
            ),
            (bool(request.media), "media are given, and this sampler takes text only"),
            (
                bool(request.stop_strings) and self._decode is None,
                "stop strings need a sampler with a tokenizer's decode",
            ),
        )
        return next((message for is_wrong, message in checks if is_wrong), None)

    def _ids_in_flight(self) -> set[str]:
        return {p.request.id for p in self._queue} | {row.request.id for row in self._rows}

    def _drop_cancelled(self) -> list[Completion]:
        """End cancelled requests' rows; what of them never started comes back empty."""
        if not self._cancelled:
            return []
        cancelled, self._cancelled = self._cancelled, set()
        waiting = [pending for pending in self._queue if pending.request.id in cancelled]
        self._queue = deque(p for p in self._queue if p.request.id not in cancelled)
        ended = [place for place, row in enumerate(self._rows) if row.request.id in cancelled]
        completions = [self._finish(self._rows[place], "cancelled") for place in ended]
        self._drop(ended)
        return completions + [
            self._never_started(pending.request, pending.request.first_index + index)
            for pending in waiting
            for index in range(pending.started, pending.request.num_completions)
        ]

    def _admit(self) -> list[Tensor]:
        """Start waiting completions on free rows, in the order the requests came; their logits."""
        new_logits: list[Tensor] = []
        if self._should_wait():
            self._steps_waited += 1
            return new_logits
        self._steps_waited = 0
        while self._queue and len(self._rows) < self._max_rows:
            if self._queue[0].prefill is None:
                self._prefill_next()
            pending = self._queue[0]
            assert pending.prefill is not None
            request = pending.request
            free = self._max_rows - len(self._rows)
            count = min(free, request.num_completions - pending.started)
            first = request.first_index + pending.started
            numbers = range(first, first + count)
            rows = [self._new_row(request, number, pending.scores) for number in numbers]
            self._decoder.add_rows(pending.prefill, count)
            self._rows += rows
            new_logits.append(pending.prefill.logits[-1:].expand(count, -1))
            pending.started += count
            if pending.started == request.num_completions:
                self._queue.popleft()
        return new_logits

    def _should_wait(self) -> bool:
        """Whether a prefill now would be for few rows beside those that it would hold up."""
        if not self._queue or self._queue[0].prefill is not None:
            return False  # nothing has to be prefilled
        waiting = sum(p.request.num_completions - p.started for p in self._queue)
        starting = min(waiting, self._max_rows - len(self._rows))
        is_few = starting * _ROWS_A_PREFILL < len(self._rows)
        return is_few and self._steps_waited < _PATIENCE

    def _prefill_next(self) -> None:
        """Run the first waiting prompts together, up to the token budget and the free rows."""
        chosen: list[_Pending] = []
        width = rows = 0
        wants_all = self._queue[0].request.prompt_logprobs
        for pending in self._queue:
            request = pending.request
            width = max(width, len(request.token_ids))
            over_budget = width * (len(chosen) + 1) > _PREFILL_TOKENS
            if chosen and (over_budget or rows >= self._max_rows - len(self._rows)):
                break
            if request.prompt_logprobs != wants_all:
                break
            chosen.append(pending)
            rows += request.num_completions
        prompts = [pending.request.token_ids for pending in chosen]
        prefills = self._decoder.prefill(prompts, all_logits=wants_all)
        for pending, prefill in zip(chosen, prefills, strict=True):
            pending.scores = _prompt_scores(pending.request, prefill)
            # A copy: a view would keep the logits of the whole prompt.
            last = prefill.logits[-1:].clone() if wants_all else prefill.logits
            pending.prefill = Prefill(logits=last, state=prefill.state)

    def _new_row(self, request: SampleRequest, index: int, scores: _PromptScores) -> _Row:
        start = request.first_position
        stream = uniforms((*request.key, index), count=start + request.max_tokens)
        return _Row(
            request=request,
            index=index,
            uniforms=stream[start:],
            first_version=self._version,
            prompt=scores,
        )

    def _draw(self, logits: Tensor) -> Draw:
        device = logits.device
        self._is_double = logits.dtype == torch.float64
        # MPS has no fp64.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        numbers = [row.uniforms[len(row.token_ids)] for row in self._rows]
        requests = [row.request for row in self._rows]
        return draw_tokens(
            logits,
            uniforms=_without_waiting(torch.tensor(numbers, dtype=dtype), device),
            # On the CPU: what they decide is read there without waiting for the device.
            temperature=torch.tensor([r.temperature for r in requests], dtype=dtype),
            top_p=torch.tensor([r.top_p for r in requests], dtype=dtype),
            top_k=torch.tensor([r.top_k for r in requests]),
        )

    def _draw_and_record(self, logits: Tensor, events: list[SampledToken | Completion]) -> None:
        draw = self._draw(logits)
        token_ids, logprobs = draw.token_ids.tolist(), draw.logprobs.tolist()
        sampled_logprobs = draw.sampled_logprobs.tolist()
        for place, row in enumerate(self._rows):
            row.token_ids.append(token_ids[place])
            row.logprobs.append(logprobs[place])
            row.sampled_logprobs.append(sampled_logprobs[place])
            if row.request.top_logprobs:
                wide = widened(logits[place]).log_softmax(dim=-1)
                row.top_logprobs.append(_alternatives(wide, row.request.top_logprobs))
            if row.request.stream:
                events.append(
                    SampledToken(
                        request_id=row.request.id,
                        index=row.index,
                        position=len(row.token_ids) - 1,
                        token_id=token_ids[place],
                        logprob=logprobs[place],
                        alternatives=row.top_logprobs[-1] if row.top_logprobs else (),
                    )
                )

    def _ends(self, row: _Row) -> FinishReason | None:
        request = row.request
        if row.token_ids[-1] in request.stop_ids:
            return "stop"
        if request.stop_strings:
            assert self._decode is not None
            longest = max(len(stop.encode()) for stop in request.stop_strings)
            tail = self._decode(row.token_ids[-longest - _STOP_TAIL_MARGIN :])
            if any(stop in tail for stop in request.stop_strings):
                return "stop"
        return "length" if len(row.token_ids) == request.max_tokens else None

    def _finish(self, row: _Row, reason: FinishReason) -> Completion:
        dtype = np.float64 if self._is_double else np.float32
        return Completion(
            request_id=row.request.id,
            index=row.index,
            token_ids=np.array(row.token_ids, dtype=np.int64),
            logprobs=np.array(row.logprobs, dtype=dtype),
            sampled_logprobs=np.array(row.sampled_logprobs, dtype=dtype),
            finish_reason=reason,
            first_version=row.first_version,
            last_version=self._version,
            top_logprobs=tuple(row.top_logprobs),
            prompt_logprobs=row.prompt.logprobs,
            prompt_top_logprobs=row.prompt.top_logprobs,
        )

    def _never_started(self, request: SampleRequest, index: int) -> Completion:
        nothing = np.zeros(0, dtype=np.float64 if self._is_double else np.float32)
        return Completion(
            request_id=request.id,
            index=index,
            token_ids=np.zeros(0, dtype=np.int64),
            logprobs=nothing,
            sampled_logprobs=nothing,
            finish_reason="cancelled",
            first_version=self._version,
            last_version=self._version,
        )

    def _drop(self, places: list[int]) -> None:
        """Free these rows; the others follow the decoder's new order."""
        if places:
            order = self._decoder.drop(places)
            self._rows = [self._rows[place] for place in order]


def _without_waiting(values: Tensor, device: torch.device) -> Tensor:
    """The values on the device.

    A GPU copies pinned memory in its turn; for other memory the host waits until all that was begun
    is done, and could not start the drawing while the step's forward pass runs.
    """
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def _prompt_scores(request: SampleRequest, prefill: Prefill) -> _PromptScores:
    if not request.prompt_logprobs:
        return _PromptScores()
    token_ids = torch.tensor(list(request.token_ids)[1:], device=prefill.logits.device)
    logprobs: list[float] = []
    top_logprobs: list[tuple[TokenAlternative, ...]] = []
    for first in range(0, len(token_ids), _SCORED_AT_ONCE):
        targets = token_ids[first : first + _SCORED_AT_ONCE]
        some = prefill.logits[first : first + len(targets)].log_softmax(dim=-1)
        logprobs += some.gather(-1, targets[:, None])[:, 0].tolist()
        if request.top_logprobs:
            top_logprobs += [_alternatives(of_one, request.top_logprobs) for of_one in some]
    return _PromptScores(logprobs=tuple(logprobs), top_logprobs=tuple(top_logprobs))


def _alternatives(logprobs: Tensor, count: int) -> tuple[TokenAlternative, ...]:
    top = logprobs.topk(count)
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return tuple(TokenAlternative(token_id=token, logprob=logprob) for token, logprob in pairs)
