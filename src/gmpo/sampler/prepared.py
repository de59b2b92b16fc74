"""A model's linear layers laid out for decoding: fused, and in the CPU library's own order.

A decoding step reads every weight for few rows, so the order in which weights lie in memory decides
its time. torch's CPU builds carry two operations that take a weight reordered once, oneDNN's and
MKL's. oneDNN's is taken for bf16, which needs bf16 units, and for fp32 where MKL is there and the
processor is not Intel's: on an AMD with AVX2 it was faster than MKL's. MKL's is taken for fp32 on
Intel's. Elsewhere, and on other devices and in fp64, the modules run as they are.

The reordered weights are a copy of those of the layers, in oneDNN's order of the head too: for the
default model 270 MB in bf16, and in fp32 540 MB, or 425 in MKL's. The decoder holds it only while
rows run.

Dimensions: **N** rows, **I** inputs and **O** outputs of a layer, **M** hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

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

_MKL_ROWS = 64
"""MKL reorders for a fixed number of rows, 32 or 64; other numbers are run in such pieces, and less
than half of one by the modules themselves."""
_TYPICAL_ROWS = 64
"""A hint for oneDNN's choice of order; any number of rows is correct."""

Order = Literal["onednn", "mkl"]
"""The library in whose order a weight lies."""
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
def prepare_body(body: LlamaBody, *, rows: int) -> PreparedBody:
    """Every linear layer of the model, for weights as they are now and about so many rows."""
    head = body.model.lm_head
    prepare = partial(projection, rows=rows)
    return _with_each(
        body,
        prepare,
        partial(gated_projection, rows=rows),
        # Joining the pieces of so many outputs costs what MKL's order gains.
        head=_as_they_are(head) if _order_of(head.weight) == "mkl" else prepare(head),
    )


def order_of(dtype: torch.dtype, device: str) -> Order | None:
    """Whose order decoding takes; None where the modules run as they are.

    The processor's maker decides and not a trial: the same machine has to draw the same bits in
    every process.

    Args:
        dtype: of the weights.
        device: where they lie: "cpu" or another.
    """
    if device != "cpu":
        return None
    if dtype == torch.bfloat16:
        has_units = _onednn_reorders() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return "onednn" if has_units else None
    # A processor for which torch is built without MKL is of another kind: none was measured.
    if dtype != torch.float32 or not _mkl_reorders():
        return None
    return "mkl" if _is_intels() or not _onednn_reorders() else "onednn"


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


def projection(*modules: nn.Module, rows: int) -> Projection:
    """The modules as one product with reordered weights where torch can, else one by one.

    Adapted layers run one by one: merging their factors into a bf16 weight would round them away.
    """
    linears = [module for module in modules if type(module) is nn.Linear]
    if len(linears) == len(modules):
        order = _order_of(linears[0].weight)
        if order == "onednn":
            return _with_onednn(linears)
        if order == "mkl":
            return _with_mkl(linears, min(_MKL_ROWS, -(-rows // 32) * 32))
    return _as_they_are(*modules)


def gated_projection(gate: nn.Module, up: nn.Module, *, rows: int) -> Projection:
    """silu(gate) times up of one input.

    In bf16 and oneDNN's order both are taken of the sums in fp32 and rounded once, not thrice. In
    fp32, where nothing is rounded between, one product for both is faster than that.
    """
    if (
        type(gate) is type(up) is nn.Linear
        and gate.weight.dtype == torch.bfloat16
        and _order_of(gate.weight) == "onednn"
    ):
        return _gated_with_onednn(gate, up)
    joined = projection(gate, up, rows=rows)

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


def _mkl_reorders() -> bool:
    names = ("mkl::_mkl_reorder_linear_weight", "mkl::_mkl_linear")
    return torch.backends.mkl.is_available() and all(map(_exists, names))


@cache
def _is_intels() -> bool:
    """Whether Intel made the processor; if torch is too old to tell, or it has no name, yes."""
    if "get_capabilities" not in torch.cpu.__all__:
        return True
    return "intel" in (torch.cpu.get_capabilities().get("cpu_name") or "intel").lower()


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


def _with_mkl(linears: Sequence[nn.Linear], piece_rows: int) -> Projection:
    weight, bias = _fused(linears)
    ordered = torch.ops.mkl._mkl_reorder_linear_weight(weight, piece_rows)
    # Of the weight itself only the shape is read, so that it need not be kept.
    shape = weight.new_zeros(1, 1).expand_as(weight)
    alone = _as_they_are(*linears)

    def run(inputs: Tensor) -> Tensor:
        rows = len(inputs)
        if 2 * rows < piece_rows:
            return alone(inputs)
        missing = -rows % piece_rows
        padded = functional.pad(inputs, (0, 0, 0, missing)) if missing else inputs
        # With any other number of rows the operation ignores the reordered weight.
        pieces = [
            torch.ops.mkl._mkl_linear(piece, ordered, shape, bias, piece_rows)
            for piece in padded.split(piece_rows)
        ]
        outputs = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return outputs[:rows]

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
