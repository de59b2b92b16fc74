"""Attention of one decoding step over the sampler's cache: compiled, or as torch's operations.

All turn the new tokens' queries and keys to their positions, write keys and values into the cache,
and attend to the row's prompt and its own tokens. The compiled one walks each row's positions and
does all of a layer in one call; torch gathers rows by prompt and masks what a row does not see.
Over fixed buffers, which a GPU's graph needs, Triton's kernel does what the compiled one does, and
torch gathers each row's prompt instead.

Dimensions: **R** rows, **H** query heads, **K** key heads, **D** head size, **O** = (H + 2 K) D.
"""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gmpo.kernels import triton_decoding
from gmpo.kernels.decoding import AttentionStep, LayerAttention, attends, attention_for
from gmpo.policy.head import widened
from gmpo.policy.llama import LlamaBody, attend
from gmpo.sampler.cache import FixedRows, SharedCache, StepPlan

__all__ = ["attention_of_fixed_rows", "attention_of_step", "walks_fixed_rows"]

_Rotary = tuple[Float[Tensor, "R D"], Float[Tensor, "R D"]]


def attention_of_step(body: LlamaBody, cache: SharedCache) -> LayerAttention:
    """What attends in each layer of the step that begins; the cache has room for its tokens."""
    rotary = _rotary(body, cache.positions())
    dtype = body.head_weight.dtype
    if attends(body.head_dim, dtype=dtype, like=rotary[0]):
        run: LayerAttention = _compiled(body, cache, rotary, dtype=dtype)
    else:
        run = partial(_by_torch, body, cache, cache.begin_step(), rotary)
    return _with_head_norms(body, run)


def attention_of_fixed_rows(body: LlamaBody, rows: FixedRows) -> LayerAttention:
    """What attends in each layer of a step over fixed buffers, whose lengths the device reads."""
    rotary = _rotary(body, rows.prompt_lengths + rows.own_lengths)
    if walks_fixed_rows(body, rows.own):
        step = AttentionStep(
            prompts=rows.prompts,
            own=rows.own,
            slots=rows.slots,
            prompt_lengths=rows.prompt_lengths,
            own_lengths=rows.own_lengths,
            cos=rotary[0].contiguous(),
            sin=rotary[1],
            num_heads=body.num_heads,
        )
        run = triton_decoding.attention_for(step)
    else:
        run = partial(_over_fixed_rows, body, rows, rotary, _seen(rows))
    return _with_head_norms(body, run)


def walks_fixed_rows(body: LlamaBody, own: Float[Tensor, "A 2 N K C D"]) -> bool:
    """Whether the above takes as long as a row's positions are many, not as a part has room for."""
    return triton_decoding.attends(num_heads=body.num_heads, like=own)


def _rotary(body: LlamaBody, positions: Int[Tensor, " R"]) -> _Rotary:
    """cos and sin of the rows' new positions, the first half of sin negated."""
    like = torch.empty(len(positions), 1, 0, device=positions.device)
    cos, sin = body.rotary(like, positions[:, None])
    first, second = widened(sin[:, 0, 0]).chunk(2, dim=-1)
    return widened(cos[:, 0, 0]), torch.cat((-first, second), dim=-1)


def _with_head_norms(body: LlamaBody, run: LayerAttention) -> LayerAttention:
    """Qwen3 norms each query and key before it is turned."""
    if not body.has_head_norms:
        return run

    def normed(number: int, projected: Tensor) -> Tensor:
        heads = projected.view(len(projected), -1, body.head_dim)
        return run(number, body.normed_heads(body.layers[number], heads).flatten(1))

    return normed


def _compiled(
    body: LlamaBody, cache: SharedCache, rotary: _Rotary, *, dtype: torch.dtype
) -> LayerAttention:
    plan = cache.begin_rows()
    slots, prompt_lengths, own_lengths = plan.table.to(cache.device).unbind(0)
    step = AttentionStep(
        prompts=plan.prompts,
        own=plan.own,
        slots=slots,
        prompt_lengths=prompt_lengths,
        own_lengths=own_lengths,
        cos=rotary[0].contiguous(),
        sin=rotary[1],
        num_heads=body.num_heads,
    )
    return attention_for(step, dtype=dtype)


def _by_torch(
    body: LlamaBody,
    cache: SharedCache,
    plan: StepPlan,
    rotary: _Rotary,
    number: int,
    projected: Float[Tensor, "R O"],
) -> Float[Tensor, "R HD"]:
    queries, keys_values = _turned(body, rotary, projected)
    attended = cache.attend(number, plan, queries, keys_values)
    return attended.flatten(1).to(projected.dtype)


def _seen(rows: FixedRows) -> Bool[Tensor, "R 1 1 S"]:
    """Which places of the prompts' part and of the own one each row's new token attends to."""
    device = rows.table.device
    of_prompt = torch.arange(rows.prompt_positions, device=device) < rows.prompt_lengths[:, None]
    of_own = torch.arange(rows.own_positions, device=device) <= rows.own_lengths[:, None]
    return torch.cat((of_prompt, of_own), dim=1)[:, None, None]


def _over_fixed_rows(
    body: LlamaBody,
    rows: FixedRows,
    rotary: _Rotary,
    seen: Bool[Tensor, "R 1 1 S"],
    number: int,
    projected: Float[Tensor, "R O"],
) -> Float[Tensor, "R HD"]:
    queries, keys_values = _turned(body, rotary, projected)
    count = len(queries)
    own, index = rows.own[number], torch.arange(count, device=queries.device)
    own[:, index, :, rows.own_lengths] = keys_values.view(
        count, 2, body.num_key_heads, body.head_dim
    )
    of_prompts = rows.prompts[number][:, :, :, : rows.prompt_positions].index_select(1, rows.slots)
    of_own = own[:, :count, :, : rows.own_positions]
    keys, values = torch.cat((of_prompts, of_own), dim=3).unbind(0)
    attended = attend(queries[:, :, None], keys, values, mask=seen)
    return attended.flatten(1).to(projected.dtype)


def _turned(
    body: LlamaBody, rotary: _Rotary, projected: Float[Tensor, "R O"]
) -> tuple[Float[Tensor, "R H D"], Float[Tensor, "R KK D"]]:
    """Queries, and keys and values, in the cache's precision and at their positions."""
    heads = widened(projected.view(len(projected), -1, body.head_dim))
    turned = heads[:, : body.num_heads + body.num_key_heads]
    first, second = turned.chunk(2, dim=-1)
    swapped = torch.cat((second, first), dim=-1)
    cos, sin = rotary
    # In place: the products are this step's own.
    turned.mul_(cos[:, None]).addcmul_(swapped, sin[:, None])
    return heads[:, : body.num_heads], heads[:, body.num_heads :]
