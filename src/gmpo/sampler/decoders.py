"""Engines under the local sampler: next-token logits of many running sequences, one token a call.

`LlamaDecoder` keeps keys and values of all rows in one preallocated cache; `TransformersDecoder`
lets any causal model keep its own cache, one prompt's rows at a time. Both prefill a prompt once
for all its completions.

Dimensions: **R** running rows, **V** vocabulary, **L** prompt tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel

from gmpo.policy.head import widened
from gmpo.policy.llama import LlamaBody, attend
from gmpo.policy.prefix import extend, padded, run_prompts
from gmpo.policy.weights import copy_weights
from gmpo.sampler.prepared import PreparedBody, PreparedLayer, prepare_body

__all__ = ["Decoder", "LlamaDecoder", "Prefill", "TransformersDecoder"]

_CACHE_STEP = 64
"""The cache grows by this many positions at a time."""
_FEWEST_ROWS = 16
"""Rows running at once from which reordered weights earn the time it takes to reorder them."""


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

    def prefill(self, prompts: Sequence[Sequence[int]], *, all_logits: bool) -> list[Prefill]:
        """Run prompts; `logits` hold the last position only, or all of them."""

    def add_rows(self, prefill: Prefill, num_rows: int) -> None:
        """Let `num_rows` new rows continue a prompt."""

    def advance(self, token_ids: Int[Tensor, " R"]) -> Float[Tensor, "R V"]:
        """Append one token to every row; logits of the next one."""

    def drop(self, rows: Sequence[int]) -> list[int]:
        """Forget these rows; the remaining ones' old places, in their new order."""

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Use these weights for rows that start from now on; no row may be running."""


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
        """Rows of one prompt form a block with a cache of its own, so nothing is padded."""
        cache = copy.deepcopy(prefill.state)
        cache.batch_repeat_interleave(num_rows)
        self._blocks.append((cache, num_rows))

    @torch.no_grad()
    def advance(self, token_ids: Int[Tensor, " R"]) -> Float[Tensor, "R V"]:
        """One forward a block."""
        logits = []
        start = 0
        for cache, count in self._blocks:
            block_ids = token_ids[start : start + count, None]
            output = self.model(block_ids, past_key_values=cache, use_cache=True)
            logits.append(widened(output.logits[:, -1]))
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

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy weights into the module, where they are not the module's own already."""
        assert not self._blocks, "weights must not change under running rows"
        copy_weights(dict(self.model.named_parameters()), named_tensors)


class LlamaDecoder:
    """A Llama-family model over one preallocated cache that all rows share.

    Row r's tokens lie at cache positions 0 .. length[r] - 1, so rows of different lengths decode
    together without padding on the left; finished rows make room by compaction.

    Weights may change whenever no row runs, so what was prepared of them lasts only until then.
    """

    def __init__(self, body: LlamaBody, *, max_rows: int) -> None:
        self.body = body
        self._max_rows = max_rows
        self._lengths = torch.zeros(0, dtype=torch.long, device=body.model.device)
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._prepared: PreparedBody | None = None

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self._lengths.device

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]], *, all_logits: bool) -> list[Prefill]:
        """Run prompts together; their common beginning once, unless all logits are wanted."""
        prompt_ids, lengths = padded(prompts, device=self.device)
        run = extend if all_logits else run_prompts
        hidden, past = run(self.body, prompt_ids, lengths)
        not_run = prompt_ids.shape[1] - hidden.shape[1]
        results = []
        for row, prompt in enumerate(prompts):
            last = len(prompt) - 1 - not_run
            logits = self.body.logits(hidden[row, 0 if all_logits else last : last + 1])
            # Padding lies behind a prompt's real positions, so a slice drops it.
            state = [
                (keys[row, :, : len(prompt)], values[row, :, : len(prompt)])
                for keys, values in past.layers
            ]
            results.append(Prefill(logits=logits, state=state))
        return results

    def add_rows(self, prefill: Prefill, num_rows: int) -> None:
        """Copy the prompt's keys and values into the next free rows."""
        length = prefill.state[0][0].shape[1]
        first = len(self._lengths)
        assert first + num_rows <= self._max_rows, "more rows than the cache has"
        self._reserve(length + 1, like=prefill.state[0][0])
        for layer, (keys, values) in enumerate(prefill.state):
            self._keys[layer][first : first + num_rows, :, :length] = keys
            self._values[layer][first : first + num_rows, :, :length] = values
        added = torch.full((num_rows,), length, device=self._lengths.device)
        self._lengths = torch.cat((self._lengths, added))

    @torch.no_grad()
    def advance(self, token_ids: Int[Tensor, " R"]) -> Float[Tensor, "R V"]:
        """Write one position into every row's cache and attend to what the row holds."""
        rows = len(token_ids)
        if self._prepared is None and rows >= _FEWEST_ROWS:
            self._prepared = prepare_body(self.body)
        longest = int(self._lengths.max()) + 1
        self._reserve(longest, like=self._keys[0])
        hidden = self.body.embed(token_ids[:, None])
        rotary = self.body.rotary(hidden, self._lengths[:, None])
        positions = torch.arange(longest, device=token_ids.device)
        mask = (positions[None] <= self._lengths[:, None])[:, None, None]
        row_index = torch.arange(rows, device=token_ids.device)
        for number, layer in enumerate(self.body.layers):
            keys_cache, values_cache = self._keys[number], self._values[number]
            prepared = None if self._prepared is None else self._prepared.layers[number]
            queries, keys, values = self._project(layer, prepared, hidden, rotary)
            keys_cache[row_index, :, self._lengths] = keys[:, :, 0]
            values_cache[row_index, :, self._lengths] = values[:, :, 0]
            attended = attend(
                queries, keys_cache[:rows, :, :longest], values_cache[:rows, :, :longest], mask=mask
            )
            hidden = self._finish(layer, prepared, hidden, attended)
        self._lengths = self._lengths + 1
        if self._prepared is None:
            return self.body.logits(hidden[:, 0])
        (logits,) = self._prepared.head(self.body.final_norm(hidden[:, 0]))
        return widened(logits)

    def _project(
        self,
        layer: Any,
        prepared: PreparedLayer | None,
        hidden: Float[Tensor, "R 1 M"],
        rotary: tuple[Tensor, Tensor],
    ) -> tuple[Float[Tensor, "R H 1 D"], Float[Tensor, "R K 1 D"], Float[Tensor, "R K 1 D"]]:
        """Queries, keys and values of the rows' newest tokens."""
        if prepared is None:
            return self.body.project(layer, hidden, rotary)
        parts = prepared.query_key_value(self.body.attention_norm(layer, hidden[:, 0]))
        queries, keys, values = (part.contiguous()[:, None] for part in parts)
        return self.body.heads(layer, queries, keys, values, rotary=rotary)

    def _finish(
        self,
        layer: Any,
        prepared: PreparedLayer | None,
        hidden: Float[Tensor, "R 1 M"],
        attended: Float[Tensor, "R H 1 D"],
    ) -> Float[Tensor, "R 1 M"]:
        """The layer's output for the rows' newest tokens."""
        if prepared is None:
            return self.body.finish(layer, hidden, attended)
        flat = hidden[:, 0]
        (output,) = prepared.output(attended.reshape(len(flat), -1))
        flat = flat + output
        gate, up = prepared.gate_up(self.body.feed_forward_norm(layer, flat))
        (output,) = prepared.down(functional.silu(gate).mul_(up))
        return (flat + output)[:, None]

    def drop(self, rows: Sequence[int]) -> list[int]:
        """Move the last rows into the places of dropped ones, so that few rows are copied."""
        dropped, count = set(rows), len(self._lengths)
        order = [row for row in range(count) if row not in dropped]
        holes = [row for row in sorted(dropped) if row < len(order)]
        movers = [row for row in order if row >= len(order)]
        if holes:
            longest = int(self._lengths.max())
            for cache in (*self._keys, *self._values):
                cache[holes, :, :longest] = cache[movers, :, :longest]
        new_order = list(range(len(order)))
        for hole, mover in zip(holes, movers, strict=True):
            new_order[hole] = mover
        self._lengths = self._lengths[new_order]
        if not new_order:
            self._prepared = None
        return new_order

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy weights into the module, where they are not the module's own already."""
        assert not len(self._lengths), "weights must not change under running rows"
        copy_weights(dict(self.body.model.named_parameters()), named_tensors)

    def _reserve(self, length: int, *, like: Tensor) -> None:
        """Grow the cache to hold `length` positions a row; what it holds stays."""
        if self._keys and self._keys[0].shape[2] >= length:
            return
        capacity = -(-length // _CACHE_STEP) * _CACHE_STEP
        shape = (self._max_rows, self.body.num_key_heads, capacity, self.body.head_dim)

        def grown(old: Tensor | None) -> Tensor:
            # Zeros, not empty: a masked NaN would still poison a softmax-weighted sum.
            new = torch.zeros(shape, dtype=like.dtype, device=like.device)
            if old is not None:
                new[:, :, : old.shape[2]] = old
            return new

        nothing: list[Tensor | None] = [None] * len(self.body.layers)
        old_keys = list(self._keys) or nothing
        old_values = list(self._values) or nothing
        self._keys = [grown(old) for old in old_keys]
        self._values = [grown(old) for old in old_values]
