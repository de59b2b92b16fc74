"""Tokens drawn from logits with given uniforms, through the inverse CDF.

Dimensions: **B** sequences, **V** vocabulary, **K** blocks of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gmpo.errors import NonFiniteError
from gmpo.policy.head import widened

__all__ = ["Draw", "draw_tokens", "truncate_logits"]

_BLOCK = 256
"""Vocabulary entries summed together: the CDF is searched by block first, then inside one."""
_ROWS = 8
"""Rows whose logits exist in fp32 at once: few enough for a processor's cache."""


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
        logits: of the unmodified model; bf16 is widened a few rows at a time.
        uniforms: in [0, 1); their precision is that of the cumulative sums.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: in (0, 1]; 1 keeps all.
        top_k: 0 keeps all.

    Raises:
        NonFiniteError: a row has a NaN, a positive infinity, or nothing but negative ones.
    """
    greedy = temperature == 0
    scale = None
    modified = logits
    if not bool((greedy | (temperature == 1)).all()):
        scale = torch.where(greedy, 1.0, temperature).to(widened(logits[:0]).dtype)[:, None]
    is_truncated = not bool(((top_p == 1) & (top_k == 0)).all())
    if is_truncated:
        modified = widened(logits) if scale is None else widened(logits) / scale
        modified, scale = truncate_logits(modified, top_p=top_p, top_k=top_k), None
    token_ids, log_total, plain_total = _inverse_cdf(modified, uniforms, scale)
    if bool(greedy.any()):
        token_ids = torch.where(greedy, logits.argmax(dim=-1), token_ids)
    chosen = _pick(logits, token_ids)
    if is_truncated:
        plain_total = widened(logits).logsumexp(dim=-1)
    sampled = _pick(modified, token_ids)
    if scale is not None:
        sampled = sampled / scale[:, 0]
    return Draw(
        token_ids=token_ids,
        logprobs=chosen - plain_total,
        sampled_logprobs=torch.where(greedy, 0.0, sampled - log_total),
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
    # The smallest top_p round to 0 here, and the likeliest token stays for them too.
    in_set = (likelier < top_p[:, None].to(logits.dtype)) | (rank == 0)[None]
    kept &= in_set | (top_p == 1)[:, None]
    ordered = torch.where(kept, ordered, -torch.inf)
    return torch.empty_like(logits).scatter_(-1, order, ordered)


def _inverse_cdf(
    logits: Float[Tensor, "B V"], uniforms: Float[Tensor, " B"], scale: Float[Tensor, "B 1"] | None
) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"], Float[Tensor, " B"]]:
    """Drawn tokens, log of the total weight, and the same with the logits not divided by scale.

    One pass over exponents, then two short searches.
    """
    largest, block_sums, plain_total = _block_sums(logits, scale)
    cumulative = block_sums.to(uniforms.dtype).cumsum(dim=-1)
    total = cumulative[:, -1:]
    block, rest = _search(cumulative, uniforms[:, None] * total)
    vocabulary = logits.shape[-1]
    places = block * _BLOCK + torch.arange(_BLOCK, device=logits.device)
    of_block = widened(logits.gather(-1, places.clamp(max=vocabulary - 1)))
    if scale is not None:
        of_block = of_block / scale
    weights = torch.where(places < vocabulary, (of_block - largest).exp(), 0.0)
    within, _ = _search(weights.to(uniforms.dtype).cumsum(dim=-1), rest)
    log_total = largest[:, 0] + total[:, 0].log().to(largest.dtype)
    token_ids = (block * _BLOCK + within)[:, 0]
    return token_ids, log_total, log_total if plain_total is None else plain_total


def _block_sums(
    logits: Float[Tensor, "B V"], scale: Float[Tensor, "B 1"] | None
) -> tuple[Float[Tensor, "B 1"], Float[Tensor, "B K"], Float[Tensor, " B"] | None]:
    """Largest scaled logit, sums of exponents a block relative to it, and the unscaled logsumexp.

    The last is None without a scale, where it follows from the others.
    """
    vocabulary = logits.shape[-1]
    # One buffer for all rows: fresh memory would cost more than the arithmetic.
    width = -(-vocabulary // _BLOCK) * _BLOCK
    buffer = widened(logits[:0]).new_zeros(_ROWS, width)
    largest, sums, plain_totals = [], [], []
    for first in range(0, len(logits), _ROWS):
        some = logits[first : first + _ROWS]
        padded = buffer[: len(some)]
        wide = padded[:, :vocabulary].copy_(some)
        if scale is not None:
            plain_totals.append(wide.logsumexp(dim=-1))
            wide.div_(scale[first : first + _ROWS])
        largest.append(wide.amax(dim=-1, keepdim=True))
        wide.sub_(largest[-1]).exp_()
        sums.append(padded.view(len(some), -1, _BLOCK).sum(dim=-1))
    all_largest = torch.cat(largest)
    is_usable = all_largest.isfinite()
    if not bool(is_usable.all()):
        raise NonFiniteError(
            f"the model's logits are not finite for {int((~is_usable).sum())} of {len(logits)} "
            "completions, so that no token can be drawn. Its weights are damaged or have diverged: "
            "use other weights, or resume from the last checkpoint with a lower learning rate"
        )
    return all_largest, torch.cat(sums), torch.cat(plain_totals) if plain_totals else None


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
    return widened(values.gather(-1, token_ids[:, None])[:, 0])
