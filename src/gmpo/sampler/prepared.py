"""A model's linear layers laid out for decoding: fused, and in an order that is read end to end.

A decoding step reads every weight for few rows, so the order in which weights lie in memory decides
its time. In fp32 they are laid out in panels for a compiled function. In bf16, where the processor
has units for it, and in fp32 where no function is compiled, they take oneDNN's order: torch's CPU
builds for x86 have an operation that takes a weight reordered once. Elsewhere, on other devices and
in fp64, the modules run as they are.

The reordered weights are a copy of those of the layers and of the head: for the default model 270
MB in bf16 and 540 MB in fp32. The decoder holds it only while rows run.

Dimensions: **N** rows, **I** inputs and **O** outputs of a layer, **M** hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from gmpo.kernels.linear import has_panels, panel_linear
from gmpo.kernels.training import gated
from gmpo.policy.llama import LlamaBody

__all__ = [
    "Order",
    "PreparedBody",
    "PreparedLayer",
    "Projection",
    "gated_projection",
    "order_of",
    "prepare_body",
    "projection",
    "unprepared_body",
]

_TYPICAL_ROWS = 64
"""A hint for oneDNN's choice of order; any number of rows is correct."""

Order = Literal["panels", "onednn"]
"""The compiled function's or oneDNN's."""
Projection = Callable[[Float[Tensor, "N I"]], Float[Tensor, "N O"]]
"""One or several linear layers over the same input; their outputs side by side."""


@dataclass(frozen=True, kw_only=True)
class PreparedLayer:
    """The linear layers of one transformer layer, those with a common input fused.

    `gated` is what the feed-forward part's last layer takes: silu(gate) times up.
    """

    query_key_value: Projection
    output: Projection
    gated: Projection
    down: Projection


@dataclass(frozen=True, kw_only=True)
class PreparedBody:
    """All linear layers of one model."""

    layers: tuple[PreparedLayer, ...]
    head: Projection


def unprepared_body(body: LlamaBody) -> PreparedBody:
    """The model's modules as they are: it costs nothing and follows the weights."""
    head = _as_they_are(body.model.lm_head)
    return _with_each(body, _as_they_are, _gated_as_they_are, head=head)


@torch.no_grad()
def prepare_body(body: LlamaBody) -> PreparedBody:
    """Every linear layer of the model, for weights as they are now."""
    head = projection(body.model.lm_head)
    return _with_each(body, projection, gated_projection, head=head)


def order_of(dtype: torch.dtype, device: str) -> Order | None:
    """The order that decoding takes; None where the modules run as they are.

    Args:
        dtype: of the weights.
        device: where they lie: "cpu" or another.
    """
    if device != "cpu":
        return None
    if dtype == torch.bfloat16:
        has_units = _onednn_reorders() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return "onednn" if has_units else None
    if has_panels(torch.empty(0, dtype=dtype)):
        return "panels"
    # A processor for which torch is built without MKL is of another kind: none was measured.
    is_x86 = torch.backends.mkl.is_available()
    return "onednn" if dtype == torch.float32 and is_x86 and _onednn_reorders() else None


def _order_of(weight: Tensor) -> Order | None:
    return order_of(weight.dtype, weight.device.type)


def _with_each(
    body: LlamaBody,
    prepare: Callable[..., Projection],
    prepare_gated: Callable[..., Projection],
    *,
    head: Projection,
) -> PreparedBody:
    layers = []
    for layer in body.layers:
        attention, mlp = layer.self_attn, layer.mlp
        layers.append(
            PreparedLayer(
                query_key_value=prepare(attention.q_proj, attention.k_proj, attention.v_proj),
                output=prepare(attention.o_proj),
                gated=prepare_gated(mlp.gate_proj, mlp.up_proj),
                down=prepare(mlp.down_proj),
            )
        )
    return PreparedBody(layers=tuple(layers), head=head)


def projection(*modules: nn.Module) -> Projection:
    """The modules as one product with reordered weights where there is one, else one by one.

    Adapted layers run one by one: merging their factors into a bf16 weight would round them away.
    """
    linears = [module for module in modules if type(module) is nn.Linear]
    if len(linears) == len(modules):
        order = _order_of(linears[0].weight)
        if order == "panels":
            return panel_linear(*_fused(linears))
        if order == "onednn":
            return _with_onednn(linears)
    return _as_they_are(*modules)


def gated_projection(gate: nn.Module, up: nn.Module) -> Projection:
    """silu(gate) times up of one input.

    In bf16 and oneDNN's order both are taken of the sums in fp32 and rounded once, not thrice.
    """
    if type(gate) is type(up) is nn.Linear:
        order = _order_of(gate.weight)
        if order == "panels":
            # Two products: the halves of one would have to be copied for `gated`.
            of_gate, of_up = projection(gate), projection(up)
            return lambda inputs: gated(of_gate(inputs), of_up(inputs))
        if order == "onednn" and gate.weight.dtype == torch.bfloat16:
            return _gated_with_onednn(gate, up)
    joined = projection(gate, up)

    def run(inputs: Tensor) -> Tensor:
        of_gate, of_up = joined(inputs).chunk(2, dim=-1)
        return functional.silu(of_gate).mul_(of_up)

    return run


def _gated_as_they_are(gate: nn.Module, up: nn.Module) -> Projection:
    return lambda inputs: functional.silu(gate(inputs)).mul_(up(inputs))


def _as_they_are(*modules: nn.Module) -> Projection:
    if len(modules) == 1:
        return modules[0]
    return lambda inputs: torch.cat([module(inputs) for module in modules], dim=-1)


def _onednn_reorders() -> bool:
    names = ("mkldnn::_reorder_linear_weight", "mkldnn::_linear_pointwise")
    return torch.backends.mkldnn.is_available() and all(map(_exists, names))


def _exists(operation: str) -> bool:
    # Private operations, which torch's own compiler emits; some builds lack them.
    return torch._C._dispatch_has_kernel(operation)


def _with_onednn(linears: Sequence[nn.Linear]) -> Projection:
    weight, bias = _fused(linears)
    ordered = torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_ROWS)

    def run(inputs: Tensor) -> Tensor:
        outputs: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, ordered, bias, "none", [], "")
        return outputs

    return run


def _gated_with_onednn(gate: nn.Linear, up: nn.Linear) -> Projection:
    reorder, linear = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise
    (of_gate, gate_bias), (of_up, up_bias) = _fused([gate]), _fused([up])
    of_gate, of_up = reorder(of_gate, _TYPICAL_ROWS), reorder(of_up, _TYPICAL_ROWS)

    def run(inputs: Tensor) -> Tensor:
        activated = linear(inputs, of_gate, gate_bias, "swish", [], "")
        outputs: Tensor = linear.binary(inputs, activated, of_up, up_bias, "mul")
        return outputs

    return run


def _fused(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Weights and biases one below the other."""
    weights = [linear.weight.detach() for linear in linears]
    biases = [
        torch.zeros_like(linear.weight[:, 0]) if linear.bias is None else linear.bias.detach()
        for linear in linears
    ]
    has_bias = any(linear.bias is not None for linear in linears)
    return (
        weights[0] if len(weights) == 1 else torch.cat(weights),
        torch.cat(biases) if has_bias else None,
    )
