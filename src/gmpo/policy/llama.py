"""The Llama family's transformer body, over a `transformers` module's own parameters.

Llama, SmolLM, Mistral, Qwen2 and Qwen3 share one layer: RMS norm, rotary grouped-query attention,
gated SiLU feed-forward. Writing it here lets the caller decide where keys and values live: beside
a shared prompt with gradient (training) or in a preallocated cache (sampling).
`agreement.py` compares what is built of it with the module before anything relies on it.

Dimensions: **B** sequences, **T** tokens, **H** query heads, **K** key heads, **D** head size,
**M** hidden size, **V** vocabulary, **S** keys attended to.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from gmpo.errors import ModelError
from gmpo.policy.head import widened

__all__ = ["LlamaBody", "attend", "why_unsupported"]

_FAMILY = ("llama", "mistral", "qwen2", "qwen3")

_Rotary = tuple[Tensor, Tensor]
"""cos and sin, each [B, 1, T, D]."""


class LlamaBody:
    """Layer functions of one Llama-family model; holds references to its parameters, no copies.

    Attributes:
        recomputes_layers: whether a pass with gradient keeps only what goes into each layer and
            runs the layer again in the backward pass.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        reason = why_unsupported(model)
        if reason is not None:
            raise ModelError(f"the fast path does not cover this model: {reason}")
        self.model = model
        # Any: torch types a module's attributes as tensor or module, and these are known.
        self.layers: list[Any] = list(model.model.layers)
        config = model.config
        self.num_heads: int = config.num_attention_heads
        self.num_key_heads: int = config.num_key_value_heads
        self.head_dim: int = self.layers[0].self_attn.head_dim
        self.has_head_norms = config.model_type == "qwen3"
        self.recomputes_layers = False

    @property
    def head_weight(self) -> Float[Tensor, "V M"]:
        """The output head's weight (the embedding itself where the model ties them)."""
        weight: Tensor = self.model.lm_head.weight
        return weight

    def embed(self, token_ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T M"]:
        """Input embeddings: the beginning of the residual stream, which is fp32 or wider.

        Layers add to it what they compute in the model's precision, as autocast would.
        """
        return widened(self.model.model.embed_tokens(token_ids))

    def rotary(self, hidden: Float[Tensor, "B T M"], positions: Int[Tensor, "B T"]) -> _Rotary:
        """cos and sin of the given positions, by the model's own scaling rule."""
        precise = hidden[..., :0].to(self.model.dtype)  # only its precision and device are read
        cos, sin = self.model.model.rotary_emb(precise, positions)
        return cos[:, None], sin[:, None]

    def project(
        self, layer: Any, hidden: Float[Tensor, "B T M"], rotary: _Rotary
    ) -> tuple[Float[Tensor, "B H T D"], Float[Tensor, "B K T D"], Float[Tensor, "B K T D"]]:
        """Queries, keys and values of one layer, positions applied."""
        attention = layer.self_attn
        normed = self.attention_norm(layer, hidden)
        return self.heads(
            layer,
            attention.q_proj(normed),
            attention.k_proj(normed),
            attention.v_proj(normed),
            rotary=rotary,
        )

    def attention_norm(self, layer: Any, hidden: Float[Tensor, "*B M"]) -> Float[Tensor, "*B M"]:
        """What a layer's queries, keys and values are projected from."""
        return _rms_norm(hidden, layer.input_layernorm)

    def feed_forward_norm(self, layer: Any, hidden: Float[Tensor, "*B M"]) -> Float[Tensor, "*B M"]:
        """What a layer's feed-forward part takes."""
        return _rms_norm(hidden, layer.post_attention_layernorm)

    def heads(
        self,
        layer: Any,
        queries: Float[Tensor, "B T HD"],
        keys: Float[Tensor, "B T KD"],
        values: Float[Tensor, "B T KD"],
        *,
        rotary: _Rotary,
    ) -> tuple[Float[Tensor, "B H T D"], Float[Tensor, "B K T D"], Float[Tensor, "B K T D"]]:
        """Projected queries, keys and values cut into heads, positions applied."""
        attention = layer.self_attn
        batch, length = queries.shape[:2]
        queries = queries.view(batch, length, self.num_heads, self.head_dim)
        keys = keys.view(batch, length, self.num_key_heads, self.head_dim)
        values = values.view(batch, length, self.num_key_heads, self.head_dim)
        if self.has_head_norms:
            queries = _rms_norm(queries, attention.q_norm)
            keys = _rms_norm(keys, attention.k_norm)
        return (
            _rotate(queries.transpose(1, 2), rotary),
            _rotate(keys.transpose(1, 2), rotary),
            values.transpose(1, 2),
        )

    def normed_heads(self, layer: Any, heads: Float[Tensor, "N A D"]) -> Float[Tensor, "N A D"]:
        """All heads of a token (queries, keys, values), with the norms that Qwen3 has on two."""
        attention = layer.self_attn
        queries, keys, values = heads.split(
            [self.num_heads, self.num_key_heads, self.num_key_heads], dim=1
        )
        normed = (_rms_norm(queries, attention.q_norm), _rms_norm(keys, attention.k_norm), values)
        return torch.cat(normed, dim=1)

    def finish(
        self,
        layer: Any,
        hidden: Float[Tensor, "B T M"],
        attended: Float[Tensor, "B H T D"],
    ) -> Float[Tensor, "B T M"]:
        """The layer's output: attention and feed-forward added to the residual stream."""
        batch, length = hidden.shape[:2]
        merged = attended.transpose(1, 2).reshape(batch, length, self.num_heads * self.head_dim)
        hidden = hidden + layer.self_attn.o_proj(merged)
        normed = self.feed_forward_norm(layer, hidden)
        mlp = layer.mlp
        gated = functional.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed)
        output: Tensor = hidden + mlp.down_proj(gated)
        return output

    def final_norm(self, hidden: Float[Tensor, "*B M"]) -> Float[Tensor, "*B M"]:
        """The norm before the head."""
        return _rms_norm(hidden, self.model.model.norm)

    def logits(self, hidden: Float[Tensor, "*B M"]) -> Float[Tensor, "*B V"]:
        """fp32 (or fp64) logits of hidden states that have not passed the final norm."""
        return widened(self.model.lm_head(self.final_norm(hidden)))


_MASKS_AT_ONCE = 2**24
"""Most entries of a mask that are laid out for `attend` at a time: what a prefill of 2,048 tokens
takes with four query heads a key head."""


def attend(
    queries: Float[Tensor, "B H T D"],
    keys: Float[Tensor, "B K S D"],
    values: Float[Tensor, "B K S D"],
    *,
    mask: Bool[Tensor, "b 1 T S"],
) -> Float[Tensor, "B H T D"]:
    """Softmax attention where the mask is True; H / K query heads share each key head.

    The query heads of a key head are laid side by side along T, so keys are never copied per head.
    The mask is, and in the queries' precision besides: of a long prompt a part of the queries has
    its turn after the other.
    """
    batch, num_heads, length, head_dim = queries.shape
    num_key_heads = keys.shape[1]
    shared = num_heads // num_key_heads
    at_once = max(1, _MASKS_AT_ONCE // (len(mask) * shared * keys.shape[2]))
    if length > at_once:
        parts = zip(queries.split(at_once, dim=2), mask.split(at_once, dim=2), strict=True)
        return torch.cat([attend(some, keys, values, mask=of) for some, of in parts], dim=2)
    packed = queries.reshape(batch, num_key_heads, shared * length, head_dim)
    attended = functional.scaled_dot_product_attention(
        packed, keys, values, attn_mask=mask.repeat(1, 1, shared, 1)
    )
    return attended.reshape(batch, num_heads, length, head_dim)


def why_unsupported(model: PreTrainedModel) -> str | None:
    """Why `LlamaBody` does not cover a model, by its configuration alone; None if it does."""
    config = model.config
    if config.model_type not in _FAMILY:
        return f"model type {config.model_type!r} is not one of {', '.join(_FAMILY)}"
    if config.hidden_act != "silu":
        return f"activation {config.hidden_act!r} is not silu"
    if config.model_type != "llama" and config.sliding_window is not None:
        return f"sliding window of {config.sliding_window} tokens"
    if config.rope_parameters["rope_type"] not in ("default", "linear", "llama3", "yarn"):
        return f"rotary scaling {config.rope_parameters['rope_type']!r} depends on the length"
    return None


def _rms_norm(hidden: Tensor, norm: Any) -> Tensor:
    # The statistics are taken in fp32, as the transformers modules do.
    wide = widened(hidden)
    scaled = functional.rms_norm(wide, (wide.shape[-1],), eps=norm.variance_epsilon)
    weighted: Tensor = norm.weight * scaled.to(norm.weight.dtype)
    return weighted


def _rotate(states: Float[Tensor, "B H T D"], rotary: _Rotary) -> Float[Tensor, "B H T D"]:
    cos, sin = rotary
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin
