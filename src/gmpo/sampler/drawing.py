"""Tokens drawn from logits with given uniforms, through the inverse CDF.

Dimensions: **B** sequences, **V** vocabulary, **K** blocks of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gmpo.errors import AFTER_DIVERGING, NonFiniteError
from gmpo.policy.head import widened

__all__ = ["Draw", "draw_tokens", "truncate_logits"]

_BLOCK = 256
"""Vocabulary entries summed together: the CDF is searched by block first, then inside one."""
_ROWS = 8
"""Rows whose logits exist in fp32 at once on a CPU: few enough for its cache. Other devices take
all rows at once, since there each operation has to be started."""


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

    Settings of a GPU had better lie on the CPU, where what they decide is known without waiting.

    Args:
        logits: of the unmodified model; a CPU widens bf16 a few rows at a time.
        uniforms: in [0, 1), where the logits are; their precision is that of the cumulative sums.
        temperature: divides the logits; 0 takes the likeliest token. It, `top_p` and `top_k` lie on
            the CPU or where the logits are.
        top_p: in (0, 1]; 1 keeps all.
        top_k: 0 keeps all.

    Raises:
        NonFiniteError: a row has a NaN, a positive infinity, or nothing but negative ones.
    """
    device = logits.device
    greedy = temperature == 0
    is_any_greedy = bool(greedy.any())
    scale = None
    modified = logits
    if not bool((greedy | (temperature == 1)).all()):
        scale = torch.where(greedy, 1.0, temperature).to(widened(logits[:0]).dtype)[:, None]
        scale = scale.to(device)
    is_truncated = not bool(((top_p == 1) & (top_k == 0)).all())
    if is_truncated:
        modified = widened(logits) if scale is None else widened(logits) / scale
        modified = truncate_logits(modified, top_p=top_p.to(device), top_k=top_k.to(device))
        scale = None
    sums = _block_sums(modified, scale)
    token_ids, log_total = _inverse_cdf(modified, uniforms, scale, sums)
    plain_total = log_total if sums.plain_total is None else sums.plain_total
    greedy = greedy.to(device)
    if is_any_greedy:
        token_ids = torch.where(greedy, logits.argmax(dim=-1), token_ids)
    chosen = _pick(logits, token_ids)
    if is_truncated:
        plain_total = widened(logits).logsumexp(dim=-1)
    sampled = _pick(modified, token_ids)
    if scale is not None:
        sampled = sampled / scale[:, 0]
    # Last, because it waits for the device.
    _require_finite(sums.largest)
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


@dataclass(frozen=True, kw_only=True)
class _BlockSums:
    """Of scaled logits.

    Attributes:
        largest: of each row.
        sums: of exponents relative to the largest, a block each.
        plain_total: logsumexp of the logits not divided by scale; None without a scale, where it
            follows from the others.
    """

    largest: Float[Tensor, "B 1"]
    sums: Float[Tensor, "B K"]
    plain_total: Float[Tensor, " B"] | None


def _inverse_cdf(
    logits: Float[Tensor, "B V"],
    uniforms: Float[Tensor, " B"],
    scale: Float[Tensor, "B 1"] | None,
    blocks: _BlockSums,
) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
    """Drawn tokens and the log of the total weight, by two short searches.

    Rows that are not finite get any token of the vocabulary.
    """
    cumulative = blocks.sums.to(uniforms.dtype).cumsum(dim=-1)
    total = cumulative[:, -1:]
    block, rest = _search(cumulative, uniforms[:, None] * total)
    vocabulary = logits.shape[-1]
    places = block * _BLOCK + torch.arange(_BLOCK, device=logits.device)
    of_block = widened(logits.gather(-1, places.clamp(max=vocabulary - 1)))
    if scale is not None:
        of_block = of_block / scale
    weights = torch.where(places < vocabulary, (of_block - blocks.largest).exp(), 0.0)
    within, _ = _search(weights.to(uniforms.dtype).cumsum(dim=-1), rest)
    log_total = blocks.largest[:, 0] + total[:, 0].log().to(blocks.largest.dtype)
    token_ids = (block * _BLOCK + within)[:, 0].clamp(max=vocabulary - 1)
    return token_ids, log_total


def _block_sums(logits: Float[Tensor, "B V"], scale: Float[Tensor, "B 1"] | None) -> _BlockSums:
    """One pass over exponents."""
    rows, vocabulary = logits.shape
    at_once = _ROWS if logits.device.type == "cpu" else max(rows, 1)
    # One buffer for all rows: fresh memory would cost more than the arithmetic.
    width = -(-vocabulary // _BLOCK) * _BLOCK
    buffer = widened(logits[:0]).new_zeros(at_once, width)
    largest, sums, plain_totals = [], [], []
    for first in range(0, rows, at_once):
        some = logits[first : first + at_once]
        padded = buffer[: len(some)]
        wide = padded[:, :vocabulary].copy_(some)
        if scale is not None:
            plain_totals.append(wide.logsumexp(dim=-1))
            wide.div_(scale[first : first + at_once])
        largest.append(wide.amax(dim=-1, keepdim=True))
        wide.sub_(largest[-1]).exp_()
        sums.append(padded.view(len(some), -1, _BLOCK).sum(dim=-1))
    return _BlockSums(
        largest=torch.cat(largest),
        sums=torch.cat(sums),
        plain_total=torch.cat(plain_totals) if plain_totals else None,
    )


def _require_finite(largest: Float[Tensor, "B 1"]) -> None:
    is_usable = largest.isfinite()
    if not bool(is_usable.all()):
        raise NonFiniteError(
            f"the model's logits are not finite for {int((~is_usable).sum())} of {len(largest)} "
            "completions, so that no token can be drawn. Its weights are damaged or have diverged: "
            f"use other weights. {AFTER_DIVERGING}"
        )


def _search(
    cumulative: Float[Tensor, "B K"], target: Float[Tensor, "B 1"]
) -> tuple[Int[Tensor, "B 1"], Float[Tensor, "B 1"]]:
    """First place whose cumulative weight exceeds the target, and how far the target lies in it."""
    # Rounding may carry the target to the end of the range, where only zero weights would be left.
    last = torch.nextafter(cumulative[:, -1:], torch.zeros_like(target))
    target = torch.minimum(target, last)
    # Without a target that compares, nothing would be found, and indexing beyond ends a GPU's run.
    place = torch.searchsorted(cumulative, target, right=True).clamp(max=cumulative.shape[-1] - 1)
    before = torch.where(place > 0, cumulative.gather(-1, (place - 1).clamp(min=0)), 0.0)
    return place, target - before


def _pick(values: Float[Tensor, "B V"], token_ids: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    return widened(values.gather(-1, token_ids[:, None])[:, 0])
