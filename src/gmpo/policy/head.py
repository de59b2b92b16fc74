"""Log-probabilities of given tokens from hidden states, without a full set of logits.

Dimensions: **N** scored positions, **M** hidden size, **V** vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["chunked_token_logprobs", "token_logprobs", "widened"]

_ROWS_PER_CHUNK = 256
"""Positions whose logits exist at once: 256 x 49,152 in fp32 are 50 MB."""


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
    """`token_logprobs(hidden @ weight.T, ...)` with logits of one chunk of positions at a time.

    The gradient with respect to `hidden` is formed in the forward pass, where the probabilities
    exist anyway; the one with respect to `weight` recomputes a chunk's logits in the backward pass.

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
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        logprobs, entropies, slopes, entropy_slopes = [], [], [], []
        for rows, ids in _chunks(hidden, token_ids):
            log_p = (widened(rows @ weight.T) / temperature).log_softmax(dim=-1)
            logprobs.append(log_p.gather(-1, ids[:, None])[:, 0])
            p = log_p.exp()
            if with_entropy:
                entropy = -(p * log_p).sum(dim=-1)
                entropies.append(entropy)
                if wants_hidden:
                    slope = -p * (log_p + entropy[:, None])
                    entropy_slopes.append(slope.to(weight.dtype) @ weight / temperature)
            if wants_hidden:
                # d log p_y / d logits = onehot(y) - p
                slopes.append((weight[ids] - p.to(weight.dtype) @ weight) / temperature)
        ctx.save_for_backward(
            hidden if wants_weight else None,
            weight if wants_weight else None,
            token_ids,
            torch.cat(slopes) if slopes else None,
            torch.cat(entropy_slopes) if entropy_slopes else None,
        )
        ctx.temperature, ctx.with_entropy = temperature, with_entropy
        joined = torch.cat(logprobs)
        return joined, torch.cat(entropies) if entropies else torch.zeros_like(joined)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, token_ids, slopes, entropy_slopes = ctx.saved_tensors
        by_logprob, by_entropy = gradients
        hidden_gradient = weight_gradient = None
        if slopes is not None:
            hidden_gradient = by_logprob[:, None].to(slopes.dtype) * slopes
            if ctx.with_entropy:
                scale = by_entropy[:, None].to(slopes.dtype)
                hidden_gradient = hidden_gradient + scale * entropy_slopes
        if weight is not None:
            weight_gradient = torch.zeros_like(weight)
            start = 0
            for rows, ids in _chunks(hidden, token_ids):
                stop = start + len(ids)
                logits_gradient = _logits_gradient(
                    (widened(rows @ weight.T) / ctx.temperature).log_softmax(dim=-1),
                    ids,
                    by_logprob[start:stop],
                    by_entropy[start:stop] if ctx.with_entropy else None,
                )
                weight_gradient.addmm_((logits_gradient / ctx.temperature).to(rows.dtype).T, rows)
                start = stop
        return hidden_gradient, weight_gradient, None, None, None


def _logits_gradient(
    log_p: Tensor, token_ids: Tensor, by_logprob: Tensor, by_entropy: Tensor | None
) -> Tensor:
    p = log_p.exp()
    gradient = -p * by_logprob[:, None]
    gradient[torch.arange(len(token_ids), device=token_ids.device), token_ids] += by_logprob
    if by_entropy is not None:
        entropy = -(p * log_p).sum(dim=-1, keepdim=True)
        gradient -= by_entropy[:, None] * p * (log_p + entropy)
    return gradient


def _chunks(hidden: Tensor, token_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(hidden.split(_ROWS_PER_CHUNK), token_ids.split(_ROWS_PER_CHUNK), strict=True))


def widened(logits: Tensor) -> Tensor:
    """The same values in fp32, or in fp64 if they are: what softmax and norms are taken in."""
    return logits if logits.dtype == torch.float64 else logits.float()
