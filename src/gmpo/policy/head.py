"""Log-probabilities of given tokens from hidden states, without a full set of logits.

Dimensions: **N** scored positions, **M** hidden size, **V** vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["TOKENS_PER_TILE", "chunked_token_logprobs", "token_logprobs", "widened"]

_ROWS_PER_TILE = 512
TOKENS_PER_TILE = 2048
"""Logits exist in tiles of so many positions and vocabulary entries: 4 MB in fp32, so that what is
done to them element by element happens in the processor's cache."""


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
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"] | None]:
    """`token_logprobs(hidden @ weight.T, ...)` with logits of one tile at a time.

    The forward pass keeps the log of each position's normaliser; the backward pass forms a tile's
    logits again and takes both gradients from them.

    Args:
        hidden: final hidden states; carries gradient.
        weight: the output head; carries gradient.
        token_ids: the token scored at each position.
        temperature: divides the logits.
        with_entropy: also return the entropy of each distribution, in nats, with gradient.
    """
    logprobs, entropy = _ChunkedTokenLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, token_ids, temperature, with_entropy
    )
    return logprobs, entropy if with_entropy else None


class _ChunkedTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        token_ids: Tensor,
        temperature: float,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        tiles = zip(hidden.split(_ROWS_PER_TILE), token_ids.split(_ROWS_PER_TILE), strict=True)
        sums = [_sums(rows, weight, ids, temperature, with_entropy) for rows, ids in tiles]
        chosen, log_total, mean = (torch.cat(column) for column in zip(*sums, strict=True))
        entropy = log_total - mean
        ctx.save_for_backward(hidden, weight, token_ids, log_total, entropy)
        ctx.temperature, ctx.with_entropy = temperature, with_entropy
        return chosen - log_total, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, token_ids, log_total, entropy = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        # A logit's gradient is that of its part of the temperature.
        by_logprob = gradients[0] / ctx.temperature
        by_entropy = gradients[1] / ctx.temperature if ctx.with_entropy else None
        wide = torch.promote_types(hidden.dtype, torch.float32)
        hidden_gradient = torch.zeros_like(hidden, dtype=wide) if wants_hidden else None
        weight_gradient = None
        if wants_weight:  # without positions nothing fills it
            weight_gradient = torch.empty_like(weight) if len(hidden) else torch.zeros_like(weight)
        for start in range(0, len(weight), TOKENS_PER_TILE):
            entries = weight[start : start + TOKENS_PER_TILE]
            for first in range(0, len(hidden), _ROWS_PER_TILE):
                rows = slice(first, first + _ROWS_PER_TILE)
                slope = _logits_gradient(
                    _tile(hidden[rows], entries, ctx.temperature),
                    token_ids[rows] - start,
                    log_total[rows],
                    by_logprob[rows],
                    None if by_entropy is None else (entropy[rows], by_entropy[rows]),
                )
                slope = slope.to(hidden.dtype)
                if hidden_gradient is not None:
                    hidden_gradient[rows] += slope @ entries
                if weight_gradient is not None:
                    of_entries = weight_gradient[start : start + TOKENS_PER_TILE]
                    of_entries.addmm_(slope.T, hidden[rows], beta=1 if first else 0)
        if hidden_gradient is not None:
            hidden_gradient = hidden_gradient.to(hidden.dtype)
        return hidden_gradient, weight_gradient, None, None, None


def _tile(rows: Tensor, entries: Tensor, temperature: float) -> Tensor:
    logits = widened(rows @ entries.T)
    return logits if temperature == 1.0 else logits / temperature


def _sums(
    rows: Tensor, weight: Tensor, token_ids: Tensor, temperature: float, with_mean: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's logit of its token, log of its sum of exponents, mean logit (0 unless asked)."""
    log_sums, means = [], []
    chosen = torch.zeros(len(rows), dtype=widened(rows[:0]).dtype, device=rows.device)
    for number, entries in enumerate(weight.split(TOKENS_PER_TILE)):
        logits = _tile(rows, entries, temperature)
        is_here, column = _columns(token_ids - number * TOKENS_PER_TILE, logits)
        chosen = torch.where(is_here, logits.gather(1, column)[:, 0], chosen)
        if with_mean:
            log_sums.append(logits.logsumexp(dim=-1))
            means.append(((logits - log_sums[-1][:, None]).exp_() * logits).sum(dim=-1))
        else:
            # As logsumexp, in place.
            largest = logits.amax(dim=-1, keepdim=True)
            log_sums.append(logits.sub_(largest).exp_().sum(dim=-1).log_() + largest[:, 0])
    joined = torch.stack(log_sums)
    log_total = joined.logsumexp(dim=0)
    if not with_mean:
        return chosen, log_total, torch.zeros_like(log_total)
    return chosen, log_total, ((joined - log_total).exp() * torch.stack(means)).sum(dim=0)


def _columns(token_ids: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each scored token lies in a tile, and its column there (some column if not)."""
    width = logits.shape[1]
    is_here = (token_ids >= 0) & (token_ids < width)
    return is_here, token_ids.clamp(0, width - 1)[:, None]


def _logits_gradient(
    logits: Tensor,
    token_ids: Tensor,
    log_total: Tensor,
    by_logprob: Tensor,
    by_entropy: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """The gradient of a tile's logits, which are used up; token 0 is the tile's first.

    d log p_y / d logits = onehot(y) - p;  d entropy / d logits = -p (log p + entropy).
    """
    log_p = logits.sub_(log_total[:, None])
    is_here, column = _columns(token_ids, logits)
    if by_entropy is None:
        gradient = log_p.exp_().mul_(-by_logprob[:, None])
    else:
        entropy, slope = by_entropy
        weights = by_logprob[:, None] + slope[:, None] * (log_p + entropy[:, None])
        gradient = log_p.exp_().mul_(-weights)
    return gradient.scatter_add_(1, column, torch.where(is_here, by_logprob, 0.0)[:, None])


def widened(logits: Tensor) -> Tensor:
    """The same values in fp32, or in fp64 if they are: what softmax and norms are taken in."""
    return logits if logits.dtype == torch.float64 else logits.float()
