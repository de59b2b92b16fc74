"""Log-probabilities of given tokens from hidden states, from logits of one tile at a time.

Dimensions: **N** scored positions, **M** hidden size, **V** vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from gmpo.kernels.shapes import spare_rows
from gmpo.kernels.training import TileSums, tile_slopes, weight_gradient

__all__ = [
    "TOKENS_PER_TILE",
    "chunked_token_logprobs",
    "most_positions_kept",
    "token_logprobs",
    "widened",
]

_ROWS_PER_TILE = 512
TOKENS_PER_TILE = 2048
"""Logits are formed in tiles of so many positions and vocabulary entries: 2 MB in bf16, so that
what is done to a new one element by element happens in the processor's cache."""
_TILE_ELSEWHERE = 2048, 16384
"""The same on other devices, where each operation on a tile has to be started: 128 MB in fp32."""
_KEPT_BYTES = 2**29
"""Of logits that a pass with gradient keeps at most. As in memory.py, which foretells them."""


def token_logprobs(
    logits: Float[Tensor, "*N V"], token_ids: Int[Tensor, "*N"], *, temperature: float = 1.0
) -> tuple[Float[Tensor, "*N"], Float[Tensor, "*N"]]:
    """Log-probability of each token and entropy of its distribution, in nats, from full logits.

    The obvious way, with ordinary gradients; `chunked_token_logprobs` must equal it.
    """
    logprobs = (widened(logits) / temperature).log_softmax(dim=-1)
    chosen = logprobs.gather(-1, token_ids[..., None])[..., 0]
    entropy = -(logprobs.exp() * logprobs).sum(dim=-1)
    return chosen, entropy


def chunked_token_logprobs(
    hidden: Float[Tensor, "N M"],
    weight: Float[Tensor, "V M"],
    token_ids: Int[Tensor, " N"],
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    keeps_logits: bool = True,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"] | None]:
    """`token_logprobs(hidden @ weight.T, ...)` with logits formed one tile at a time.

    The forward pass keeps the log of each position's normaliser, and the logits of the first
    positions, at most `most_positions_kept`. The backward pass takes both gradients from a tile's
    logits, and forms those again that were not kept: the same numbers.

    Args:
        hidden: final hidden states; carries gradient.
        weight: the output head; carries gradient.
        token_ids: the token scored at each position.
        temperature: divides the logits.
        with_entropy: also return the entropy of each distribution, in nats, with gradient.
        keeps_logits: False forms all of them again, for less memory; so it is done off the CPU,
            where what keeping gains was not measured.
    """
    count = len(hidden)
    spare = spare_rows(count, like=weight)
    if spare:
        hidden, token_ids = (
            functional.pad(hidden, (0, 0, 0, spare)),
            functional.pad(token_ids, (0, spare)),
        )
    # Without gradient there is no backward pass to keep them for.
    has_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    keeps_logits = keeps_logits and has_gradient and weight.device.type == "cpu"
    most = most_positions_kept(len(weight), width=weight.element_size())
    how = _How(
        temperature=temperature, with_entropy=with_entropy, num_kept=most if keeps_logits else 0
    )
    logprobs, entropy = _ChunkedTokenLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, token_ids, how
    )
    return logprobs[:count], entropy[:count] if with_entropy else None


@dataclass(frozen=True, kw_only=True)
class _How:
    """As `chunked_token_logprobs` takes them, and the positions whose logits are kept."""

    temperature: float
    with_entropy: bool
    num_kept: int


class _ChunkedTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, token_ids: Tensor, how: _How
    ) -> tuple[Tensor, Tensor]:
        rows_per_tile, _ = _tile(weight)
        tiles = zip(hidden.split(rows_per_tile), token_ids.split(rows_per_tile), strict=True)
        ctx.kept, sums = [], []
        for number, (rows, ids) in enumerate(tiles):
            keeps = number * rows_per_tile < how.num_kept
            part, kept = _sums(rows, weight, ids, how, keeps=keeps)
            sums.append(part)
            ctx.kept.append(kept)
        chosen = torch.cat([part.chosen for part in sums])
        log_total = torch.cat([part.log_total() for part in sums])
        entropy = log_total - torch.cat([part.mean() for part in sums])
        ctx.save_for_backward(hidden, weight, token_ids, log_total, entropy)
        ctx.how = how
        return chosen - log_total, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, token_ids, log_total, entropy = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        # A logit's gradient is that of its part of the temperature.
        how: _How = ctx.how
        by_logprob = gradients[0] / how.temperature
        by_entropy = gradients[1] / how.temperature if how.with_entropy else None
        wide = torch.promote_types(hidden.dtype, torch.float32)
        by_hidden = torch.zeros_like(hidden, dtype=wide) if wants_hidden else None
        by_weight = None
        if wants_weight:  # without positions nothing fills it
            by_weight = torch.empty_like(weight) if len(hidden) else torch.zeros_like(weight)
        rows_per_tile, tokens_per_tile = _tile(weight)
        for start in range(0, len(weight), tokens_per_tile):
            entries = weight[start : start + tokens_per_tile]
            for number, kept in enumerate(ctx.kept):
                first = number * rows_per_tile
                rows = slice(first, first + rows_per_tile)
                # Its slopes take its place, so a second backward pass forms the tile again.
                logits = kept.pop(start, None)
                slope = tile_slopes(
                    hidden[rows] @ entries.T if logits is None else logits,
                    token_ids[rows] - start,
                    log_total[rows],
                    by_logprob[rows],
                    None if by_entropy is None else (entropy[rows], by_entropy[rows]),
                    temperature=how.temperature,
                )
                if by_hidden is not None:
                    by_hidden[rows] += slope @ entries
                if by_weight is not None:
                    of_entries = by_weight[start : start + tokens_per_tile]
                    weight_gradient(slope, hidden[rows], into=of_entries, adds=first > 0)
        if by_hidden is not None:
            by_hidden = by_hidden.to(hidden.dtype)
        return by_hidden, by_weight, None, None


def most_positions_kept(vocabulary: int, *, width: int) -> int:
    """Most positions whose logits a pass with gradient keeps: whole tiles of 512, in 512 MiB.

    Where it keeps any, see `chunked_token_logprobs`.

    Args:
        vocabulary: V.
        width: bytes of a logit.
    """
    return _KEPT_BYTES // (_ROWS_PER_TILE * vocabulary * width) * _ROWS_PER_TILE


def _sums(
    rows: Tensor, weight: Tensor, token_ids: Tensor, how: _How, *, keeps: bool
) -> tuple[TileSums, dict[int, Tensor]]:
    """Of rows of hidden states, over all tiles of the vocabulary.

    Returns:
        The sums, and if they are kept each tile's logits by its first token.
    """
    kept: dict[int, Tensor] = {}
    sums = TileSums.empty(rows, with_mean=how.with_entropy)
    _, tokens_per_tile = _tile(weight)
    for start in range(0, len(weight), tokens_per_tile):
        logits = rows @ weight[start : start + tokens_per_tile].T
        sums.add(logits, token_ids - start, temperature=how.temperature, stays=keeps)
        if keeps:
            kept[start] = logits
        del logits  # or the next tile could not take its place, which is in the cache
    return sums, kept


def _tile(weight: Tensor) -> tuple[int, int]:
    """Positions and vocabulary entries of a tile where the head lies."""
    is_here = weight.device.type == "cpu"
    return (_ROWS_PER_TILE, TOKENS_PER_TILE) if is_here else _TILE_ELSEWHERE


def widened(values: Tensor) -> Tensor:
    """The same values in fp32, or in fp64 if they are: what softmax and norms are taken in."""
    return values if values.dtype == torch.float64 else values.float()
