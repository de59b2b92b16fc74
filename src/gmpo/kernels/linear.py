"""Linear layers of few rows in fp32, their weights laid out once in panels and read end to end.

The formulas stand in `linear.h`.

Dimensions: **N** rows, **I** inputs and **O** outputs of a layer.
"""

from __future__ import annotations

import platform
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from gmpo.kernels.calls import address, kernel

__all__ = ["has_panels", "panel_linear"]

_MOST_PANEL_OUTPUTS = 32
"""Of linear.h on any processor: what lies in panels is filled up to a multiple of it."""


def has_panels(like: Tensor) -> bool:
    """Whether `panel_linear` covers a weight like this one.

    On processors of other kinds than x86 nothing was measured; Apple's libraries have units for
    products there that C functions cannot use.
    """
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return is_x86 and like.dtype == torch.float32 and _linear(like) is not None


def panel_linear(
    weight: Float[Tensor, "O I"], bias: Float[Tensor, " O"] | None
) -> Callable[[Float[Tensor, "N I"]], Float[Tensor, "N O"]]:
    """inputs weight^T + bias, over a copy of the weight, which `has_panels` covers.

    A result is one sum in the order of the inputs, so that a row's depend neither on other rows nor
    on the number of threads.
    """
    outputs, size = weight.shape
    run, lay_out = _linear(weight), kernel("panels", "ppii", weight)
    assert run is not None and lay_out is not None, "`has_panels` must be asked first"
    spare = -outputs % _MOST_PANEL_OUTPUTS
    weight = weight.contiguous()
    packed = weight.new_empty(outputs + spare, size)
    lay_out(address(weight), address(packed), outputs, size)
    start = weight.new_zeros(len(packed)) if bias is None else functional.pad(bias, (0, spare))
    start = start.contiguous()

    def linear(inputs: Tensor) -> Tensor:
        inputs = inputs.contiguous()
        rows = len(inputs)
        results = inputs.new_empty(rows, outputs)
        room = inputs.new_empty(rows, _MOST_PANEL_OUTPUTS) if spare else None
        tensors = (inputs, packed, start, results, room)
        run(*(address(tensor) for tensor in tensors), rows, size, outputs)
        return results

    return linear


def _linear(like: Tensor) -> Callable[..., None] | None:
    return kernel("linear", "pppppiii", like) if like.dtype == torch.float32 else None
