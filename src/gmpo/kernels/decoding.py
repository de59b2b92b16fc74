"""What a decoding step does beside matrix products, as compiled functions.

On a GPU `add_norm` runs Triton's kernel, and torch's operations where there is neither. `attends`
tells whether there is a compiled function for attention: torch's operations take other tables,
which the sampler's cache makes.
The formulas stand in `norms.h` and `decoding.h`.

Dimensions: **R** rows, **H** query heads, **K** key heads, **D** head size, **M** hidden size,
**N** rows or slots of a part, **C** positions that it has room for.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from gmpo.kernels import triton_norm
from gmpo.kernels.calls import address, kernel

__all__ = ["AttentionStep", "LayerAttention", "add_norm", "attends", "attention_for"]

_MAX_DIM = 256
"""The largest head, as in decoding.h."""

LayerAttention = Callable[[int, Float[Tensor, "R O"]], Float[Tensor, "R HD"]]
"""Of a layer's number and its projected queries, keys and values, side by side."""


@dataclass(frozen=True, kw_only=True)
class AttentionStep:
    """What all layers of one step have in common.

    Attributes:
        prompts: keys and values of the prompts that rows follow.
        own: of the rows' own positions, with room for one more a row; written to.
        slots: the prompt that each row follows.
        prompt_lengths: of each row's prompt.
        own_lengths: of each row's own part, the new token left out; below C.
        cos: of the new tokens' positions.
        sin: the same, the first half of D negated.
        num_heads: H.
    """

    prompts: Float[Tensor, "L 2 N K C D"]
    own: Float[Tensor, "L 2 n K c D"]
    slots: Int[Tensor, " R"]
    prompt_lengths: Int[Tensor, " R"]
    own_lengths: Int[Tensor, " R"]
    cos: Float[Tensor, "R D"]
    sin: Float[Tensor, "R D"]
    num_heads: int


class _Step(ctypes.Structure):
    """`attention_step` of decoding.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("slots", "prompt_lengths", "own_lengths")),
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "scores")),
        *((name, ctypes.c_int64) for name in ("rows", "heads", "key_heads", "dim", "positions")),
        *((name, ctypes.c_int64) for name in ("prompt_slots", "prompt_capacity")),
        *((name, ctypes.c_int64) for name in ("own_rows", "own_capacity")),
    ]


def attends(dim: int, *, dtype: torch.dtype, like: Tensor) -> bool:
    """Whether `attention_for` covers heads of this size.

    Args:
        dim: of a head.
        dtype: the model's.
        like: a tensor in the cache's precision, where the cache lies.
    """
    is_covered = like.dtype == torch.float32 and dim % 2 == 0 and dim <= _MAX_DIM
    return is_covered and _attend_function(dtype, like) is not None


def attention_for(step: AttentionStep, *, dtype: torch.dtype) -> LayerAttention:
    """What attends in each layer of a step that `attends` covers.

    It turns queries and keys to their positions, writes the new keys and values into `own`, and
    gives with q of row r and key head k, over the keys of its prompt and its own,
    sum_s softmax_s(q . key_s / sqrt(D)) value_s.

    Args:
        step: its tensors of numbers in fp32.
        dtype: of what is projected and of what comes back.
    """
    dim, heads, rows = step.own.shape[-1], step.num_heads, len(step.slots)
    run = _attend_function(dtype, step.own)
    assert run is not None, "`attends` must be asked first"
    positions = int((step.prompt_lengths + step.own_lengths).max()) + 1
    scores = step.own.new_empty(rows, heads, positions)
    common = _Step(
        *map(address, (step.slots, step.prompt_lengths, step.own_lengths)),
        *map(address, (step.cos, step.sin, scores)),
        *(rows, heads, step.own.shape[3], dim, positions),
        *(step.prompts.shape[2], step.prompts.shape[4], step.own.shape[2], step.own.shape[4]),
    )
    common_address = ctypes.addressof(common)
    first_prompts, first_own = address(step.prompts), address(step.own)
    assert first_prompts is not None and first_own is not None
    by_prompts, by_own = (4 * part.stride(0) for part in (step.prompts, step.own))

    def attend(layer: int, projected: Tensor) -> Tensor:
        # The names keep the memory that addresses were taken of.
        assert common is not None and scores is not None and step is not None
        projected = projected.contiguous()
        assert projected.dtype == dtype, "a projection has another precision than the model"
        attended = projected.new_empty(rows, heads * dim)
        run(
            common_address,
            projected.data_ptr(),
            first_prompts + layer * by_prompts,
            first_own + layer * by_own,
            attended.data_ptr(),
        )
        return attended

    return attend


def _attend_function(dtype: torch.dtype, like: Tensor) -> Callable[..., None] | None:
    return kernel("attend_step", "ppppp", like.new_empty(0, dtype=dtype))


def add_norm(
    stream: Float[Tensor, "R M"],
    added: Float[Tensor, "R M"] | None,
    weight: Float[Tensor, " M"],
    *,
    eps: float,
) -> Float[Tensor, "R M"]:
    """Add to the stream in place, and its RMS norm in the weight's precision.

    Args:
        stream: fp32 or wider.
        added: None adds nothing.
        weight: of the norm.
        eps: added to the mean square.
    """
    if triton_norm.adds_norm(stream, added, weight):
        return triton_norm.add_norm(stream, added, weight, eps=eps)
    run = kernel("add_norm", "pppppiif", weight)
    is_mixed = stream.dtype != torch.float32 or (added is not None and added.dtype != weight.dtype)
    if run is None or is_mixed or not stream.is_contiguous():
        if added is not None:
            stream += added
        scaled = functional.rms_norm(stream, (stream.shape[-1],), eps=eps)
        return weight * scaled.to(weight.dtype)
    added = None if added is None else added.contiguous()
    normed = torch.empty_like(stream, dtype=weight.dtype)
    run(
        stream.data_ptr(),
        address(added),
        address(weight),
        normed.data_ptr(),
        None,
        *stream.shape,
        eps,
    )
    return normed
