"""Parts of a Llama layer with backward passes written by hand, for training all weights.

Autograd keeps the input of every operation: of a layer about nine tables as wide as the hidden
size and four as wide as the feed-forward part. Here a layer keeps its input, attention's output,
the stream between its halves, and the gate and the other half before they are joined; norms and
the joined half are computed again in the backward pass, which costs little beside the products.
The forward pass rounds where `LlamaBody` does, so it gives the same numbers to rounding.

Notation: x input, w weight, g gradient of the output; products over features are sums over i.

    RMS norm       y_i = w_i r x_i,  r = (mean_i x_i^2 + eps)^-1/2
                   dw_i = sum over tokens of g_i x_i r
                   dx_i = r g_i w_i - x_i r^3 mean_j(g_j w_j x_j)
    linear         y = x W^T:  dW = g^T x,  dx = g W
    gated SiLU     y = silu(a) b:  db = g silu(a),  da = g b silu'(a)
    rotation       y = x cos + R x sin with R (first, second) = (-second, first); R^T = -R, and
                   sin is the same in both halves:  dx = g cos - R g sin

Dimensions: **N** tokens, **M** hidden size, **F** feed-forward size, **A** heads, **D** head size,
**R** rows, **W** tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from gmpo.kernels.training import (
    gated,
    gated_gradients,
    norm_again,
    norm_gradients,
    stream_sum,
    sum_norm,
    weight_gradient,
)
from gmpo.policy.head import widened

__all__ = ["feed_forward", "gathered_rows", "is_covered", "project", "rms_norm", "rotate"]


def is_covered(layer: Any) -> bool:
    """Whether a layer's weights are all trained, without adapters and without rare biases."""
    attention, mlp = layer.self_attn, layer.mlp
    with_bias = (attention.q_proj, attention.k_proj, attention.v_proj)
    without = (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    return (
        all(type(module) is nn.Linear for module in (*with_bias, *without))
        and all(module.bias is None for module in without)
        and len({weight.requires_grad for weight in layer.parameters()}) == 1
    )


def rms_norm(
    hidden: Float[Tensor, "*N M"], weight: Float[Tensor, " M"], *, eps: float
) -> Float[Tensor, "*N M"]:
    """The norm of each token, with statistics in fp32 or wider."""
    return cast(Tensor, _RmsNorm.apply(hidden, weight, eps))  # type: ignore[no-untyped-call]


def project(
    hidden: Float[Tensor, "N M"], norm: Any, linears: Sequence[nn.Linear]
) -> tuple[Float[Tensor, "N O"], ...]:
    """The tokens themselves and several linear layers, with or without bias, over their norm.

    What goes on with the first result instead of `hidden` has its gradient added where the norm's
    is formed, and not in a pass of its own.
    """
    return cast(
        tuple[Tensor, ...],
        _Project.apply(  # type: ignore[no-untyped-call]
            hidden,
            norm.weight,
            norm.variance_epsilon,
            *(linear.weight for linear in linears),
            *(linear.bias for linear in linears),
        ),
    )


def feed_forward(
    hidden: Float[Tensor, "N M"], attended: Float[Tensor, "N AD"], layer: Any
) -> Float[Tensor, "N M"]:
    """A layer's output from its input and what its heads attended to."""
    norm, mlp = layer.post_attention_layernorm, layer.mlp
    weights = (layer.self_attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    return cast(
        Tensor,
        _FeedForward.apply(  # type: ignore[no-untyped-call]
            hidden,
            attended,
            norm.weight,
            norm.variance_epsilon,
            *(linear.weight for linear in weights),
        ),
    )


def rotate(
    states: Float[Tensor, "N A D"], cos: Float[Tensor, "N 1 D"], sin: Float[Tensor, "N 1 D"]
) -> Float[Tensor, "N A D"]:
    """Rotary positions applied to every head of each token."""
    return cast(Tensor, _Rotate.apply(states, cos, sin))  # type: ignore[no-untyped-call]


def gathered_rows(
    tokens: Float[Tensor, "N O"], padded: Int[Tensor, "R W"], real: Int[Tensor, " N"]
) -> Float[Tensor, "R W O"]:
    """Tokens that lie end to end as rows, padded on the right.

    Args:
        tokens: of all rows.
        padded: which token stands in each place; in padding any, whose gradient is dropped.
        real: places of the tokens in the flattened table.
    """
    if padded.numel() == len(tokens):
        return tokens.view(*padded.shape, -1)
    return cast(
        Tensor,
        _GatheredRows.apply(tokens, padded, real),  # type: ignore[no-untyped-call]
    )


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        _, normed, scale = sum_norm(widened(hidden), None, weight, eps=eps)
        ctx.save_for_backward(hidden, weight, scale)
        return normed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, scale = ctx.saved_tensors
        by_hidden, _, by_weight = norm_gradients(gradients[0], widened(hidden), weight, scale)
        return by_hidden.to(hidden.dtype), by_weight, None


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, norm_weight: Tensor, eps: float, *layers: Tensor | None
    ) -> tuple[Tensor, ...]:
        count = len(layers) // 2
        _, normed, scale = sum_norm(widened(hidden), None, norm_weight, eps=eps)
        ctx.save_for_backward(hidden, norm_weight, scale, *layers[:count])
        ctx.has_bias = [bias is not None for bias in layers[count:]]
        projected = (
            functional.linear(normed, cast(Tensor, weight), bias)
            for weight, bias in zip(layers[:count], layers[count:], strict=True)
        )
        return hidden, *projected

    @staticmethod
    def backward(ctx: Any, residual: Tensor, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, norm_weight, scale, *weights = ctx.saved_tensors
        normed = norm_again(widened(hidden), norm_weight, scale)
        by_normed = _input_gradient(gradients, weights)
        by_weights = [weight_gradient(gradient, normed) for gradient in gradients]
        by_biases = [
            gradient.sum(0) if has_bias else None
            for gradient, has_bias in zip(gradients, ctx.has_bias, strict=True)
        ]
        by_hidden, _, by_norm = norm_gradients(
            by_normed, widened(hidden), norm_weight, scale, residual=residual
        )
        return by_hidden.to(hidden.dtype), by_norm, None, *by_weights, *by_biases


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        attended: Tensor,
        norm_weight: Tensor,
        eps: float,
        *weights: Tensor,
    ) -> Tensor:
        output, gate, up, down = weights
        stream, normed, scale = sum_norm(hidden, attended @ output.t(), norm_weight, eps=eps)
        gate_states, up_states = normed @ gate.t(), normed @ up.t()
        del normed
        ctx.save_for_backward(
            attended, stream, scale, gate_states, up_states, norm_weight, *weights
        )
        return stream_sum(stream, gated(gate_states, up_states) @ down.t())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        attended, stream, scale, gate_states, up_states, norm_weight, *weights = ctx.saved_tensors
        output, gate, up, down = weights
        # Products are taken in the weights' precision; only the stream is wider.
        narrow = gradient.to(attended.dtype)
        by_gate, by_up, joined = gated_gradients(narrow @ down, gate_states, up_states)
        by_down = weight_gradient(narrow, joined)
        normed = norm_again(stream, norm_weight, scale)
        by_gate_weight, by_up_weight = (weight_gradient(g, normed) for g in (by_gate, by_up))
        by_normed = _input_gradient((by_gate, by_up), (gate, up))
        del by_gate, by_up, joined, normed
        by_stream, narrow, by_norm = norm_gradients(
            by_normed, stream, norm_weight, scale, residual=gradient
        )
        by_output = weight_gradient(narrow, attended)
        by_weights = (by_output, by_gate_weight, by_up_weight, by_down)
        return by_stream, narrow @ output, by_norm, None, *by_weights


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(states, cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotated(gradients[0], cos, -sin), None, None


class _GatheredRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, padded: Tensor, real: Tensor) -> Tensor:
        ctx.save_for_backward(real)
        return tokens.index_select(0, padded.flatten()).view(*padded.shape, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (real,) = ctx.saved_tensors
        return gradients[0].flatten(0, 1).index_select(0, real), None, None


def _input_gradient(gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Of the common input of several linear layers."""
    total = gradients[0] @ weights[0]
    for gradient, weight in zip(gradients[1:], weights[1:], strict=True):
        total.addmm_(gradient, weight)
    return total


def _rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    half = first.shape[-1]
    turned = states * cos
    turned[..., :half].addcmul_(second, sin[..., :half], value=-1)
    turned[..., half:].addcmul_(first, sin[..., half:])
    return turned
