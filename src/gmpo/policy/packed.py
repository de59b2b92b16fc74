"""Prompts and completions run together, each token once: the training pass over a micro-batch.

What prompts begin with (system turn, worked examples) is one row of tokens, what follows of each
prompt a row after it, and each completion a row after its prompt: a tree of three generations. All
tokens lie end to end in one table without padding, so that every weight is used once a layer and
gets its gradient from one product; only attention looks at generations apart, each row's tokens
at themselves and at the rows before them. Gradients of shared rows add up over all that follow.

Dimensions: **N** tokens of all generations, **R** rows of one, **W** tokens of its longest row,
**S** positions attended to, **C** columns of a block, **M** hidden size, **H** query heads, **K**
key heads, **h** query heads of a key head, **D** head size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from gmpo.batch import MicroBatch
from gmpo.kernels import attention
from gmpo.kernels.shapes import spare_rows
from gmpo.policy import fused
from gmpo.policy.llama import LlamaBody
from gmpo.policy.prefix import common_length
from gmpo.policy.recompute import recomputed

__all__ = ["scored_hidden_states"]

_Heads = tuple[Tensor, Tensor, Tensor]
"""Queries [N, H, D], keys and values [N, K, D]."""

_QUERY_BLOCK = 128
"""Tokens of a row that attend together: a block leaves out the keys that lie after all of it, which
of a long row are nearly half. Smaller blocks cost more in small products than they leave out."""
_MASK_NUMBERS = 2**26
"""Of the largest mask on other devices, where blocks are as few as that allows: each is several
operations a layer, which have to be started, and what a mask leaves out costs little."""


@dataclass(frozen=True, kw_only=True)
class _QueryBlock:
    """Columns of a generation's rows that attend together.

    Attributes:
        columns: which of the own ones.
        seen: positions, counted from the first of the rows before, that any of them attends to.
        bias: 0 where a token attends, -inf where it does not; query heads of a key head lie along
            the second-last axis.
    """

    columns: slice
    seen: int
    bias: Float[Tensor, "R 1 HC s"]


@dataclass(frozen=True, kw_only=True)
class _Generation:
    """Rows of tokens that follow the rows of the generation before.

    Attributes:
        token_ids: of all rows end to end.
        positions: where each token stands in its whole sequence.
        first: place of the generation's first token in the table of all tokens.
        padded: for each row and column the token's place within the generation; past a row's end,
            that of some token, whose results are not used.
        real: places in the padded table, flattened, of the tokens in order.
        parent: row of the generation before that each row follows; None in the first.
        valid: which columns of the rows before and of the own ones are no padding.
        body: the model that they are for.
    """

    token_ids: Int[Tensor, " n"]
    positions: Int[Tensor, " n"]
    first: int
    padded: Int[Tensor, "R W"]
    real: Int[Tensor, " n"]
    parent: Int[Tensor, " R"] | None
    valid: Bool[Tensor, "R S"]
    body: LlamaBody

    @functools.cached_property
    def blocks(self) -> tuple[_QueryBlock, ...]:
        """All own columns, in order, as they attend; made only where torch attends."""
        return _query_blocks(self.valid, self.padded.shape[1], self.body)


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """How the table's tokens lie, and the cosines and sines of their positions.

    The last `spare` tokens fill the table up to a size that was seen before: they see themselves
    alone, and nothing reads them.
    """

    generations: Sequence[_Generation]
    cos: Float[Tensor, "N D"]
    sin: Float[Tensor, "N D"]
    spare: int
    body: LlamaBody

    @functools.cached_property
    def tree(self) -> attention.Tree:
        """What follows what; made only where attention is compiled, since it reads lengths back."""
        return _tree(self.body, self.generations, spare=self.spare)


def scored_hidden_states(body: LlamaBody, batch: MicroBatch) -> Float[Tensor, "N M"]:
    """Final hidden states at the positions that predict each masked completion token.

    The prompt's last position predicts the first completion token, completion token t predicts
    t + 1, so the last one is never run. The order is that of `completion_ids[mask]`.
    """
    generations = _generations(body, batch)
    token_ids = torch.cat([g.token_ids for g in generations])
    positions = torch.cat([g.positions for g in generations])
    spare = spare_rows(len(token_ids), like=body.head_weight)
    token_ids, positions = (functional.pad(each, (0, spare)) for each in (token_ids, positions))
    hidden = body.embed(token_ids[None])[0]
    cos, sin = (part[0, 0] for part in body.rotary(hidden[None], positions[None]))
    layout = _Layout(generations=generations, cos=cos, sin=sin, spare=spare, body=body)
    run = _run_layer
    if body.recomputes_layers and torch.is_grad_enabled():
        run = functools.partial(recomputed, _run_layer)
    for layer in body.layers:
        hidden = run(body, layer, hidden, layout)
    # Not `hidden[...]`: threads would add the gradients of a prompt's last token, which all of its
    # rows follow, in whichever order they come, and no two runs would be alike.
    return body.final_norm(hidden.index_select(0, _predictors(generations, batch)))


def _generations(body: LlamaBody, batch: MicroBatch) -> list[_Generation]:
    """Common beginning (if it pays), prompts, completions (if any has more than one token)."""
    prompts, lengths = batch.prompt_ids, batch.prompt_lengths
    shared = common_length(prompts, lengths)
    generations: list[_Generation] = []
    add = functools.partial(_add_generation, generations, body=body)
    if shared:
        add(prompts[:1, :shared], torch.full_like(lengths[:1], shared), parent=None)
        add(prompts[:, shared:], lengths - shared, parent=torch.zeros_like(lengths))
    else:
        add(prompts, lengths, parent=None)
    if batch.completion_ids.shape[1] > 1:
        rows = batch.completion_ids[:, :-1]
        add(rows, batch.completion_lengths - 1, parent=batch.prompt_of_row)
    return generations


def _add_generation(
    generations: list[_Generation],
    token_ids: Int[Tensor, "R W"],
    lengths: Int[Tensor, " R"],
    *,
    parent: Int[Tensor, " R"] | None,
    body: LlamaBody,
) -> None:
    """Append rows, padded on the right, that follow the rows of the last generation."""
    width = int(lengths.max())
    token_ids = token_ids[:, :width]
    columns = torch.arange(width, device=token_ids.device)
    own = columns[None] < lengths[:, None]
    ends = lengths.cumsum(0)
    before = generations[-1] if parent is not None else None
    valid, starts, first = own, torch.zeros_like(lengths), 0
    if before is not None:
        past = before.valid[parent]
        valid = torch.cat((past, own), dim=1)
        starts = past.sum(dim=1)
        first = before.first + len(before.token_ids)
    generations.append(
        _Generation(
            token_ids=token_ids[own],
            positions=(starts[:, None] + columns[None])[own],
            first=first,
            padded=((ends - lengths)[:, None] + columns[None]).clamp(max=int(ends[-1]) - 1),
            real=torch.nonzero(own.flatten())[:, 0],
            parent=parent,
            valid=valid,
            body=body,
        )
    )


def _query_blocks(
    valid: Bool[Tensor, "R S"], width: int, body: LlamaBody
) -> tuple[_QueryBlock, ...]:
    """Every row's `width` own columns, which are its last: each sees what is valid up to itself."""
    rows, positions = valid.shape
    before = positions - width
    columns = torch.arange(width, device=valid.device)
    shared_heads = body.num_heads // body.num_key_heads
    count = max(1, width // _QUERY_BLOCK)
    if valid.device.type != "cpu":
        whole = rows * shared_heads * width * positions
        count = min(count, -(-whole // _MASK_NUMBERS))
    blocks = []
    for block in columns.tensor_split(count):
        start, stop = int(block[0]), int(block[-1]) + 1
        seen = before + stop
        attends = (block[:, None] >= columns[None, :stop]).expand(rows, -1, -1)
        past = valid[:, None, :before].expand(-1, len(block), -1)
        attends = torch.cat((past, attends), dim=2)
        bias = torch.zeros(attends.shape, dtype=_attention_dtype(body), device=valid.device)
        bias = bias.masked_fill(~attends, -math.inf).repeat(1, shared_heads, 1)
        blocks.append(_QueryBlock(columns=slice(start, stop), seen=seen, bias=bias[:, None]))
    return tuple(blocks)


def _predictors(generations: Sequence[_Generation], batch: MicroBatch) -> Int[Tensor, " N"]:
    """Where in the table of all tokens the predictor of each masked completion token lies."""
    has_completions = batch.completion_ids.shape[1] > 1
    prompts = generations[-2 if has_completions else -1]
    own_lengths = prompts.valid[:, -prompts.padded.shape[1] :].sum(dim=1)
    last = prompts.first + prompts.padded.gather(1, own_lengths[:, None] - 1)
    places = last[batch.prompt_of_row]
    if has_completions:
        completions = generations[-1]
        places = torch.cat((places, completions.first + completions.padded), dim=1)
    return places[batch.mask[:, : places.shape[1]]]


def _run_layer(
    body: LlamaBody, layer: Any, hidden: Float[Tensor, "N M"], layout: _Layout
) -> Float[Tensor, "N M"]:
    # Nested, so that what only attention needs is let go before the feed-forward part.
    if not fused.is_covered(layer):
        attended = _attended(body, _projected(body, layer, hidden, layout), None, layout)
        by_head = attended.unflatten(1, (body.num_heads, -1)).transpose(0, 1)
        return body.finish(layer, hidden[None], by_head[None])[0]
    stream, heads = _fused_heads(body, layer, hidden)
    attended = _attended(body, heads, (layout.cos, layout.sin), layout)
    del heads
    return fused.feed_forward(stream, attended, layer)


def _projected(
    body: LlamaBody, layer: Any, hidden: Float[Tensor, "N M"], layout: _Layout
) -> _Heads:
    """Queries, keys and values by the layer's modules, whatever they are, positions applied."""
    rotary = layout.cos[None, None], layout.sin[None, None]
    queries, keys, values = body.project(layer, hidden[None], rotary)
    return queries[0].transpose(0, 1), keys[0].transpose(0, 1), values[0].transpose(0, 1)


def _fused_heads(
    body: LlamaBody, layer: Any, hidden: Float[Tensor, "N M"]
) -> tuple[Float[Tensor, "N M"], _Heads]:
    """The stream, and heads without positions by functions that keep little for their backward."""
    part = layer.self_attn
    linears = (part.q_proj, part.k_proj, part.v_proj)
    stream, *projected = fused.project(hidden, layer.input_layernorm, linears)
    queries, keys, values = (heads.unflatten(1, (-1, body.head_dim)) for heads in projected)
    if body.has_head_norms:
        queries, keys = (
            fused.rms_norm(heads, norm.weight, eps=norm.variance_epsilon)
            for heads, norm in ((queries, part.q_norm), (keys, part.k_norm))
        )
    return stream, (queries, keys, values)


def _attended(
    body: LlamaBody, heads: _Heads, rotary: tuple[Tensor, Tensor] | None, layout: _Layout
) -> Float[Tensor, "N HD"]:
    """What each token attends to; `rotary` is None where positions are applied already."""
    if attention.is_compiled(*heads, layout.cos):
        return attention.attend(*heads, rotary, layout.tree)
    queries, keys, values = heads
    if rotary is not None:
        cos, sin = (part[:, None] for part in rotary)
        queries, keys = fused.rotate(queries, cos, sin), fused.rotate(keys, cos, sin)
    return _attend_all(layout, queries, keys, values)


def _tree(body: LlamaBody, generations: Sequence[_Generation], *, spare: int) -> attention.Tree:
    """What follows what, for the compiled function; spare tokens are a row of their own."""
    rows: list[attention.Row] = []
    before = 0  # number of the first row of the generation before
    for generation in generations:
        lengths = generation.valid[:, -generation.padded.shape[1] :].sum(dim=1)
        firsts = generation.first + lengths.cumsum(0) - lengths
        parents: list[int | None] = [None] * len(lengths)
        if generation.parent is not None:
            parents = [before + parent for parent in generation.parent.tolist()]
        before = len(rows)
        is_shared = generation is not generations[-1]
        rows += [
            attention.Row(
                first=first,
                length=length,
                parent=parent,
                is_shared=is_shared,
            )
            for first, length, parent in zip(
                firsts.tolist(), lengths.tolist(), parents, strict=True
            )
        ]
    if spare:
        end = generations[-1].first + len(generations[-1].token_ids)
        rows.append(attention.Row(first=end, length=spare, parent=None, is_shared=False))
    return attention.tree_of(
        rows,
        num_heads=body.num_heads,
        num_key_heads=body.num_key_heads,
        head_dim=body.head_dim,
    )


def _attend_all(
    layout: _Layout,
    queries: Float[Tensor, "N H D"],
    keys: Float[Tensor, "N K D"],
    values: Float[Tensor, "N K D"],
) -> Float[Tensor, "N HD"]:
    """What each token of all generations attends to; 0 for the spare ones."""
    attended = []
    past: tuple[Tensor, Tensor] | None = None
    for generation in layout.generations:
        stop = generation.first + len(generation.token_ids)
        own = [states[generation.first : stop] for states in (queries, keys, values)]
        result, past = _attend(generation, own[0], (own[1], own[2]), past)
        attended.append(result)
    return functional.pad(torch.cat(attended), (0, 0, 0, layout.spare))


def _attend(
    generation: _Generation,
    queries: Float[Tensor, "n H D"],
    own: tuple[Float[Tensor, "n K D"], Float[Tensor, "n K D"]],
    past: tuple[Tensor, Tensor] | None,
) -> tuple[Float[Tensor, "n HD"], tuple[Tensor, Tensor]]:
    """What each token attends to, and the keys and values that later generations see of a row.

    The query heads of a key head are laid side by side along the rows, so that keys are never
    copied for each head.
    """
    num_tokens, num_heads, head_dim = queries.shape
    num_key_heads = own[0].shape[1]
    keys, values = (_as_rows(states, generation) for states in own)
    if past is not None:
        assert generation.parent is not None, "only the first generation has nothing before it"
        keys, values = (
            torch.cat((before.index_select(0, generation.parent), states), dim=1)
            for before, states in zip(past, (keys, values), strict=True)
        )
    rows, width = generation.padded.shape
    shared = num_heads // num_key_heads
    packed = _as_rows(queries, generation).view(rows, width, num_key_heads, shared, head_dim)
    dtype = generation.blocks[0].bias.dtype
    by_head = keys.transpose(1, 2).to(dtype), values.transpose(1, 2).to(dtype)
    attended = [
        _attend_block(packed[:, block.columns], by_head, block) for block in generation.blocks
    ]
    by_token = attended[0] if len(attended) == 1 else torch.cat(attended, dim=1)
    flat = by_token.reshape(rows * width, num_heads * head_dim)
    if rows * width > num_tokens:
        flat = flat.index_select(0, generation.real)
    return flat, (keys, values)


def _attend_block(
    queries: Float[Tensor, "R C K h D"],
    by_head: tuple[Float[Tensor, "R K S D"], Float[Tensor, "R K S D"]],
    block: _QueryBlock,
) -> Float[Tensor, "R C K h D"]:
    """What some columns of each row attend to."""
    columns, shared = queries.shape[1], queries.shape[3]
    laid_out = queries.permute(0, 2, 3, 1, 4)
    laid_out = laid_out.to(block.bias.dtype, memory_format=torch.contiguous_format).contiguous()
    keys, values = (states[:, :, : block.seen] for states in by_head)
    attended = functional.scaled_dot_product_attention(
        laid_out.flatten(2, 3), keys, values, attn_mask=block.bias
    )
    by_token: Tensor = attended.unflatten(2, (shared, columns)).permute(0, 3, 1, 2, 4)
    return by_token.to(queries.dtype, memory_format=torch.contiguous_format)


def _as_rows(states: Float[Tensor, "n A D"], generation: _Generation) -> Float[Tensor, "R W A D"]:
    """Tokens end to end as rows, padded on the right."""
    rows = fused.gathered_rows(states.flatten(1), generation.padded, generation.real)
    return rows.view(*rows.shape[:2], *states.shape[1:])


def _attention_dtype(body: LlamaBody) -> torch.dtype:
    """Precision of attention: on a CPU, the backward pass in bf16 takes up to three times as long.

    Measured with torch 2.13 on a processor with AMX (16 rows, 3 key heads, forward and backward):
    31 tokens after 46 7.2 ms against 2.5 in fp32, 127 after 73 22 against 19.
    """
    dtype: torch.dtype = body.model.dtype
    is_slow = dtype == torch.bfloat16 and body.model.device.type == "cpu"
    return torch.float32 if is_slow else dtype
