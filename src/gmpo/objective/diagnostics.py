"""What an optimizer step did, from the tensors its loss used.

Dimensions: **B** sequences, **T** completion tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gmpo.objective.kl import kl_k1
from gmpo.objective.ratio import ObjectiveTerms, token_mean

__all__ = ["am_gm_gap", "effective_sample_fraction", "step_diagnostics"]


def step_diagnostics(
    terms: Sequence[ObjectiveTerms], masks: Sequence[Bool[Tensor, "_ _"]]
) -> dict[str, float]:
    """Ratio, clip and KL figures over all counted tokens of one optimizer step.

    Ratios are those before the clip. A token counts as clipped only if the clip changed it. The
    result does not depend on how the step was cut into micro-batches.

    Args:
        terms: one record a micro-batch, gradients ignored.
        masks: the masks the losses used, in the same order; each micro-batch has its own shape.

    Raises:
        ValueError: there is no micro-batch; a step of dead groups has no ratios to describe.
    """
    if not terms:
        raise ValueError("step_diagnostics needs at least one micro-batch, got none")
    # float64 on the host: one device read a micro-batch, and exp does not overflow at 100 nats.
    log_ratios = [term.log_ratio.detach().cpu().double() for term in terms]
    host_masks = [mask.cpu() for mask in masks]
    flat = torch.cat([lr[mask] for lr, mask in zip(log_ratios, host_masks, strict=True)])
    quantiles = torch.quantile(flat, torch.tensor([0.01, 0.5, 0.99], dtype=torch.float64))
    gaps = torch.cat(
        [am_gm_gap(lr, mask=mask) for lr, mask in zip(log_ratios, host_masks, strict=True)]
    )
    num_clipped_low = sum(int(term.clipped_low.sum()) for term in terms)
    num_clipped_high = sum(int(term.clipped_high.sum()) for term in terms)
    zeros = torch.zeros_like(flat)[None]
    return {
        "ratio/min": flat.min().exp().item(),
        "ratio/max": flat.max().exp().item(),
        "ratio/log_q01": quantiles[0].item(),
        "ratio/log_q50": quantiles[1].item(),
        "ratio/log_q99": quantiles[2].item(),
        "ratio/am_gm_gap": gaps.mean().item(),
        "ratio/effective_sample_fraction": effective_sample_fraction(flat).item(),
        "clip/low_fraction": num_clipped_low / len(flat),
        "clip/high_fraction": num_clipped_high / len(flat),
        "kl_old/k1": kl_k1(p_logprobs=zeros, q_logprobs=flat[None]).mean().item(),
    }


def am_gm_gap(log_ratio: Float[Tensor, "B T"], *, mask: Bool[Tensor, "B T"]) -> Float[Tensor, " B"]:
    """log of arithmetic over geometric mean of each sequence's ratios; >= 0, about Var(l) / 2.

    Zero means that GRPO and GMPO give the sequence the same weight.
    """
    geometric = token_mean(log_ratio, mask=mask)
    num_tokens = mask.sum(dim=-1).to(log_ratio.dtype)
    arithmetic = torch.where(mask, log_ratio, -torch.inf).logsumexp(dim=-1) - num_tokens.log()
    return (arithmetic - geometric).clamp(min=0.0)


def effective_sample_fraction(log_ratio: Float[Tensor, " N"]) -> Float[Tensor, ""]:
    """(sum r)^2 / (N * sum r^2), in (0, 1]: the share of tokens that still carry weight."""
    num_tokens = torch.tensor(float(len(log_ratio)), dtype=log_ratio.dtype)
    return (2 * log_ratio.logsumexp(0) - (2 * log_ratio).logsumexp(0) - num_tokens.log()).exp()
