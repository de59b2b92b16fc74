"""Engines under the local sampler: next-token logits of many running sequences, one token a call.

`LlamaDecoder` keeps keys and values in one preallocated cache of its own; `TransformersDecoder`
lets any causal model keep its own cache, equally long rows at a time. Both prefill a prompt once
for all its completions.

Dimensions: **R** running rows, **V** vocabulary, **L** prompt tokens.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from gmpo.policy.head import widened
from gmpo.policy.llama import LlamaBody
from gmpo.policy.prefix import Beginning, extend, padded, run_prompts
from gmpo.policy.weights import copy_weights
from gmpo.sampler.attention import attention_of_step
from gmpo.sampler.cache import PromptState, SharedCache, power_of_two
from gmpo.sampler.forward import step_logits
from gmpo.sampler.graphed import Capture, FixedSteps
from gmpo.sampler.prefilling import prepared_layer_run
from gmpo.sampler.prepared import PreparedBody, order_of, prepare_body, unprepared_body

__all__ = ["ENOUGH_ROWS", "Decoder", "LlamaDecoder", "Prefill", "TransformersDecoder"]

ENOUGH_ROWS = 16
"""Rows running at once from which reordered weights earn the time it takes to reorder them: on two
cores about 90 ms in bf16, for 15 ms a step of 64 rows."""
_ENOUGH_STEPS = 6
"""Steps of fewer rows after which weights are reordered too: what those took longer then makes up
for it, so that a short answer never costs much more than it must, and a long one neither."""


@dataclass(frozen=True, kw_only=True)
class Prefill:
    """One prompt after its forward pass: logits at every position and what its rows start from."""

    logits: Float[Tensor, "L V"]
    state: Any


@runtime_checkable
class Decoder(Protocol):
    """Running rows in an order of the decoder's; new rows join at the end."""

    @property
    def device(self) -> torch.device:
        """Where token ids are expected and logits come from."""

    @property
    def vocabulary_size(self) -> int:
        """Token ids lie below it."""

    def prefill(self, prompts: Sequence[Sequence[int]], *, all_logits: bool) -> list[Prefill]:
        """Run prompts; `logits` hold the last position only, or all of them."""

    def add_rows(self, prefill: Prefill, num_rows: int) -> None:
        """Let `num_rows` new rows continue a prompt."""

    def advance(self, token_ids: Int[Tensor, " R"]) -> Float[Tensor, "R V"]:
        """Append one token to every row; logits of the next one, in the model's precision.

        They hold until the next call, which may write its own in their place.
        """

    def drop(self, rows: Sequence[int]) -> list[int]:
        """Forget these rows; the remaining ones' old places, in their new order."""

    def clear(self) -> None:
        """Forget every row, whatever was interrupted while rows were added or dropped."""

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Use these weights for rows that start from now on; no row may be running."""


def _num_embeddings(model: PreTrainedModel) -> int:
    """Token ids that a model knows."""
    embedding: Any = model.get_input_embeddings()
    return len(embedding.weight)


class TransformersDecoder:
    """Any causal model of `transformers`, by its own forward and its own cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._blocks: list[tuple[DynamicCache, int]] = []

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        device: torch.device = self.model.device
        return device

    @property
    def vocabulary_size(self) -> int:
        """Rows of the embedding."""
        return _num_embeddings(self.model)

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]], *, all_logits: bool) -> list[Prefill]:
        """Run prompts one by one."""
        results = []
        for prompt in prompts:
            token_ids = torch.tensor([list(prompt)], device=self.model.device)
            output = self.model(token_ids, use_cache=True, logits_to_keep=0 if all_logits else 1)
            results.append(Prefill(logits=widened(output.logits[0]), state=output.past_key_values))
        return results

    def add_rows(self, prefill: Prefill, num_rows: int) -> None:
        """Rows of one prompt form a block, or join the last one if that is equally long.

        A block has a cache of its own, so nothing is padded.
        """
        cache = copy.deepcopy(prefill.state)
        cache.batch_repeat_interleave(num_rows)
        if self._blocks and _can_join(self._blocks[-1][0], cache):
            last, count = self._blocks.pop()
            cache, num_rows = _joined(last, cache), count + num_rows
        self._blocks.append((cache, num_rows))

    @torch.no_grad()
    def advance(self, token_ids: Int[Tensor, " R"]) -> Float[Tensor, "R V"]:
        """One forward a block."""
        logits = []
        start = 0
        for cache, count in self._blocks:
            block_ids = token_ids[start : start + count, None]
            output = self.model(block_ids, past_key_values=cache, use_cache=True)
            logits.append(output.logits[:, -1])
            start += count
        return torch.cat(logits)

    def drop(self, rows: Sequence[int]) -> list[int]:
        """Forget rows inside their blocks; the others stay in order."""
        kept, order, start = [], [], 0
        for cache, count in self._blocks:
            local = [row for row in range(count) if start + row not in rows]
            order += [start + row for row in local]
            start += count
            if not local:
                continue
            if len(local) < count:
                cache.batch_select_indices(torch.tensor(local, device=self.model.device))
            kept.append((cache, len(local)))
        self._blocks = kept
        return order

    def clear(self) -> None:
        """Forget every block."""
        self._blocks = []

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy weights into the module, where they are not the module's own already."""
        assert not self._blocks, "weights must not change under running rows"
        copy_weights(dict(self.model.named_parameters()), named_tensors)


def _can_join(left: DynamicCache, right: DynamicCache) -> bool:
    """Whether two blocks' rows can share a forward: equally many positions, keys and values only.

    Layers with a state of another kind (sliding windows, convolutions) stay apart.
    """
    plain = all(type(layer) is DynamicLayer for layer in (*left.layers, *right.layers))
    return plain and left.get_seq_length() == right.get_seq_length()


def _joined(left: DynamicCache, right: DynamicCache) -> DynamicCache:
    """The left cache with the right one's rows behind its own."""
    for own, other in zip(left.layers, right.layers, strict=True):
        assert isinstance(own, DynamicLayer) and isinstance(other, DynamicLayer)
        own.keys = _stacked(own.keys, other.keys)
        own.values = _stacked(own.values, other.values)
    return left


def _stacked(above: Tensor | None, below: Tensor | None) -> Tensor:
    """Keys or values of two layers that have seen a prompt."""
    assert above is not None and below is not None
    return torch.cat((above, below))


class LlamaDecoder:
    """A Llama-family model over a cache that keeps each prompt once and each row's own tokens.

    Weights may change whenever no row runs, so what was prepared of them lasts only until then.

    Args:
        body: the model.
        max_rows: rows held at once.
        capture: makes steps repeatable, as CUDA graphs do; None takes each step anew.
    """

    def __init__(self, body: LlamaBody, *, max_rows: int, capture: Capture | None = None) -> None:
        self.body = body
        self._plain = unprepared_body(body)
        self._prepared: PreparedBody | None = None
        self._unprepared_steps = 0
        self._beginning: Beginning | None = None
        self._fixed = None if capture is None else FixedSteps(body, self._plain, capture=capture)
        self._cache = SharedCache(
            max_rows=max_rows if capture is None else power_of_two(max_rows),
            num_layers=len(body.layers),
            num_key_heads=body.num_key_heads,
            head_dim=body.head_dim,
            device=body.model.device,
            doubles=capture is not None,
        )

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self._cache.device

    @property
    def vocabulary_size(self) -> int:
        """Rows of the embedding."""
        return _num_embeddings(self.body.model)

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]], *, all_logits: bool) -> list[Prefill]:
        """Run prompts together; their common beginning once, unless all logits are wanted.

        What running rows' prompts began with is not run again.
        """
        prompt_ids, lengths = padded(prompts, device=self.device)
        # While rows run, their reordered weights are there and serve new prompts too.
        run = prepared_layer_run(self.body, self._prepared) if self._prepared else None
        if all_logits:
            hidden, past = extend(self.body, prompt_ids, lengths, run=run)
            wanted = [
                self.body.logits(of_one[: len(p)])
                for of_one, p in zip(hidden, prompts, strict=True)
            ]
        else:
            hidden, past, self._beginning = run_prompts(
                self.body, prompt_ids, lengths, known=self._beginning, run=run
            )
            last = lengths - 1 - (prompt_ids.shape[1] - hidden.shape[1])
            # One product for all: the head's weights are read once.
            wanted = self.body.logits(
                hidden[torch.arange(len(last), device=self.device), last]
            ).split(1)
        results = []
        for row, (prompt, logits) in enumerate(zip(prompts, wanted, strict=True)):
            # Padding lies behind a prompt's real positions, so a slice drops it.
            layers = tuple(
                (keys[row, :, : len(prompt)], values[row, :, : len(prompt)])
                for keys, values in past.layers
            )
            results.append(Prefill(logits=logits, state=PromptState(layers=layers)))
        return results

    def add_rows(self, prefill: Prefill, num_rows: int) -> None:
        """Let the next free rows follow the prompt's keys and values."""
        self._cache.add_rows(prefill.state, num_rows)

    @torch.no_grad()
    def advance(self, token_ids: Int[Tensor, " R"]) -> Float[Tensor, "R V"]:
        """Append one token to every row's own part and attend to what the row sees."""
        logits = None if self._fixed is None else self._repeated(self._fixed, token_ids)
        if logits is None:
            linear = self._linear(len(token_ids))
            attend = attention_of_step(self.body, self._cache)
            logits = step_logits(self.body, linear, token_ids, attend)
        self._cache.end_step()
        return logits

    def _repeated(
        self, fixed: FixedSteps, token_ids: Int[Tensor, " R"]
    ) -> Float[Tensor, "R V"] | None:
        """Logits of a step over fixed buffers; None, once and for all, if it is not captured."""
        try:
            return fixed.logits(token_ids, self._cache.begin_rows())
        except RuntimeError as error:
            self._fixed = None
            warnings.warn(
                f"decoding steps are not captured as CUDA graphs and take longer without: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
            return None

    def _linear(self, rows: int) -> PreparedBody:
        """The model's linear layers for a step of so many rows, reordered where that pays."""
        pays = rows >= ENOUGH_ROWS or self._unprepared_steps >= _ENOUGH_STEPS
        if self._prepared is None and pays and self._has_order():
            self._prepared = prepare_body(self.body)
        self._unprepared_steps += 1
        return self._prepared or self._plain

    def _has_order(self) -> bool:
        return order_of(self.body.model.dtype, self.device.type) is not None

    def drop(self, rows: Sequence[int]) -> list[int]:
        """Move the last rows into the places of dropped ones, so that few rows are copied."""
        order = self._cache.drop(rows)
        if not order:
            self._forget_weights()
        return order

    def clear(self) -> None:
        """Forget every row, and what was prepared of the weights."""
        self._cache.clear()
        self._forget_weights()

    def _forget_weights(self) -> None:
        """They may change whenever no row runs."""
        self._prepared, self._unprepared_steps, self._beginning = None, 0, None
        if self._fixed is not None:
            self._fixed.weights_may_move()

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy weights into the module, where they are not the module's own already."""
        assert not self._cache.num_rows, "weights must not change under running rows"
        self._beginning = None
        copy_weights(dict(self.body.model.named_parameters()), named_tensors)
