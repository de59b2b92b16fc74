"""One token of every row through the layers of the Llama family, whatever attends.

Dimensions: **R** rows, **M** hidden size, **V** vocabulary.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from gmpo.kernels.decoding import LayerAttention, add_norm
from gmpo.policy.llama import LlamaBody
from gmpo.sampler.prepared import PreparedBody

__all__ = ["step_logits"]


def step_logits(
    body: LlamaBody, linear: PreparedBody, token_ids: Int[Tensor, " R"], attend: LayerAttention
) -> Float[Tensor, "R V"]:
    """Logits of each row's next token, in the model's precision."""
    layers = body.layers
    # The residual stream, this step's own: what layers compute is added in place.
    hidden = body.embed(token_ids[:, None])[:, 0]
    next_norms = [*(layer.input_layernorm for layer in layers[1:]), body.model.model.norm]
    normed = _add_and_norm(hidden, None, layers[0].input_layernorm)
    for number, (layer, parts) in enumerate(zip(layers, linear.layers, strict=True)):
        attended = attend(number, parts.query_key_value(normed))
        normed = _add_and_norm(hidden, parts.output(attended), layer.post_attention_layernorm)
        normed = _add_and_norm(hidden, parts.down(parts.gated(normed)), next_norms[number])
    return linear.head(normed)


def _add_and_norm(
    hidden: Float[Tensor, "R M"], added: Float[Tensor, "R M"] | None, norm: Any
) -> Float[Tensor, "R M"]:
    return add_norm(hidden, added, norm.weight, eps=norm.variance_epsilon)
