"""Tokens drawn from logits with given uniforms, through the inverse CDF.

Dimensions: **B** sequences, **V** vocabulary, **K** blocks of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from gmpo.errors import NonFiniteError

__all__ = ["Draw", "draw_tokens", "truncate_logits"]

_BLOCK = 256
"""Vocabulary entries summed together: the CDF is searched by block first, then inside one."""


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One drawn token a sequence, with its log-probabilities in nats.

    `logprobs` are the unmodified model's, `sampled_logprobs` those of the distribution drawn from.
    """

    token_ids: Int[Tensor, " B"]
    logprobs: Float[Tensor, " B"]
    sampled_logprobs: Float[Tensor, " B"]


def draw_tokens(
    logits: Float[Tensor, "B V"],
    *,
    uniforms: Float[Tensor, " B"],
    temperature: Float[Tensor, " B"],
    top_p: Float[Tensor, " B"],
    top_k: Int[Tensor, " B"],
) -> Draw:
    """Draw token i where the CDF of row i first exceeds uniforms[i]; temperature 0 is greedy.

    Args:
        logits: of the unmodified model.
        uniforms: in [0, 1); their precision is that of the cumulative sums.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: in (0, 1]; 1 keeps all.
        top_k: 0 keeps all.

    Raises:
        NonFiniteError: a row has a NaN, a positive infinity, or nothing but negative ones.
    """
    greedy = temperature == 0
    scale = torch.where(greedy, 1.0, temperature).to(logits.dtype)
    is_plain = bool(((scale == 1) & (top_p == 1) & (top_k == 0)).all())
    modified = logits if is_plain else logits / scale[:, None]
    if not bool(((top_p == 1) & (top_k == 0)).all()):
        modified = truncate_logits(modified, top_p=top_p, top_k=top_k)
    token_ids, log_total = _inverse_cdf(modified, uniforms)
    if bool(greedy.any()):
        token_ids = torch.where(greedy, logits.argmax(dim=-1), token_ids)
    sampled = _pick(modified, token_ids) - log_total
    plain = sampled if is_plain else _pick(logits, token_ids) - logits.logsumexp(dim=-1)
    return Draw(
        token_ids=token_ids,
        logprobs=plain,
        sampled_logprobs=torch.where(greedy, 0.0, sampled),
    )


def truncate_logits(
    logits: Float[Tensor, "B V"], *, top_p: Float[Tensor, " B"], top_k: Int[Tensor, " B"]
) -> Float[Tensor, "B V"]:
    """Logits with -inf on tokens outside the k likeliest, then outside the smallest top-p set.

    A token is kept while the likelier ones sum to less than top_p, so one token always stays. Equal
    logits keep the lower token id first.
    """
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    limit = torch.where(top_k == 0, logits.shape[-1], top_k)
    kept = rank[None] < limit[:, None]
    probabilities = torch.where(kept, ordered, -torch.inf).softmax(dim=-1)
    likelier = probabilities.cumsum(dim=-1) - probabilities
    kept &= (likelier < top_p[:, None].to(logits.dtype)) | (top_p == 1)[:, None]
    ordered = torch.where(kept, ordered, -torch.inf)
    return torch.empty_like(logits).scatter_(-1, order, ordered)


def _inverse_cdf(
    logits: Float[Tensor, "B V"], uniforms: Float[Tensor, " B"]
) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
    """Drawn tokens and log of the total weight: one pass over exponents, two short searches."""
    rows, vocabulary = logits.shape
    largest = logits.amax(dim=-1, keepdim=True)
    is_usable = largest.isfinite()
    if not bool(is_usable.all()):
        raise NonFiniteError(
            f"the model's logits are not finite for {int((~is_usable).sum())} of {rows} "
            "completions, so that no token can be drawn. Its weights are damaged or have diverged: "
            "use other weights, or resume from the last checkpoint with a lower learning rate"
        )
    weights = (logits - largest).exp_()
    if vocabulary % _BLOCK:
        weights = functional.pad(weights, (0, _BLOCK - vocabulary % _BLOCK))
    blocks = weights.view(rows, -1, _BLOCK)
    block_sums = blocks.sum(dim=-1)
    cumulative = block_sums.to(uniforms.dtype).cumsum(dim=-1)
    total = cumulative[:, -1:]
    block, rest = _search(cumulative, uniforms[:, None] * total)
    inside = (
        blocks[torch.arange(rows, device=logits.device), block[:, 0]]
        .to(uniforms.dtype)
        .cumsum(dim=-1)
    )
    within, _ = _search(inside, rest)
    log_total = largest[:, 0] + total[:, 0].log().to(logits.dtype)
    return (block * _BLOCK + within)[:, 0], log_total


def _search(
    cumulative: Float[Tensor, "B K"], target: Float[Tensor, "B 1"]
) -> tuple[Int[Tensor, "B 1"], Float[Tensor, "B 1"]]:
    """First place whose cumulative weight exceeds the target, and how far the target lies in it."""
    # Rounding may carry the target to the end of the range, where only zero weights would be left.
    last = torch.nextafter(cumulative[:, -1:], torch.zeros_like(target))
    target = torch.minimum(target, last)
    place = torch.searchsorted(cumulative, target, right=True)
    before = torch.where(place > 0, cumulative.gather(-1, (place - 1).clamp(min=0)), 0.0)
    return place, target - before


def _pick(values: Float[Tensor, "B V"], token_ids: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    return values.gather(-1, token_ids[:, None])[:, 0]
