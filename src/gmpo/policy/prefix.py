"""Tokens run after keys and values that other tokens left: what prompts share is run once.

A micro-batch's prompts begin alike (system turn, worked examples), and a group's completions follow
the same prompt. `extend` runs rows of tokens after such a past, with gradient through it, so that
neither part is repeated: the sampler's prefill. `packed.py` does the same for training.

Dimensions: **P** prompts, **B** sequences, **T** tokens, **S** positions of the past, **M** hidden
size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gmpo.policy.llama import LlamaBody, attend
from gmpo.policy.recompute import recomputed

__all__ = [
    "Beginning",
    "LayerRun",
    "Past",
    "common_length",
    "extend",
    "padded",
    "run_prompts",
]

_SHORTEST_COMMON = 4
"""Tokens that prompts must have in common before it pays to run them apart."""


@dataclass(frozen=True, kw_only=True)
class Past:
    """Keys and values of every layer, one row a sequence, with what of it is padding.

    Attributes:
        layers: keys and values, each [B, K, S, D].
        valid: False on padding.
        lengths: real positions of each row, which is where the next token stands.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    valid: Bool[Tensor, "B S"]
    lengths: Int[Tensor, " B"]

    def rows(self, index: Int[Tensor, " R"]) -> Past:
        """These rows, repeated as the index says; gradients of repeats add up."""
        return Past(
            layers=tuple((keys[index], values[index]) for keys, values in self.layers),
            valid=self.valid[index],
            lengths=self.lengths[index],
        )

    def first(self, positions: int) -> Past:
        """The first positions of every row, none of which is padding."""
        return Past(
            layers=tuple(
                (keys[:, :, :positions], values[:, :, :positions]) for keys, values in self.layers
            ),
            valid=self.valid[:, :positions],
            lengths=torch.full_like(self.lengths, positions),
        )

    def then(self, later: Past) -> Past:
        """This past with a later one behind it, row by row."""
        pairs = zip(self.layers, later.layers, strict=True)
        return Past(
            layers=tuple(
                (torch.cat((keys, more_keys), dim=2), torch.cat((values, more_values), dim=2))
                for (keys, values), (more_keys, more_values) in pairs
            ),
            valid=torch.cat((self.valid, later.valid), dim=1),
            lengths=self.lengths + later.lengths,
        )


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """Tokens that were run, with their keys and values: what later prompts may begin with.

    Attributes:
        token_ids: from position 0 on.
        past: of one row, as long.
    """

    token_ids: Int[Tensor, " S"]
    past: Past

    def length_in(self, prompt_ids: Int[Tensor, "P L"], lengths: Int[Tensor, " P"]) -> int:
        """Tokens of it that all prompts begin with, at least one short of the shortest."""
        longest = min(len(self.token_ids), int(lengths.min()) - 1)
        return _equal_length(prompt_ids[:, :longest], self.token_ids[None, :longest])


LayerRun = Callable[..., tuple[Tensor, Tensor, Tensor]]
"""One layer: of the body, the layer, hidden states, cos and sin, which keys are seen, and the keys
and values before it, its output and its own keys and values."""


def extend(
    body: LlamaBody,
    token_ids: Int[Tensor, "B T"],
    lengths: Int[Tensor, " B"],
    past: Past | None = None,
    *,
    run: LayerRun | None = None,
) -> tuple[Float[Tensor, "B T M"], Past]:
    """Run rows of tokens, padded on the right, after a past; hidden states and their own past.

    Args:
        body: the model.
        token_ids: what lies beyond a row's length has no effect on the rest.
        lengths: real tokens of each row.
        past: what each row follows; None starts at position 0.
        run: how a layer is run; by the model's modules if None.
    """
    hidden = body.embed(token_ids)
    offsets = torch.arange(token_ids.shape[1], device=token_ids.device)
    starts = torch.zeros_like(lengths) if past is None else past.lengths
    rotary = body.rotary(hidden, starts[:, None] + offsets[None])
    mask = (offsets[:, None] >= offsets[None, :])[None, None]
    if past is not None:
        rows, width = token_ids.shape
        sees_past = past.valid[:, None, None].expand(rows, 1, width, -1)
        mask = torch.cat((sees_past, mask.expand(rows, 1, width, width)), dim=-1)
    run = run or _run_layer
    if body.recomputes_layers and torch.is_grad_enabled():
        run = partial(recomputed, run)
    own = []
    for number, layer in enumerate(body.layers):
        before = None if past is None else past.layers[number]
        hidden, keys, values = run(body, layer, hidden, rotary, mask, before)
        own.append((keys, values))
    return hidden, Past(layers=tuple(own), valid=offsets[None] < lengths[:, None], lengths=lengths)


def _run_layer(
    body: LlamaBody,
    layer: Any,
    hidden: Float[Tensor, "B T M"],
    rotary: tuple[Tensor, Tensor],
    mask: Bool[Tensor, "b 1 T S"],
    before: tuple[Tensor, Tensor] | None,
) -> tuple[Float[Tensor, "B T M"], Tensor, Tensor]:
    """One layer after the keys and values before it; its output and its own keys and values."""
    queries, keys, values = body.project(layer, hidden, rotary)
    all_keys, all_values = keys, values
    if before is not None:
        all_keys = torch.cat((before[0], keys), dim=2)
        all_values = torch.cat((before[1], values), dim=2)
    hidden = body.finish(layer, hidden, attend(queries, all_keys, all_values, mask=mask))
    return hidden, keys, values


def run_prompts(
    body: LlamaBody,
    prompt_ids: Int[Tensor, "P L"],
    lengths: Int[Tensor, " P"],
    *,
    known: Beginning | None = None,
    run: LayerRun | None = None,
) -> tuple[Float[Tensor, "P R M"], Past, Beginning | None]:
    """Run prompts, their common beginning once, or not at all where it is known.

    Args:
        body: the model.
        prompt_ids: padded on the right.
        lengths: real tokens of each prompt.
        known: of prompts that these weights ran before.
        run: how a layer is run; by the model's modules if None.

    Returns:
        Hidden states that end at each prompt's last token (row p's last real one is at
        `lengths[p] - 1 - (L - R)`), the whole past, and what is to be known from now on.
    """
    shared = common_length(prompt_ids, lengths)
    spared = 0 if known is None else known.length_in(prompt_ids, lengths)
    if known is not None and spared >= max(shared, _SHORTEST_COMMON):
        once = known.past.first(spared)
    elif shared:
        _, once = extend(body, prompt_ids[:1, :shared], lengths[:1] * 0 + shared, run=run)
        known = Beginning(token_ids=prompt_ids[0, :shared], past=once)
        spared = shared
    else:
        hidden, past = extend(body, prompt_ids, lengths, run=run)
        return hidden, past, _newer(known, prompt_ids, past, spared=0)
    beginning = once.rows(torch.zeros_like(lengths))
    hidden, rest = extend(body, prompt_ids[:, spared:], lengths - spared, beginning, run=run)
    past = beginning.then(rest)
    return hidden, past, _newer(known, prompt_ids, past, spared=spared)


def _newer(
    known: Beginning | None, prompt_ids: Int[Tensor, "P L"], past: Past, *, spared: int
) -> Beginning | None:
    """A prompt that came alone, where what is known spared less than half of it."""
    if len(prompt_ids) == 1 and 2 * spared < prompt_ids.shape[1]:
        return Beginning(token_ids=prompt_ids[0], past=past)
    return known


def common_length(prompt_ids: Int[Tensor, "P L"], lengths: Int[Tensor, " P"]) -> int:
    """Tokens all prompts begin with, at least one short of the shortest; 0 if not worth a pass."""
    if len(prompt_ids) == 1:
        return 0
    shortest = int(lengths.min()) - 1
    shared = _equal_length(prompt_ids[:, :shortest], prompt_ids[:1, :shortest])
    return shared if shared >= _SHORTEST_COMMON else 0


def _equal_length(rows: Int[Tensor, "P S"], row: Int[Tensor, "1 S"]) -> int:
    """Columns before the first in which a row differs from the one."""
    differs = (rows != row).any(dim=0)
    return int(differs.int().argmax()) if bool(differs.any()) else rows.shape[1]


def padded(
    sequences: Sequence[Sequence[int]], *, device: torch.device
) -> tuple[Int[Tensor, "P L"], Int[Tensor, " P"]]:
    """Token ids as one table padded on the right, and their lengths."""
    width = max(len(sequence) for sequence in sequences)
    table = [list(sequence) + [0] * (width - len(sequence)) for sequence in sequences]
    lengths = [len(sequence) for sequence in sequences]
    return torch.tensor(table, device=device), torch.tensor(lengths, device=device)
