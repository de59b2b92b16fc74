"""Prompts run with the weights that were reordered for decoding.

Dimensions: **B** sequences, **T** tokens, **S** positions of the past, **M** hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gmpo.policy.llama import LlamaBody, attend
from gmpo.policy.prefix import LayerRun
from gmpo.sampler.prepared import PreparedBody

__all__ = ["prepared_layer_run"]


def prepared_layer_run(body: LlamaBody, prepared: PreparedBody) -> LayerRun:
    """What `extend` and `run_prompts` call for each layer, over these linear layers."""
    # A layer is known by itself: modules are hashed by identity.
    linear_of = dict(zip(body.layers, prepared.layers, strict=True))
    key_size = body.num_key_heads * body.head_dim
    sizes = [body.num_heads * body.head_dim, key_size, key_size]

    def run(
        body: LlamaBody,
        layer: Any,
        hidden: Float[Tensor, "B T M"],
        rotary: tuple[Tensor, Tensor],
        mask: Bool[Tensor, "b 1 T S"],
        before: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        linear, shape = linear_of[layer], hidden.shape[:2]
        stream = hidden.flatten(0, 1)
        projected = linear.query_key_value(body.attention_norm(layer, stream)).unflatten(0, shape)
        queries, keys, values = body.heads(
            layer, *(part.contiguous() for part in projected.split(sizes, dim=-1)), rotary=rotary
        )
        all_keys, all_values = keys, values
        if before is not None:
            all_keys = torch.cat((before[0], keys), dim=2)
            all_values = torch.cat((before[1], values), dim=2)
        attended = attend(queries, all_keys, all_values, mask=mask)
        stream = stream + linear.output(attended.transpose(1, 2).reshape(len(stream), -1))
        stream = stream + linear.down(linear.gated(body.feed_forward_norm(layer, stream)))
        return stream.unflatten(0, shape), keys, values

    return run
