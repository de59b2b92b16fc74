"""Bytes that sampling takes, and the rollouts that it leaves, by arithmetic."""

from __future__ import annotations

from gmpo.memory import ModelShape

__all__ = ["cache_bytes", "rollout_bytes", "sampling_bytes"]

_FLOAT = 4
_CACHE_STEP = 32
"""Positions by which the sampler's cache grows; on a GPU they are a power of two times as many."""
_PREFILL_TOKENS = 2048
"""Prompt tokens that the sampler runs at once."""
_MASKS_AT_ONCE = 2**24
"""Entries of a mask that a prefill lays out at once, as in policy/llama.py."""
_ROLLOUT, _KEPT_TOKEN = 2500, 17
"""Of a rollout in Python (Linux, CPython 3.11, as its round is saved), and of each of its tokens:
id, mask and log-probability, and four letters of text."""
_TRAINED_TOKEN = 27
"""Of a token in its step's tensors: id, mask, three log-probabilities, log-ratio, what was cut."""


def cache_bytes(
    shape: ModelShape,
    *,
    prompts: int,
    rows: int,
    prompt_positions: int,
    completion_positions: int,
) -> int:
    """Keys and values that the sampler keeps between rounds.

    Fast: those of each prompt once and of each row's own tokens, in fp32. Plain: those of whole
    rows, in the compute precision.

    Args:
        shape: of the model.
        prompts: different ones that run at once; room is made for a power of two of them.
        rows: that run at once; on a GPU room is made for a power of two of them.
        prompt_positions: tokens of the longest prompt.
        completion_positions: tokens of the longest completion.
    """
    if not shape.is_fast:
        positions = prompt_positions + completion_positions
        return rows * positions * shape.key_value_bytes * shape.layers
    rows = rows if shape.on_cpu else _power_of_two(rows)
    slots = min(rows, _power_of_two(prompts))
    in_prompts, own = (
        _CACHE_STEP * (steps if shape.on_cpu else _power_of_two(steps))
        for steps in (
            -(-positions // _CACHE_STEP) for positions in (prompt_positions, completion_positions)
        )
    )
    wide = 2 * shape.key_value_heads * shape.head_size * _FLOAT
    return (slots * in_prompts + rows * own) * wide * shape.layers


def sampling_bytes(shape: ModelShape, *, rows: int, prompt_tokens: int) -> int:
    """What sampling takes beside the cache while rows run: prefilled prompts, logits, weights.

    On a CPU weights are laid out anew where no adapter is beside them. Keys and values of prompts
    with a common beginning exist once in two parts and once joined. Logits exist once as they came
    and once joined with those of new rows, in fp32 if not wider, and elsewhere in fp32 besides.
    """
    tokens = max(_PREFILL_TOKENS, prompt_tokens)
    wide = max(_FLOAT, shape.width)
    logits = rows * shape.vocabulary * (shape.width + wide + (not shape.on_cpu) * _FLOAT)
    prefill = 2 * tokens * shape.key_value_bytes * shape.layers
    masks = _prefill_mask_bytes(shape, tokens * prompt_tokens)
    return prefill + masks + logits + _prepared_bytes(shape)


def rollout_bytes(rollouts: int, *, completion_tokens: int, on_cpu: bool) -> int:
    """What a round's rollouts and the tensors of its steps take, from sampling to the last step.

    Args:
        rollouts: of the round.
        completion_tokens: of each.
        on_cpu: where the model runs; elsewhere only the tensors lie beside it.
    """
    tensors = completion_tokens * _TRAINED_TOKEN
    return rollouts * (tensors + on_cpu * (_ROLLOUT + completion_tokens * _KEPT_TOKEN))


def _prefill_mask_bytes(shape: ModelShape, seen: int) -> int:
    """What each token may see, for each of a key head's query heads, and that in the precision."""
    if not shape.is_fast:
        return 0
    shared = shape.heads // shape.key_value_heads
    return seen + min(shared * seen, _MASKS_AT_ONCE) * (1 + shape.width)


def _prepared_bytes(shape: ModelShape) -> int:
    """Of linear layers and the head in the order in which decoding reads them."""
    if not shape.reorders_weights:
        return 0
    queries = shape.heads * shape.head_size
    keys = 2 * shape.key_value_heads * shape.head_size
    # What has a common input is laid out as one.
    together = {
        ("q_proj", "k_proj", "v_proj"): queries + keys,
        ("o_proj",): queries,
        ("gate_proj", "up_proj"): 2 * shape.feed_forward,
        ("down_proj",): shape.feed_forward,
    }
    outputs = sum(size for names, size in together.items() if shape.adapted.isdisjoint(names))
    return (shape.layers * outputs + shape.vocabulary) * shape.hidden * shape.width


def _power_of_two(number: int) -> int:
    """The least that is no less."""
    return 1 << (number - 1).bit_length()
