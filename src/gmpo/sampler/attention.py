"""Attention of one decoding step over the sampler's cache: compiled, or as torch's operations.

Both turn the new tokens' queries and keys to their positions, write keys and values into the cache,
and attend to the row's prompt and its own tokens. The compiled one walks each row's positions and
does all of a layer in one call; torch gathers rows by prompt and masks what a row does not see.

Dimensions: **R** rows, **H** query heads, **K** key heads, **D** head size, **O** = (H + 2 K) D.
"""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from gmpo.kernels.decoding import AttentionStep, LayerAttention, attends, attention_for
from gmpo.policy.head import widened
from gmpo.policy.llama import LlamaBody
from gmpo.sampler.cache import SharedCache, StepPlan

__all__ = ["attention_of_step"]

_Rotary = tuple[Float[Tensor, "R D"], Float[Tensor, "R D"]]


def attention_of_step(body: LlamaBody, cache: SharedCache) -> LayerAttention:
    """What attends in each layer of the step that begins; the cache has room for its tokens."""
    rotary = _rotary(body, cache)
    dtype = body.head_weight.dtype
    if attends(body.head_dim, dtype=dtype, like=rotary[0]):
        attend: LayerAttention = _compiled(body, cache, rotary, dtype=dtype)
    else:
        attend = partial(_by_torch, body, cache, cache.begin_step(), rotary)
    return partial(_with_head_norms, body, attend) if body.has_head_norms else attend


def _rotary(body: LlamaBody, cache: SharedCache) -> _Rotary:
    """cos and sin of the rows' new positions, the first half of sin negated."""
    positions = cache.positions()[:, None]
    cos, sin = body.rotary(torch.empty(len(positions), 1, 0, device=cache.device), positions)
    first, second = widened(sin[:, 0, 0]).chunk(2, dim=-1)
    return widened(cos[:, 0, 0]), torch.cat((-first, second), dim=-1)


def _with_head_norms(
    body: LlamaBody, attend: LayerAttention, number: int, projected: Tensor
) -> Tensor:
    """Qwen3 norms each query and key before it is turned."""
    heads = projected.view(len(projected), -1, body.head_dim)
    return attend(number, body.normed_heads(body.layers[number], heads).flatten(1))


def _compiled(
    body: LlamaBody, cache: SharedCache, rotary: _Rotary, *, dtype: torch.dtype
) -> LayerAttention:
    plan = cache.begin_rows()
    step = AttentionStep(
        prompts=plan.prompts,
        own=plan.own,
        slots=plan.slots,
        prompt_lengths=plan.prompt_lengths,
        own_lengths=plan.own_lengths,
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
    heads = widened(projected.view(len(projected), -1, body.head_dim))
    turned = heads[:, : body.num_heads + body.num_key_heads]
    first, second = turned.chunk(2, dim=-1)
    swapped = torch.cat((second, first), dim=-1)
    cos, sin = rotary
    # In place: the products are this step's own.
    turned.mul_(cos[:, None]).addcmul_(swapped, sin[:, None])
    queries, keys_values = heads[:, : body.num_heads], heads[:, body.num_heads :]
    attended = cache.attend(number, plan, queries, keys_values)
    return attended.flatten(1).to(projected.dtype)
