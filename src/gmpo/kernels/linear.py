"""Linear layers of few rows in fp32: a GEMM whose weights are packed into panels once.

The formulas stand in `linear.h`.

Dimensions: **N** rows, **I** inputs and **O** outputs of a layer.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from gmpo.kernels.calls import address, kernel

__all__ = ["has_panels", "panel_linear"]


def has_panels(like: Tensor) -> bool:
    """Whether `panel_linear` covers a weight like this one.

    It lies on the CPU in fp32, and the functions are compiled for AVX2 and several threads. What
    other processors have for products of fp32 was not measured.
    """
    return _outputs_of_panel(like) > 0


def panel_linear(
    weight: Float[Tensor, "O I"], bias: Float[Tensor, " O"] | None
) -> Callable[[Float[Tensor, "N I"]], Float[Tensor, "N O"]]:
    """inputs weight^T + bias, over a copy of the weight, which `has_panels` covers.

    A result is one sum in the order of the inputs, so that a row's depend neither on other rows nor
    on the number of threads.
    """
    outputs, size = weight.shape
    panel = _outputs_of_panel(weight)
    assert panel, "`has_panels` must be asked first"
    run, lay_out = kernel("linear", "pppppiii", weight), kernel("panels", "ppii", weight)
    assert run is not None and lay_out is not None, "the functions are compiled together"
    spare = -outputs % panel
    weight = weight.contiguous()
    packed = weight.new_empty(outputs + spare, size)
    lay_out(address(weight), address(packed), outputs, size)
    start = weight.new_zeros(len(packed)) if bias is None else functional.pad(bias, (0, spare))
    start = start.contiguous()

    def linear(inputs: Tensor) -> Tensor:
        assert inputs.dtype == torch.float32 and inputs.shape[1:] == (size,), "not its inputs"
        inputs, rows = inputs.contiguous(), len(inputs)
        results = inputs.new_empty(rows, outputs)
        room = inputs.new_empty(rows, panel) if spare else None
        tensors = (inputs, packed, start, results, room)
        run(*(address(tensor) for tensor in tensors), rows, size, outputs)
        return results

    return linear


def _outputs_of_panel(like: Tensor) -> int:
    """0 where nothing is compiled, or not for this."""
    number = ctypes.c_int64()
    ask = kernel("panel_outputs", "p", like) if like.dtype == torch.float32 else None
    if ask is not None:
        ask(ctypes.addressof(number))
    return number.value
