"""Counted operations of a Llama-family model's rollouts and updates, gmpo's and TRL's.

A multiplication and an addition are two floating-point operations. Matrix products are counted,
attention's included, nothing else: not softmax, norms, activations or drawing. `FlopCounterMode`
counts the same in what really runs; tests hold the two equal.

A sequence attends to whole rectangles of keys, as the kernels are asked to; what a causal mask
leaves of them is counted in `needed_*` alone, which are lower bounds on any implementation's work.

Dimensions: **N** layers, **M** hidden, **I** feed-forward, **H** query heads, **K** key heads,
**D** head size, **V** vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Model:
    """What of a Llama-family model's shape decides its arithmetic."""

    layers: int
    hidden: int
    feed_forward: int
    query_heads: int
    key_heads: int
    head_size: int
    vocabulary: int

    @property
    def query_weights(self) -> int:
        """Of one layer's query projection, and of its output projection: M H D."""
        return self.hidden * self.query_heads * self.head_size

    @property
    def key_weights(self) -> int:
        """Of one layer's key projection, and of its value projection: M K D."""
        return self.hidden * self.key_heads * self.head_size

    @property
    def feed_forward_weights(self) -> int:
        """Of one layer's three feed-forward products: 3 M I."""
        return 3 * self.hidden * self.feed_forward

    @property
    def layer_weights(self) -> int:
        """In one layer's products: 2 M H D + 2 M K D + 3 M I."""
        return 2 * (self.query_weights + self.key_weights) + self.feed_forward_weights

    @property
    def head_weights(self) -> int:
        """In the output head: M V; tied to the embedding or not, it is multiplied by once."""
        return self.hidden * self.vocabulary

    @property
    def product_weights(self) -> int:
        """Weights that every token's forward pass multiplies by: N layers and the head."""
        return self.layers * self.layer_weights + self.head_weights


def model_of(config: Any) -> Model:
    """From a transformers configuration."""
    return Model(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        feed_forward=config.intermediate_size,
        query_heads=config.num_attention_heads,
        key_heads=config.num_key_value_heads,
        head_size=config.head_dim,
        vocabulary=config.vocab_size,
    )


def body(model: Model, tokens: int) -> int:
    """Projections and feed-forward through all layers: 2 N (2 M H D + 2 M K D + 3 M I) a token."""
    return 2 * model.layers * model.layer_weights * tokens


def attention(model: Model, pairs: int) -> int:
    """Scores and weighted sums of query-key pairs through all layers: 2 * 2 N H D each."""
    return 4 * model.layers * model.query_heads * model.head_size * pairs


def head(model: Model, positions: int) -> int:
    """Logits of `positions`, or one product of their gradient: 2 M V each."""
    return 2 * model.head_weights * positions


@dataclass(frozen=True, kw_only=True)
class Pass:
    """`rows` sequences of `width` tokens run together after `past` earlier positions each."""

    rows: int
    width: int
    past: int = 0

    @property
    def tokens(self) -> int:
        return self.rows * self.width

    @property
    def pairs(self) -> int:
        return self.tokens * (self.past + self.width)


def forward(model: Model, one: Pass) -> int:
    """A pass through all layers, without the head."""
    return body(model, one.tokens) + attention(model, one.pairs)


def backward(model: Model, one: Pass) -> int:
    """Of a whole pass: each product has two in its gradient."""
    return 2 * forward(model, one)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The sizes of one of gmpo's micro-batches.

    Attributes:
        tokens: that run through the layers, without padding; attention alone is padded.
        prompts: how many, each run once.
        prompt_width: tokens of the longest.
        shared: tokens that all prompts begin with, run once for all of them.
        rows: completions.
        completion_width: tokens of the longest.
        counted: completion tokens that are scored.
    """

    tokens: int
    prompts: int
    prompt_width: int
    shared: int
    rows: int
    completion_width: int
    counted: int

    @property
    def pairs(self) -> int:
        """Of attention, padding included."""
        return sum(one.pairs for one in self.generations())

    def generations(self) -> list[Pass]:
        """What attention looks at apart; a completion's last token predicts nothing that counts."""
        rest = Pass(rows=self.prompts, width=self.prompt_width - self.shared, past=self.shared)
        later = Pass(rows=self.rows, width=self.completion_width - 1, past=self.prompt_width)
        return [
            *([Pass(rows=1, width=self.shared)] if self.shared else []),
            rest,
            *([later] if later.width else []),
        ]


def gmpo_scores(model: Model, layout: Layout) -> int:
    """Log-probabilities alone: the old policy's, where the sampler's cannot stand for them."""
    return _layers(model, layout) + head(model, layout.counted)


def gmpo_gradient(model: Model, layout: Layout, *, kept: int) -> int:
    """Forward and backward over one micro-batch.

    The head makes three products, logits and two gradients, and forms logits again going backward
    that it did not keep.

    Args:
        model: that is updated.
        layout: of the micro-batch.
        kept: most positions whose logits are kept, as `gmpo.policy.head.most_positions_kept`.
    """
    again = max(0, layout.counted - kept)
    return 3 * (_layers(model, layout) + head(model, layout.counted)) + head(model, again)


def _layers(model: Model, layout: Layout) -> int:
    return body(model, layout.tokens) + attention(model, layout.pairs)


def trl_scores(model: Model, *, rows: int, width: int) -> int:
    """TRL's old log-probabilities: every row with its prompt, all padded, a logit row a position.

    On a CPU its fused head projects every position but the last, prompts and padding included.
    """
    return forward(model, Pass(rows=rows, width=width)) + head(model, rows * (width - 1))


def trl_gradient(model: Model, *, rows: int, width: int) -> int:
    """TRL's forward and backward over one step's rows, gradient checkpointing off.

    The head makes four products: logits, logits again, and two gradients.
    """
    one = Pass(rows=rows, width=width)
    return forward(model, one) + backward(model, one) + 4 * head(model, rows * (width - 1))


def gmpo_rollouts(
    model: Model,
    *,
    prefills: Sequence[tuple[Sequence[int], int]],
    completions: Sequence[Sequence[int]],
) -> int:
    """gmpo's sampler with room for all rows: prompts once, a finished row leaves at once.

    Args:
        model: that is sampled.
        prefills: prompts run together: their lengths, and how long their common beginning is.
        completions: lengths of each prompt's, in the order of the prompts; all start together.
    """
    total = 0
    for lengths, shared in prefills:
        rest = Pass(rows=len(lengths), width=max(lengths) - shared, past=shared)
        total += forward(model, rest) + head(model, len(lengths))
        if shared:
            total += forward(model, Pass(rows=1, width=shared))
    prompts = [length for lengths, _ in prefills for length in lengths]
    rows = [(p, t) for p, drawn in zip(prompts, completions, strict=True) for t in drawn]
    for step in range(1, max(t for _, t in rows)):
        alive = [p for p, t in rows if t > step]
        one = Pass(rows=len(alive), width=1, past=max(alive) + step - 1)
        total += forward(model, one) + head(model, len(alive))
    return total


def trl_rollouts(model: Model, *, rows: int, prompt_width: int, steps: int) -> int:
    """`model.generate` on padded rows: a prompt once a row, all rows run to the longest's end.

    Args:
        model: that is sampled.
        rows: prompts times group size.
        prompt_width: tokens of the longest prompt.
        steps: tokens of the longest completion.
    """
    total = forward(model, Pass(rows=rows, width=prompt_width)) + head(model, rows)
    for step in range(1, steps):
        one = Pass(rows=rows, width=1, past=prompt_width + step - 1)
        total += forward(model, one) + head(model, rows)
    return total


def causal_pairs(length: int, past: int = 0) -> int:
    """Query-key pairs of `length` tokens after `past` ones, each seeing itself and all before."""
    return length * past + length * (length + 1) // 2


def needed_gradient(
    model: Model,
    *,
    groups: Sequence[tuple[int, Sequence[int]]],
    shared: int,
) -> int:
    """Least work of one step's gradient: no padding, causal attention, every product once.

    With prompts' common beginning once a step, each prompt's rest once a group, every completion
    token but the last, and the head on scored tokens: 3 products each (forward and two gradients).

    Args:
        model: that is updated.
        groups: prompt length and completion lengths of each group with a gradient.
        shared: tokens that all those prompts begin with.
    """
    if not groups:
        return 0
    tokens, pairs, counted = shared, causal_pairs(shared), 0
    for prompt, completions in groups:
        tokens += prompt - shared
        pairs += causal_pairs(prompt - shared, shared)
        for length in completions:
            tokens += length - 1
            pairs += causal_pairs(length - 1, prompt)
            counted += length
    return 3 * (body(model, tokens) + attention(model, pairs) + head(model, counted))


def needed_decode(model: Model, *, rows: int, length: int) -> int:
    """Least work of one token a row, each after `length` others: layers, attention and head."""
    pairs = rows * (length + 1)
    return body(model, rows) + attention(model, pairs) + head(model, rows)


def decode_bytes(model: Model, *, rows: int, length: int, element: int) -> int:
    """Least traffic of one token a row: weights once, keys and values read, one position written.

    Logits are left out: a head that draws as it goes need not write them.
    """
    position = 2 * model.layers * model.key_heads * model.head_size * element
    return model.product_weights * element + rows * (length + 1) * position


def gradient_bytes(parameters: int, *, element: int) -> int:
    """Least traffic of a gradient: weights read forward and backward, gradients written as narrow.

    Activations are left out: how many are kept is the implementation's choice.
    """
    return parameters * 3 * element


def optimizer_bytes(parameters: int, *, element: int) -> int:
    """Least traffic of AdamW on fp32 weights.

    Weight and two moments are read and written, the gradient is read as the model computes; where
    that is less than fp32, the model's copy of the weight is written too.
    """
    return parameters * (6 * 4 + element + (element if element < 4 else 0))
