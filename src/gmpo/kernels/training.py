"""What the training pass does beside matrix products: each pass over the tokens as one function.

Every function here runs compiled where it can (`calls.kernel` decides) and as torch's operations
otherwise: other devices, fp64, no compiler. Both round at the same places. The formulas stand in
`training.h` and at the head of `gmpo.policy.fused`.

Dimensions: **N** tokens, **M** hidden size, **F** feed-forward size, **V** vocabulary entries of a
tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from gmpo.kernels.calls import address, kernel

__all__ = [
    "TileSums",
    "gated",
    "gated_gradients",
    "norm_again",
    "norm_gradients",
    "stream_sum",
    "sum_norm",
    "tile_slopes",
    "weight_gradient",
]

_BLOCK_ROWS = 32
"""As in training.h: rows whose share of a weight's gradient is summed apart."""


def sum_norm(
    stream: Float[Tensor, "*N M"],
    added: Float[Tensor, "*N M"] | None,
    weight: Float[Tensor, " M"],
    *,
    eps: float,
) -> tuple[Float[Tensor, "*N M"], Float[Tensor, "*N M"], Float[Tensor, "*N 1"]]:
    """The stream with what is added, the RMS norm of each token, and its r.

    Args:
        stream: fp32 or wider.
        added: in the weight's precision; without it the first result is the stream itself.
        weight: of the norm.
        eps: added to the mean square.
    """
    run = _function("sum_norm", "ppppppiif", weight, stream)
    if run is None:
        sums = stream if added is None else stream + added
        scale = sums.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
        return sums, _normed(sums, weight, scale), scale
    # Names hold what is copied here: an address alone would not keep its memory.
    stream, added = stream.contiguous(), None if added is None else added.contiguous()
    sums = stream if added is None else torch.empty_like(stream)
    normed = torch.empty_like(stream, dtype=weight.dtype)
    scale = stream.new_empty((*stream.shape[:-1], 1))
    run(
        address(stream),
        address(added),
        address(weight),
        address(None if added is None else sums),
        address(normed),
        address(scale),
        scale.numel(),
        stream.shape[-1],
        eps,
    )
    return sums, normed, scale


def norm_again(
    stream: Float[Tensor, "*N M"], weight: Float[Tensor, " M"], scale: Float[Tensor, "*N 1"]
) -> Float[Tensor, "*N M"]:
    """The norm as `sum_norm` gave it, from the r that it kept."""
    run = _function("norm_again", "ppppii", weight, stream)
    if run is None:
        return _normed(stream, weight, scale)
    stream = stream.contiguous()
    normed = torch.empty_like(stream, dtype=weight.dtype)
    addresses = address(stream), address(weight), address(scale), address(normed)
    run(*addresses, scale.numel(), stream.shape[-1])
    return normed


def norm_gradients(
    gradient: Float[Tensor, "*N M"],
    stream: Float[Tensor, "*N M"],
    weight: Float[Tensor, " M"],
    scale: Float[Tensor, "*N 1"],
    *,
    residual: Float[Tensor, "*N M"] | None = None,
) -> tuple[Float[Tensor, "*N M"], Float[Tensor, "*N M"], Float[Tensor, " M"]]:
    """The gradient of the norm's input in fp32 or wider, the same narrowed, and the weight's.

    Args:
        gradient: of the norm's result, in the weight's precision.
        stream: what was normed.
        weight: of the norm.
        scale: r of each token.
        residual: a gradient of the stream from elsewhere, added to the first two results.
    """
    wide = (stream,) if residual is None else (stream, residual)
    run = _function("norm_backward", "pppppppppii", weight, *wide)
    if run is None or gradient.dtype != weight.dtype:
        by_stream, by_weight = _norm_gradients(gradient, stream, weight, scale)
        if residual is not None:
            by_stream.add_(residual)
        return by_stream, by_stream.to(weight.dtype), by_weight
    rows, size = scale.numel(), stream.shape[-1]
    gradient, stream = gradient.contiguous(), stream.contiguous()
    residual = None if residual is None else residual.contiguous()
    by_stream = torch.empty_like(stream)
    narrow = by_stream if weight.dtype == by_stream.dtype else torch.empty_like(gradient)
    parts = stream.new_empty(max(1, -(-rows // _BLOCK_ROWS)), size)
    by_weight = torch.empty_like(weight)
    run(
        *(address(tensor) for tensor in (gradient, stream, weight, scale, residual, by_stream)),
        address(None if narrow is by_stream else narrow),
        address(parts),
        address(by_weight),
        rows,
        size,
    )
    return by_stream, narrow, by_weight


def stream_sum(stream: Float[Tensor, "N M"], added: Float[Tensor, "N M"]) -> Float[Tensor, "N M"]:
    """The stream with what is added, in the stream's precision."""
    run = _function("stream_sum", "pppi", added, stream)
    if run is None:
        return stream + added
    stream, added = stream.contiguous(), added.contiguous()
    sums = torch.empty_like(stream)
    run(address(stream), address(added), address(sums), sums.numel())
    return sums


def weight_gradient(
    gradient: Float[Tensor, "N O"],
    inputs: Float[Tensor, "N I"],
    *,
    into: Float[Tensor, "O I"] | None = None,
    adds: bool = False,
) -> Float[Tensor, "O I"]:
    """gradient^T inputs: of a linear layer's weight, from its result's gradient and its input.

    Args:
        gradient: of the layer's result.
        inputs: of the layer.
        into: gets the result; without it the result is a new tensor.
        adds: add to what `into` holds.
    """
    turned = _transposed(gradient)
    if into is None:
        return turned @ inputs
    return into.addmm_(turned, inputs, beta=1 if adds else 0)


def gated(gate: Float[Tensor, "N F"], up: Float[Tensor, "N F"]) -> Float[Tensor, "N F"]:
    """silu(gate) up, rounded after the first."""
    run = _function("gated", "pppi", gate)
    if run is None:
        return functional.silu(gate).mul_(up)
    gate, up = gate.contiguous(), up.contiguous()
    joined = torch.empty_like(gate)
    run(address(gate), address(up), address(joined), gate.numel())
    return joined


def gated_gradients(
    gradient: Float[Tensor, "N F"], gate: Float[Tensor, "N F"], up: Float[Tensor, "N F"]
) -> tuple[Float[Tensor, "N F"], Float[Tensor, "N F"], Float[Tensor, "N F"]]:
    """By gate, by up, and `gated(gate, up)` again, from the gradient of the latter."""
    run = _function("gated_backward", "ppppppi", gate)
    if run is None:
        activated = functional.silu(gate)
        joined = activated * up
        by_gate = torch.ops.aten.silu_backward(gradient * up, gate)
        return by_gate, activated.mul_(gradient), joined
    inputs = gradient.contiguous(), gate.contiguous(), up.contiguous()
    by_gate, by_up, joined = (torch.empty_like(gate) for _ in range(3))
    tensors = (*inputs, by_gate, by_up, joined)
    run(*(address(tensor) for tensor in tensors), gate.numel())
    return by_gate, by_up, joined


@dataclass(frozen=True, kw_only=True)
class TileSums:
    """Of each row, over the tiles of its logits that were added so far; all in fp32 or wider.

    Attributes:
        chosen: the logit of the row's token; 0 until its tile was added.
        largest: the largest logit.
        total: sum of exp(logit - largest).
        weighted: the same with each summand times its logit; None unless asked for.
    """

    chosen: Float[Tensor, " N"]
    largest: Float[Tensor, " N"]
    total: Float[Tensor, " N"]
    weighted: Float[Tensor, " N"] | None

    @classmethod
    def empty(cls, rows: Float[Tensor, "N M"], *, with_mean: bool) -> TileSums:
        """Before the first tile."""
        zeros = [_wide(rows[:, :0]).new_zeros(len(rows)) for _ in range(4)]
        chosen, largest, total, weighted = zeros
        return cls(
            chosen=chosen,
            largest=largest.fill_(-math.inf),
            total=total,
            weighted=weighted if with_mean else None,
        )

    def add(
        self,
        logits: Float[Tensor, "N V"],
        token_ids: Int[Tensor, " N"],
        *,
        temperature: float,
        stays: bool = False,
    ) -> None:
        """Add a tile; its first entry is token 0. The logits are used up unless it `stays`."""
        run = _function("tile_sums", "ppppppiif", logits, self.chosen)
        if run is None:
            tempered = _tempered(logits, temperature)
            self._add_by_torch(tempered, token_ids, stays=stays and tempered is logits)
            return
        tensors = (logits, token_ids.contiguous(), self.chosen, self.largest, self.total)
        run(
            *(address(tensor) for tensor in (*tensors, self.weighted)),
            *logits.shape,
            1.0 / temperature,
        )

    def log_total(self) -> Float[Tensor, " N"]:
        """Log of the sum of exponents."""
        return self.total.log() + self.largest

    def mean(self) -> Float[Tensor, " N"]:
        """The mean logit of the distribution; 0 unless it was asked for."""
        return torch.zeros_like(self.total) if self.weighted is None else self.weighted / self.total

    def _add_by_torch(self, logits: Tensor, token_ids: Tensor, *, stays: bool) -> None:
        is_here, column = _columns(token_ids, logits)
        self.chosen.copy_(torch.where(is_here, logits.gather(1, column)[:, 0], self.chosen))
        largest = torch.maximum(self.largest, logits.amax(dim=-1))
        shrunk = (self.largest - largest).exp_()
        # In place unless the logits are wanted once more: a tile is to stay in the cache.
        below = logits.sub if stays or self.weighted is not None else logits.sub_
        parts = below(largest[:, None]).exp_()
        self.total.mul_(shrunk).add_(parts.sum(dim=-1))
        if self.weighted is not None:
            self.weighted.mul_(shrunk).add_(parts.mul_(logits).sum(dim=-1))
        self.largest.copy_(largest)


def tile_slopes(
    logits: Float[Tensor, "N V"],
    token_ids: Int[Tensor, " N"],
    log_total: Float[Tensor, " N"],
    by_logprob: Float[Tensor, " N"],
    by_entropy: tuple[Float[Tensor, " N"], Float[Tensor, " N"]] | None,
    *,
    temperature: float,
) -> Float[Tensor, "N V"]:
    """The gradient of a tile's logits, which are used up, in their precision.

    d log p_y / d logits = onehot(y) - p;  d entropy / d logits = -p (log p + entropy).

    Args:
        logits: before they are divided by the temperature.
        token_ids: of each row; token 0 is the tile's first.
        log_total: log of each row's sum of exponents over the whole vocabulary.
        by_logprob: gradient of each log-probability, divided by the temperature.
        by_entropy: each row's entropy, and its gradient divided by the temperature.
        temperature: of the distribution.
    """
    run = _function("tile_slopes", "ppppppiif", logits, log_total)
    if run is None:
        wide = _tempered(logits, temperature)
        return _slopes(wide, token_ids, log_total, by_logprob, by_entropy).to(logits.dtype)
    entropy, slope = (None, None) if by_entropy is None else by_entropy
    tensors = (logits, token_ids.contiguous(), log_total, by_logprob.contiguous(), entropy)
    slope = None if slope is None else slope.contiguous()
    run(*(address(tensor) for tensor in (*tensors, slope)), *logits.shape, 1.0 / temperature)
    return logits


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _function(name: str, arguments: str, like: Tensor, *wide: Tensor) -> Callable[..., None] | None:
    """The compiled function, if the tensors that it takes in fp32 are."""
    if any(tensor.dtype != torch.float32 for tensor in wide):
        return None
    return kernel(name, arguments, like)


def _transposed(table: Tensor) -> Tensor:
    """As a table of its own in bf16, else as a view.

    oneDNN's bf16 products read a left side that lies turned at a half to a third of their speed.
    Measured with torch 2.13 on a processor with AMX, one thread: [1536, 2276] by [2276, 576] 10.6
    ms, and 3.2 of a table of its own.
    """
    run = kernel("transposed", "ppii", table) if table.dtype == torch.bfloat16 else None
    if run is None:
        return table.t()
    table = table.contiguous()
    turned = table.new_empty(table.shape[1], table.shape[0])
    run(address(table), address(turned), *table.shape)
    return turned


def _normed(stream: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return (stream * scale).to(weight.dtype).mul_(weight)


def _norm_gradients(
    gradient: Tensor, stream: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    by_output, wide_weight = _wide(gradient), _wide(weight)
    product = by_output * stream
    by_weight = product.flatten(0, -2).t().mv(scale.flatten())
    mean = (product @ wide_weight)[..., None].div_(stream.shape[-1])
    del product
    by_stream = (by_output * wide_weight).mul_(scale)
    by_stream.addcmul_(stream, mean.mul_(scale.pow(3)), value=-1)
    return by_stream, by_weight.to(weight.dtype)


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    wide = _wide(logits)
    return wide if temperature == 1.0 else wide / temperature


def _columns(token_ids: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each scored token lies in a tile, and its column there (some column if not)."""
    width = logits.shape[1]
    is_here = (token_ids >= 0) & (token_ids < width)
    return is_here, token_ids.clamp(0, width - 1)[:, None]


def _slopes(
    logits: Tensor,
    token_ids: Tensor,
    log_total: Tensor,
    by_logprob: Tensor,
    by_entropy: tuple[Tensor, Tensor] | None,
) -> Tensor:
    log_p = logits.sub_(log_total[:, None])
    is_here, column = _columns(token_ids, logits)
    if by_entropy is None:
        gradient = log_p.exp_().mul_(-by_logprob[:, None])
    else:
        entropy, slope = by_entropy
        weights = by_logprob[:, None] + slope[:, None] * (log_p + entropy[:, None])
        gradient = log_p.exp_().mul_(-weights)
    return gradient.scatter_add_(1, column, torch.where(is_here, by_logprob, 0.0)[:, None])
