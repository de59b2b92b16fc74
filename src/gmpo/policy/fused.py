"""Parts of a Llama layer with backward passes written by hand, with or without adapters.

Autograd keeps the input of every operation: of a layer about nine tables as wide as the hidden
size and four as wide as the feed-forward part. Here a layer keeps its input, attention's output,
the stream between its halves, and the gate and the other half before they are joined; norms, the
joined half and what adapters narrow are computed again in the backward pass, which costs little
beside the products. The forward pass rounds where `LlamaBody` does, so it gives the same numbers to
rounding. No gradient is formed of a weight that is frozen.

Notation: x input, w weight, g gradient of the output; products over features are sums over i.

    RMS norm       y_i = w_i r x_i,  r = (mean_i x_i^2 + eps)^-1/2
                   dw_i = sum over tokens of g_i x_i r
                   dx_i = r g_i w_i - x_i r^3 mean_j(g_j w_j x_j)
    linear         y = x W^T:  dW = g^T x,  dx = g W
    adapter        y = s (x A^T) B^T:  dB = g^T (s x A^T),  dA = s (g B)^T x,  dx = s (g B) A
    gated SiLU     y = silu(a) b:  db = g silu(a),  da = g b silu'(a)
    rotation       y = x cos + R x sin with R (first, second) = (-second, first); R^T = -R, and
                   sin is the same in both halves:  dx = g cos - R g sin

Dimensions: **N** tokens, **M** hidden size, **F** feed-forward size, **A** heads, **D** head size,
**R** rows, **W** tokens of a row, **I** inputs and **O** outputs of a linear layer, **k** rank of
its adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple, cast

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
from gmpo.policy.lora import LoraLayer

__all__ = ["feed_forward", "gathered_rows", "is_covered", "project", "rms_norm", "rotate"]


def is_covered(layer: Any) -> bool:
    """Whether a layer's linear parts are plain or adapted ones, without rare biases."""
    attention, mlp = layer.self_attn, layer.mlp
    with_bias = (attention.q_proj, attention.k_proj, attention.v_proj)
    without = (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    return all(type(module) in (nn.Linear, LoraLayer) for module in (*with_bias, *without)) and all(
        module.bias is None for module in without
    )


def rms_norm(
    hidden: Float[Tensor, "*N M"], weight: Float[Tensor, " M"], *, eps: float
) -> Float[Tensor, "*N M"]:
    """The norm of each token, with statistics in fp32 or wider."""
    return cast(Tensor, _RmsNorm.apply(hidden, weight, eps))  # type: ignore[no-untyped-call]


def project(
    hidden: Float[Tensor, "N M"], norm: Any, linears: Sequence[nn.Linear | LoraLayer]
) -> tuple[Float[Tensor, "N O"], ...]:
    """The tokens themselves and several linear layers, with or without bias, over their norm.

    The layers' adapters act too, unless they are switched off.

    What goes on with the first result instead of `hidden` has its gradient added where the norm's
    is formed, and not in a pass of its own.
    """
    return cast(
        tuple[Tensor, ...],
        _Project.apply(  # type: ignore[no-untyped-call]
            hidden, norm.weight, norm.variance_epsilon, *_flat(linears)
        ),
    )


def feed_forward(
    hidden: Float[Tensor, "N M"], attended: Float[Tensor, "N AD"], layer: Any
) -> Float[Tensor, "N M"]:
    """A layer's output from its input and what its heads attended to."""
    norm, mlp = layer.post_attention_layernorm, layer.mlp
    linears = (layer.self_attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    return cast(
        Tensor,
        _FeedForward.apply(  # type: ignore[no-untyped-call]
            hidden, attended, norm.weight, norm.variance_epsilon, *_flat(linears)
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


class _Linear(NamedTuple):
    """A linear layer and, if it has one that is switched on, its adapter."""

    scale: float
    weight: Float[Tensor, "O I"]
    bias: Float[Tensor, " O"] | None
    lora_a: Float[Tensor, "k I"] | None
    lora_b: Float[Tensor, "O k"] | None

    def output(self, inputs: Float[Tensor, "N I"]) -> Float[Tensor, "N O"]:
        """Of the layer, its adapter's added."""
        result = functional.linear(inputs, self.weight, self.bias)
        if self.lora_b is not None:
            result.addmm_(self.narrow(inputs), self.lora_b.t())
        return result

    def by_narrow(self, gradient: Float[Tensor, "N O"]) -> Float[Tensor, "N k"] | None:
        """The gradient of x A^T, which the adapter's first factor and the inputs take."""
        return None if self.lora_b is None else (gradient @ self.lora_b).mul_(self.scale)

    def gradients(
        self,
        gradient: Float[Tensor, "N O"],
        inputs: Float[Tensor, "N I"],
        by_narrow: Float[Tensor, "N k"] | None,
        *,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        """Of the four tensors; `needs` says which are wanted."""
        by_weight = weight_gradient(gradient, inputs) if needs[0] else None
        by_bias = gradient.sum(0) if needs[1] else None
        by_a = by_b = None
        if by_narrow is not None and needs[2]:
            by_a = weight_gradient(by_narrow, inputs)
        if needs[3]:  # as the other way round, but the narrow side is the one that is copied
            by_b = weight_gradient(self.narrow(inputs), gradient).t()
        return by_weight, by_bias, by_a, by_b

    def narrow(self, inputs: Float[Tensor, "N I"]) -> Float[Tensor, "N k"]:
        """What the adapter's second factor takes."""
        assert self.lora_a is not None
        return functional.linear(inputs, self.lora_a).mul_(self.scale)


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
        ctx: Any,
        hidden: Tensor,
        norm_weight: Tensor,
        eps: float,
        scales: Sequence[float],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        _, normed, scale = sum_norm(widened(hidden), None, norm_weight, eps=eps)
        ctx.save_for_backward(hidden, norm_weight, scale, *tensors)
        ctx.scales = scales
        return hidden, *(linear.output(normed) for linear in _linears(scales, tensors))

    @staticmethod
    def backward(ctx: Any, residual: Tensor, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, norm_weight, scale, *tensors = ctx.saved_tensors
        linears, needs = _linears(ctx.scales, tensors), _by_linear(ctx.needs_input_grad[4:])
        normed = norm_again(widened(hidden), norm_weight, scale)
        narrow = [
            each.by_narrow(gradient) for each, gradient in zip(linears, gradients, strict=True)
        ]
        by_tensors = [
            linear.gradients(gradient, normed, by_narrow, needs=needed)
            for linear, gradient, by_narrow, needed in zip(
                linears, gradients, narrow, needs, strict=True
            )
        ]
        by_hidden = by_norm = None
        if any(ctx.needs_input_grad[:2]):  # adapters of the first layer need neither
            by_hidden, _, by_norm = norm_gradients(
                _input_gradient(gradients, narrow, linears),
                widened(hidden),
                norm_weight,
                scale,
                residual=residual,
            )
            by_hidden = by_hidden.to(hidden.dtype)
        return by_hidden, by_norm, None, None, *chain(*by_tensors)


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        attended: Tensor,
        norm_weight: Tensor,
        eps: float,
        scales: Sequence[float],
        *tensors: Tensor | None,
    ) -> Tensor:
        output, gate, up, down = _linears(scales, tensors)
        stream, normed, scale = sum_norm(hidden, output.output(attended), norm_weight, eps=eps)
        gate_states, up_states = gate.output(normed), up.output(normed)
        del normed
        ctx.save_for_backward(
            attended, stream, scale, gate_states, up_states, norm_weight, *tensors
        )
        ctx.scales = scales
        return stream_sum(stream, down.output(gated(gate_states, up_states)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        attended, stream, scale, gate_states, up_states, norm_weight, *tensors = ctx.saved_tensors
        output, gate, up, down = _linears(ctx.scales, tensors)
        of_output, of_gate, of_up, of_down = _by_linear(ctx.needs_input_grad[5:])
        # Products are taken in the weights' precision; only the stream is wider.
        narrow = gradient.to(attended.dtype)
        down_narrow = down.by_narrow(narrow)
        by_joined = _input_gradient([narrow], [down_narrow], [down])
        by_gate, by_up, joined = gated_gradients(by_joined, gate_states, up_states)
        del by_joined
        by_down = down.gradients(narrow, joined, down_narrow, needs=of_down)
        del joined
        normed = norm_again(stream, norm_weight, scale)
        gate_narrow, up_narrow = gate.by_narrow(by_gate), up.by_narrow(by_up)
        by_gate_layer = gate.gradients(by_gate, normed, gate_narrow, needs=of_gate)
        by_up_layer = up.gradients(by_up, normed, up_narrow, needs=of_up)
        by_normed = _input_gradient([by_gate, by_up], [gate_narrow, up_narrow], [gate, up])
        del by_gate, by_up, normed
        by_stream, narrow, by_norm = norm_gradients(
            by_normed, stream, norm_weight, scale, residual=gradient
        )
        output_narrow = output.by_narrow(narrow)
        by_output = output.gradients(narrow, attended, output_narrow, needs=of_output)
        by_attended = _input_gradient([narrow], [output_narrow], [output])
        by_tensors = chain(by_output, by_gate_layer, by_up_layer, by_down)
        return by_stream, by_attended, by_norm, None, None, *by_tensors


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


def _flat(layers: Sequence[nn.Linear | LoraLayer]) -> tuple[Any, ...]:
    """The adapters' scales, and all tensors, as a function of autograd has to be given them."""
    scales, tensors = [], []
    for layer in layers:
        adapter = layer if isinstance(layer, LoraLayer) and layer.is_on else None
        scales.append(0.0 if adapter is None else adapter.scale)
        factors = (None, None) if adapter is None else (adapter.lora_A, adapter.lora_B)
        tensors += [layer.weight, layer.bias, *factors]
    return tuple(scales), *tensors


def _linears(scales: Sequence[float], tensors: Sequence[Any]) -> list[_Linear]:
    """The layers that `_flat` took apart."""
    parts = _by_linear(tensors)
    return [_Linear(scale, *part) for scale, part in zip(scales, parts, strict=True)]


def _by_linear(values: Sequence[Any]) -> list[Sequence[Any]]:
    """What `_flat` laid end to end, layer by layer."""
    return [values[first : first + 4] for first in range(0, len(values), 4)]


def _input_gradient(
    gradients: Sequence[Tensor], narrow: Sequence[Tensor | None], linears: Sequence[_Linear]
) -> Tensor:
    """Of the common input of several linear layers; `narrow` is what `by_narrow` gave of each."""
    total = gradients[0] @ linears[0].weight
    for gradient, linear in zip(gradients[1:], linears[1:], strict=True):
        total.addmm_(gradient, linear.weight)
    for by_narrow, linear in zip(narrow, linears, strict=True):
        if by_narrow is not None and linear.lora_a is not None:
            total.addmm_(by_narrow, linear.lora_a)
    return total


def _rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    half = first.shape[-1]
    turned = states * cos
    turned[..., :half].addcmul_(second, sin[..., :half], value=-1)
    turned[..., half:].addcmul_(first, sin[..., half:])
    return turned
