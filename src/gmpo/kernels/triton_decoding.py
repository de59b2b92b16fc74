"""Attention of a decoding step as one GPU kernel a layer, in Triton, which comes with torch there.

What `decoding.attention_for` gives on a CPU: each row and key head walks its prompt's positions and
its own, whose numbers are read on the device, so that one captured graph serves all lengths.

Dimensions: as in `decoding`.
"""

import importlib.util

import torch
from torch import Tensor

from gmpo.kernels.decoding import AttentionStep, LayerAttention
from gmpo.kernels.triton_norm import has_triton

__all__ = ["attends", "attention_for"]

_BLOCK = 32
"""Positions looked at together."""
_MOST_NUMBERS = 2**14
"""Of a block's products, query heads by positions by head size: more would leave the registers."""

if importlib.util.find_spec("triton") is not None:
    import triton
    import triton.language as tl

    @triton.jit
    def _add_part(  # noqa: PLR0913 (a kernel has no records)
        queries,
        keys,
        values,
        length,
        largest,
        total,
        summed,
        DIM: tl.constexpr,
        WIDE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Positions below length of one part, added to a softmax kept relative to the largest."""
        dims = tl.arange(0, WIDE)
        for first in range(0, length, BLOCK):
            places = first + tl.arange(0, BLOCK)
            is_here = places < length
            offsets = places[:, None] * DIM + dims[None, :]
            mask = is_here[:, None] & (dims < DIM)[None, :]
            of_keys = tl.load(keys + offsets, mask=mask, other=0.0)
            scores = tl.sum(queries[:, None, :] * of_keys[None, :, :], axis=2)
            scores = tl.where(is_here[None, :], scores, float("-inf"))
            now = tl.maximum(largest, tl.max(scores, axis=1))
            weights = tl.exp(scores - now[:, None])
            shrunk = tl.exp(largest - now)
            of_values = tl.load(values + offsets, mask=mask, other=0.0)
            added = tl.sum(weights[:, :, None] * of_values[None, :, :], axis=1)
            summed = summed * shrunk[:, None] + added
            total = total * shrunk + tl.sum(weights, axis=1)
            largest = now
        return largest, total, summed

    @triton.jit
    def _turned(base, heads, dims, cos, sin, DIM: tl.constexpr):
        """Heads that lie side by side at `base`, at their positions."""
        mask = (dims < DIM)[None, :] & (heads >= 0)[:, None]
        swapped = tl.where(dims < DIM // 2, dims + DIM // 2, dims - DIM // 2)
        states = tl.load(base + heads[:, None] * DIM + dims[None, :], mask=mask, other=0.0)
        others = tl.load(base + heads[:, None] * DIM + swapped[None, :], mask=mask, other=0.0)
        return states.to(tl.float32) * cos[None, :] + others.to(tl.float32) * sin[None, :]

    @triton.jit
    def _attend(  # noqa: PLR0913
        projected,
        prompts,
        own,
        slots,
        prompt_lengths,
        own_lengths,
        cosines,
        sines,
        attended,
        prompt_part,
        prompt_capacity,
        own_part,
        own_capacity,
        scale,
        HEADS: tl.constexpr,
        KEY_HEADS: tl.constexpr,
        PADDED_GROUP: tl.constexpr,
        DIM: tl.constexpr,
        WIDE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """One row and key head: its new key and value are written, and all are attended to."""
        row = tl.program_id(0).to(tl.int64)
        key_head = tl.program_id(1)
        group: tl.constexpr = HEADS // KEY_HEADS
        dims = tl.arange(0, WIDE)
        is_dim = dims < DIM
        cos = tl.load(cosines + row * DIM + dims, mask=is_dim, other=0.0)
        sin = tl.load(sines + row * DIM + dims, mask=is_dim, other=0.0)
        base = projected + row * ((HEADS + 2 * KEY_HEADS) * DIM)
        members = tl.arange(0, PADDED_GROUP)
        # Places beyond the group repeat its last head and are not stored.
        heads = key_head * group + tl.minimum(members, group - 1)
        queries = _turned(base, heads, dims, cos, sin, DIM) * scale
        one = tl.zeros([1], dtype=tl.int32)
        new_key = tl.sum(_turned(base, one + HEADS + key_head, dims, cos, sin, DIM), axis=0)
        places = base + (HEADS + KEY_HEADS + key_head) * DIM + dims
        new_value = tl.load(places, mask=is_dim, other=0.0).to(tl.float32)

        length = tl.load(own_lengths + row)
        own_keys = own + (row * KEY_HEADS + key_head) * own_capacity * DIM
        tl.store(own_keys + length * DIM + dims, new_key, mask=is_dim)
        tl.store(own_keys + own_part + length * DIM + dims, new_value, mask=is_dim)

        # The new token is taken from registers: other threads have not seen it written.
        largest = tl.sum(queries * new_key[None, :], axis=1)
        total = tl.zeros([PADDED_GROUP], dtype=tl.float32) + 1.0
        summed = tl.zeros([PADDED_GROUP, WIDE], dtype=tl.float32) + new_value[None, :]
        largest, total, summed = _add_part(
            queries, own_keys, own_keys + own_part, length, largest, total, summed, DIM, WIDE, BLOCK
        )
        slot = tl.load(slots + row)
        keys = prompts + (slot * KEY_HEADS + key_head) * prompt_capacity * DIM
        length = tl.load(prompt_lengths + row)
        largest, total, summed = _add_part(
            queries, keys, keys + prompt_part, length, largest, total, summed, DIM, WIDE, BLOCK
        )
        result = summed / total[:, None]
        offsets = row * (HEADS * DIM) + heads[:, None] * DIM + dims[None, :]
        tl.store(attended + offsets, result, mask=is_dim[None, :] & (members < group)[:, None])


def attends(*, num_heads: int, like: Tensor) -> bool:
    """Whether `attention_for` covers such a model.

    Args:
        num_heads: H.
        like: the cache's part of the rows' own positions.
    """
    if like.device.type != "cuda" or like.dtype != torch.float32:
        return False
    dim, key_heads = like.shape[-1], like.shape[3]
    return dim % 2 == 0 and _sizes(num_heads // key_heads, dim)[2] >= 1 and has_triton()


def attention_for(step: AttentionStep) -> LayerAttention:
    """What attends in each layer; see `decoding.attention_for`, whose formula it computes."""
    dim, heads, rows = step.own.shape[-1], step.num_heads, len(step.slots)
    key_heads = step.own.shape[3]
    padded_group, wide, block = _sizes(heads // key_heads, dim)

    def attend(layer: int, projected: Tensor) -> Tensor:
        projected = projected.contiguous()
        attended = torch.empty(rows, heads * dim, dtype=projected.dtype, device=projected.device)
        prompts, own = step.prompts[layer], step.own[layer]
        _attend[(rows, key_heads)](
            projected,
            prompts,
            own,
            step.slots,
            step.prompt_lengths,
            step.own_lengths,
            step.cos,
            step.sin,
            attended,
            prompts.stride(0),
            prompts.shape[3],
            own.stride(0),
            own.shape[3],
            dim**-0.5,
            HEADS=heads,
            KEY_HEADS=key_heads,
            PADDED_GROUP=padded_group,
            DIM=dim,
            WIDE=wide,
            BLOCK=block,
        )
        return attended

    return attend


def _sizes(group: int, dim: int) -> tuple[int, int, int]:
    """Query heads of a key head and the head size as powers of two, and positions of a block."""
    padded_group, wide = (1 << (number - 1).bit_length() for number in (group, dim))
    return padded_group, wide, min(_BLOCK, _MOST_NUMBERS // (padded_group * wide))
