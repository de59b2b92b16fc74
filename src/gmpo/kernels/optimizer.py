"""AdamW from gradients in the compute precision, without a copy of them in fp32.

torch's AdamW wants gradients in the precision of the weights it moves. Where gradients are bf16 and
weights fp32 that is a second, wider copy, and five passes over memory: widen, measure, clip, step,
round. The compiled function makes two of them, and holds the gradient once. It runs where it is
compiled, and nowhere else: a caller asks `takes_narrow` and leaves the rest to torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from gmpo.kernels.calls import address, kernel

__all__ = ["AdamWStep", "adamw", "gradient_norm", "takes_narrow"]

_BLOCK = 1 << 14
"""As in optimizer.h: numbers whose squares are summed apart."""


@dataclass(frozen=True, kw_only=True)
class AdamWStep:
    """The numbers of one step of AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2).

    Attributes:
        learning_rate: of this step.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, per unit of step size.
        number: of the step, from 1: the moments' correction.
        scale: multiplies the gradient, as clipping to a norm does.
    """

    learning_rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    number: int
    scale: float


def takes_narrow(parameter: Tensor) -> bool:
    """Whether `adamw` can read a gradient in this parameter's precision."""
    is_narrow = parameter.dtype == torch.bfloat16 and parameter.is_contiguous()
    return is_narrow and _adamw(parameter) is not None


def gradient_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, in fp64; its sums have one order for any threads."""
    total = torch.zeros((), dtype=torch.float64)
    for gradient in gradients:
        run = kernel("gradient_squares", "ppi", gradient)
        assert run is not None, "the caller asked `takes_narrow`"
        flat = gradient.contiguous()
        squares = torch.empty(-(-flat.numel() // _BLOCK), dtype=torch.float64)
        run(address(flat), address(squares), flat.numel())
        total += squares.sum()
    return total.sqrt()


def adamw(
    weight: Tensor,
    gradient: Tensor | None,
    moments: tuple[Tensor, Tensor],
    narrow: Tensor,
    step: AdamWStep,
) -> None:
    """Move a weight, its moments, and its copy in the compute precision.

    Args:
        weight: fp32, moved in place.
        gradient: of the narrow copy's shape and precision; None is a gradient of zeros.
        moments: first and second, fp32, moved in place.
        narrow: gets the weight rounded.
        step: the numbers.
    """
    run = _adamw(narrow)
    assert run is not None, "the caller asked `takes_narrow`"
    held = None if gradient is None else gradient.contiguous()
    beta1, beta2 = step.betas
    run(
        *(address(tensor) for tensor in (weight, held, *moments, narrow)),
        weight.numel(),
        step.scale,
        step.learning_rate * step.weight_decay,
        step.learning_rate / (1 - beta1**step.number),
        1 / math.sqrt(1 - beta2**step.number),
        beta1,
        beta2,
        step.eps,
    )


def _adamw(like: Tensor) -> Callable[..., None] | None:
    return kernel("adamw", "pppppifffffff", like)
