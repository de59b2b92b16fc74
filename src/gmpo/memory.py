"""Bytes that a causal language model's weights and updates take, by arithmetic.

What sampling takes is in `gmpo.sampling_memory`.

Dimensions: **M** hidden size, **F** feed-forward size, **H** query heads, **K** key heads,
**D** head size, **V** vocabulary, **S** prompt tokens, **T** completion tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "GIB",
    "MicroBatchSize",
    "ModelShape",
    "activation_bytes",
    "largest_micro_batch",
    "passing_bytes",
    "weight_bytes",
]

GIB = 2**30

_FLOAT = 4
_TILE_ROWS, _TILE_TOKENS = 512, 2048
"""Positions and vocabulary entries of the tiles in which the fast head forms logits on a CPU."""
_TILE_ELSEWHERE = 2048, 16384
"""The same on a GPU."""
_KEPT_LOGITS = 2**29
"""Bytes of logits that the head keeps on a CPU at most, as in policy/head.py."""
_PANEL, _PARTS, _QUERY_ROWS, _KEY_BLOCK = 32, 4, 128, 128
"""Of the compiled attention: positions of a panel, parts of its work, and sizes of its blocks."""
_ROWS_OF_A_SHAPE = 32
"""As in kernels/shapes.py, which this file must not import: it is read without torch."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a model, what of it is trained, and how it is run.

    Attributes:
        num_parameters: weights of the model itself, tied ones once.
        layers: transformer layers.
        hidden: M.
        feed_forward: F.
        heads: H.
        key_value_heads: K.
        head_size: D.
        vocabulary: V.
        has_head_norms: queries and keys are normed head by head, as in Qwen3.
        adapter_parameters: weights of the adapters, which alone are trained then; 0 without.
        adapter_rank: of the adapters.
        adapted: last parts of the names of the layers that have one.
        width: bytes of a number in forward and backward passes: 4 in fp32, 2 in bf16.
        attention_width: the same within attention, which the fast engine runs in fp32 on a CPU.
        runs_compiled: attention and the head are compiled functions, which pad and widen nothing.
        is_fast: prompts are run once for their completions, and logits exist in tiles.
        on_cpu: where the model runs.
        reorders_weights: decoding lays them out anew.
        recomputes_layers: layers keep their inputs and run again in the backward pass.
    """

    num_parameters: int
    layers: int
    hidden: int
    feed_forward: int
    heads: int
    key_value_heads: int
    head_size: int
    vocabulary: int
    has_head_norms: bool = False
    adapter_parameters: int = 0
    adapter_rank: int = 0
    adapted: frozenset[str] = frozenset()
    width: int
    attention_width: int
    runs_compiled: bool = False
    is_fast: bool
    on_cpu: bool
    reorders_weights: bool = False
    recomputes_layers: bool = False

    @property
    def key_value_bytes(self) -> int:
        """Of one position's keys and values in one layer."""
        return self._key_value_numbers * self.width

    @property
    def attended_bytes(self) -> int:
        """The same as attention reads them."""
        return self._key_value_numbers * self.attention_width

    @property
    def _key_value_numbers(self) -> int:
        return 2 * self.key_value_heads * self.head_size

    @property
    def trains_all(self) -> bool:
        """Whether the model's own weights are trained, and not adapters beside them."""
        return not self.adapter_parameters

    def trains_any(self, *layers: str) -> bool:
        """Whether a gradient of one of these layers needs the layer's inputs."""
        return self.trains_all or not self.adapted.isdisjoint(layers)


@dataclass(frozen=True, kw_only=True)
class MicroBatchSize:
    """Rows of T completion tokens after prompts of S tokens; lengths are the longest ones."""

    prompts: int
    rows: int
    prompt_tokens: int
    completion_tokens: int

    @property
    def num_later(self) -> int:
        """Tokens of a completion that are run: its last one predicts nothing."""
        return self.completion_tokens - 1

    @property
    def num_run(self) -> int:
        """Tokens that are run, each prompt once."""
        return self.prompts * self.prompt_tokens + self.rows * self.num_later

    @property
    def num_seen(self) -> int:
        """Positions that a row attends to, its own included."""
        return self.prompt_tokens + self.num_later


def largest_micro_batch(
    *,
    max_tokens: int,
    group_size: int,
    groups: int,
    prompt_tokens: int,
    completion_tokens: int,
    shares_prompts: bool,
) -> MicroBatchSize:
    """What a step of whole groups is cut into at most, if every completion runs to its limit.

    Args:
        max_tokens: budget of a micro-batch, padding included; one row may exceed it.
        group_size: rows that share a prompt.
        groups: of the step.
        prompt_tokens: of the longest prompt.
        completion_tokens: of the longest completion.
        shares_prompts: whether a prompt counts once for all its rows.
    """

    def fits(rows: int) -> bool:
        prompts = -(-rows // group_size) if shares_prompts else rows
        return prompts * prompt_tokens + rows * completion_tokens <= max_tokens

    rows, most = 1, max(1, min(groups * group_size, max_tokens // completion_tokens))
    while rows < most:  # by halving: there may be millions
        middle = (rows + most + 1) // 2
        if fits(middle):
            rows = middle
        else:
            most = middle - 1
    return MicroBatchSize(
        prompts=-(-rows // group_size),
        rows=rows,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
    )


def weight_bytes(
    shape: ModelShape,
    *,
    has_reference: bool,
    keeps_second_gradient: bool,
    has_narrow_gradients: bool = False,
) -> int:
    """Weights, of the trained ones gradients and AdamW's two moments, and what some recipes add.

    Args:
        shape: of the model; trained weights are fp32, and below fp32 have a compute copy besides.
            Under adapters the model's own weights are frozen, in the compute precision.
        has_reference: a frozen copy of the starting model serves a KL term; adapters need none,
            because what is under them is the starting model.
        keeps_second_gradient: two gradients are compared.
        has_narrow_gradients: steps are taken from gradients in the compute precision; without,
            gradients are fp32.
    """
    per_trained = 3 * _FLOAT + (shape.width if shape.width < _FLOAT else 0)
    per_trained += shape.width if has_narrow_gradients else _FLOAT
    per_trained += _FLOAT if keeps_second_gradient else 0
    if shape.trains_all:
        return shape.num_parameters * (per_trained + shape.width * has_reference)
    return shape.num_parameters * shape.width + shape.adapter_parameters * per_trained


def activation_bytes(shape: ModelShape, size: MicroBatchSize) -> int:
    """What layers keep of a micro-batch between its forward and its backward pass.

    Layers that run again keep nothing but their inputs; of others see `_layer_bytes`. All of them
    share the masks.
    """
    if not shape.is_fast:
        tokens = size.rows * (size.prompt_tokens + size.completion_tokens)
        if shape.recomputes_layers:
            return shape.layers * tokens * shape.hidden * shape.width
        return shape.layers * tokens * _plain_token_bytes(shape)
    if shape.recomputes_layers:
        layer = _num_run(shape, size) * shape.hidden * _stream_width(shape)
    else:
        layer = _layer_bytes(shape, size)
    return shape.layers * layer + _mask_bytes(shape, size)


def passing_bytes(shape: ModelShape, size: MicroBatchSize) -> int:
    """The most that exists for a moment beside all that is kept: around the head, or in a layer.

    Fast: the head's gradient stays until the embedding's is there, so where layers run again it is
    beside what one of them keeps, with the gradients that pass through its feed-forward part.
    Plain: logits at every position with their gradient, and six tables at the counted ones.
    """
    scored = size.rows * size.completion_tokens
    if not shape.is_fast:
        tokens = size.rows * (size.prompt_tokens + size.completion_tokens)
        head = shape.vocabulary * (2 * tokens * shape.width + 6 * scored * _FLOAT)
        again = tokens * (_plain_token_bytes(shape) + _gradient_bytes(shape))
        return max(head, again) if shape.recomputes_layers else head
    gradient = shape.vocabulary * shape.hidden * shape.width if shape.trains_all else 0
    head = max(
        _head_bytes(shape, scored, gradient=gradient), gradient + _attending_bytes(shape, size)
    )
    if not shape.recomputes_layers:
        return head
    # Attention's turn comes when the gate and the other half of the feed-forward part are let go.
    let_go = _num_run(shape, size) * 2 * shape.feed_forward * shape.width
    again = _num_run(shape, size) * _gradient_bytes(shape)
    again = _layer_bytes(shape, size) + max(again, _attending_bytes(shape, size) - let_go)
    return max(head, gradient + again)


def _attending_bytes(shape: ModelShape, size: MicroBatchSize) -> int:
    """What the compiled attention works on in its backward pass, on one thread.

    Keys and values in fp32 by rows and by panels, sums of their gradients, those of prompts once
    for each part of the work, one block of queries with its scores, and the heads' gradients.
    """
    if not shape.runs_compiled:
        return 0
    shared = size.prompts * _whole(size.prompt_tokens, _PANEL)
    positions = shared + size.rows * _whole(size.num_later, _PANEL)
    positions += _whole(_num_run(shape, size) - size.num_run, _PANEL)
    wide = _whole(shape.head_size, _PANEL)
    group = shape.heads // shape.key_value_heads
    longest = max(size.prompt_tokens, size.num_later)
    queries = min(_QUERY_ROWS, longest * group)
    tables = shape.key_value_heads * wide * (6 * positions + 2 * (_PARTS - 1) * shared)
    heads = shape.heads * shape.head_size * shape.width + shape.key_value_bytes
    return (tables + queries * (3 * wide + 2 * _KEY_BLOCK)) * _FLOAT + _num_run(shape, size) * heads


def _num_run(shape: ModelShape, size: MicroBatchSize) -> int:
    """Tokens of the table: in bf16, compiled, it is filled up to a whole number of 32."""
    return _filled(shape, size.num_run)


def _filled(shape: ModelShape, rows: int) -> int:
    is_filled = shape.runs_compiled and shape.width < _FLOAT
    return _whole(rows, _ROWS_OF_A_SHAPE) if is_filled else rows


def _whole(count: int, step: int) -> int:
    return -(-count // step) * step


def _positions_kept(shape: ModelShape, scored: int) -> int:
    """Positions whose logits the head keeps from its forward to its backward pass."""
    if not (shape.is_fast and shape.on_cpu) or shape.recomputes_layers:
        return 0
    tile = _TILE_ROWS * shape.vocabulary * shape.width
    return min(scored, _KEPT_LOGITS // tile * _TILE_ROWS)


def _head_bytes(shape: ModelShape, scored: int, *, gradient: int) -> int:
    """Of logits those that are kept, and of a tile two fp32 tables and one as they are computed.

    Compiled functions widen no table below fp32: there are logits and, for the head's gradient, a
    transposed copy. Where all logits are kept, those of the tile are among them. The backward pass
    has the head's gradient besides, and the hidden states' in fp32 and in the compute precision.
    """
    narrow = shape.width if shape.width < _FLOAT else 0
    scored = _filled(shape, scored)
    kept = _positions_kept(shape, scored)
    if kept < scored:
        held = 2 * narrow if shape.runs_compiled and narrow else 2 * _FLOAT + narrow
    elif shape.runs_compiled:
        held = narrow if gradient else 0
    else:
        held = 2 * _FLOAT + narrow - shape.width
    rows, tokens = (_TILE_ROWS, _TILE_TOKENS) if shape.on_cpu else _TILE_ELSEWHERE
    tile = min(rows, scored) * min(tokens, shape.vocabulary) * held
    kept *= shape.vocabulary * shape.width
    return kept + tile + scored * shape.hidden * (_FLOAT + narrow) + gradient


def _layer_bytes(shape: ModelShape, size: MicroBatchSize) -> int:
    """What one layer of the fast engine keeps for its backward pass.

    Of a token `_token_bytes`, and of a row keys and values of all that it attends to. Prompts
    attend to those of the table of all tokens, unless attention has a precision of its own. The
    compiled attention keeps those of the table alone.
    """
    if shape.runs_compiled:
        return _num_run(shape, size) * (_token_bytes(shape) + shape.key_value_bytes)
    attended = size.rows * size.num_seen * (size.num_later > 0) + (
        _num_run(shape, size)
        if shape.attention_width == shape.width
        else size.prompts * size.prompt_tokens
    )
    return _num_run(shape, size) * _token_bytes(shape) + attended * shape.attended_bytes


def _mask_bytes(shape: ModelShape, size: MicroBatchSize) -> int:
    """Of prompts and of completions, as numbers, for all query heads of a key head."""
    if shape.runs_compiled:  # no masks; cosines and sines of positions instead
        return _num_run(shape, size) * 2 * shape.head_size * shape.width
    seen = size.rows * size.num_later * size.num_seen + size.prompts * size.prompt_tokens**2
    return shape.heads // shape.key_value_heads * seen * shape.attention_width


def _token_bytes(shape: ModelShape) -> int:
    """What a layer of the fast engine keeps of a token, besides its keys and values.

    The layer's input, attention's output, the stream between its halves, gate and the other half of
    the feed-forward part, and a statistic of each norm; with adapters no more. Attention keeps
    queries, its output and a statistic per head.
    """
    attention = shape.heads * shape.head_size
    numbers = attention + 2 * shape.feed_forward
    wide = 2 + shape.heads
    if shape.has_head_norms:
        normed_heads = shape.heads + shape.key_value_heads
        numbers += normed_heads * shape.head_size
        wide += normed_heads
    stream = 2 * shape.hidden * _stream_width(shape)
    return stream + numbers * shape.width + _attention_bytes(shape) + wide * _FLOAT


def _attention_bytes(shape: ModelShape) -> int:
    """Of a token's queries and of what they attended to, as attention keeps them."""
    attention = shape.heads * shape.head_size
    if shape.runs_compiled:  # the output is that which the layer keeps
        return attention * shape.width
    return 2 * attention * shape.attention_width


def _stream_width(shape: ModelShape) -> int:
    """Bytes of a number of the residual stream, which is fp32 or wider."""
    return max(shape.width, _FLOAT)


def _operation_bytes(shape: ModelShape) -> int:
    """The same of the plain engine, whose operations each keep what their own backward pass needs.

    Both norms their inputs, in fp32 because they are taken in it, and a statistic each; their
    outputs before the weight is applied, if that is trained, and after it, if a layer behind them
    is; queries, attention's output and a statistic a head; the output in the order of tokens if the
    output projection is trained; of the feed-forward part the gate before and after its activation,
    the other half, and their product if the last projection is trained; adapters' narrow outputs.
    """
    attention = shape.heads * shape.head_size
    normed = 2 * shape.trains_all
    normed += shape.trains_any("q_proj", "k_proj", "v_proj")
    normed += shape.trains_any("gate_proj", "up_proj")
    numbers = (
        normed * shape.hidden
        + shape.trains_any("o_proj") * attention
        + (3 + shape.trains_any("down_proj")) * shape.feed_forward
        + shape.adapter_rank * len(shape.adapted)
    )
    wide = 2 * shape.hidden + shape.heads + 2
    if shape.has_head_norms:
        normed_heads = shape.heads + shape.key_value_heads
        wide += normed_heads * (shape.head_size + 1)
        numbers += normed_heads * shape.head_size * shape.trains_all
    return numbers * shape.width + _attention_bytes(shape) + wide * _FLOAT


def _plain_token_bytes(shape: ModelShape) -> int:
    """Heads that share keys hold copies of keys and values; masks are the module's own."""
    return _operation_bytes(shape) + 2 * shape.heads * shape.head_size * shape.width


def _gradient_bytes(shape: ModelShape) -> int:
    """Gradients that exist at once of a token, as they pass through a layer's feed-forward part.

    Those of its norm are fp32, as the norm is.
    """
    return 3 * shape.feed_forward * shape.width + 2 * shape.hidden * _FLOAT
