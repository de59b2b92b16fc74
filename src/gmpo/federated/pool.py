"""The exact geometric mean of the clients' policies, and how far the averaged weights are from it.

    pi_G(v | s) proportional to prod_k pi_k(v | s)^a_k       the log-linear pool, sum_k a_k = 1

is the policy that minimises sum_k a_k KL(pi || pi_k). Its logits are the clients' averaged ones, so
that averaging weights gives it where logits are linear in them, and nearly so after small steps
from a common start. How nearly is measured here, on the next-token distributions of a few items.

Dimensions: **K** clients, **N** positions, **V** vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from gmpo.config import RunConfig
from gmpo.errors import DataError
from gmpo.federated.records import PoolGap
from gmpo.federated.updates import ClientUpdate
from gmpo.policy.load import context_length, load_model, load_tokenizer
from gmpo.records import Prompt
from gmpo.rollouts import PromptRenderer

__all__ = ["log_linear_pool", "measure_gap"]

_MOST_POSITIONS = 256
"""Distributions compared, a client's at a time: 100 MB in fp64 at a vocabulary of 49,152."""


def log_linear_pool(
    log_probs: Iterable[Float[Tensor, "N V"]], weights: Iterable[float]
) -> Float[Tensor, "N V"]:
    """Log-probabilities of the weighted geometric mean of K distributions at each position.

    Args:
        log_probs: of the K distributions, one after another, nats; -inf where one gives no
            probability, which the pool then gives none either.
        weights: at least 0, of sum 1; a distribution of weight 0 has no say.
    """
    terms = (weight * own for own, weight in zip(log_probs, weights, strict=True) if weight > 0)
    return torch.log_softmax(sum(terms, start=torch.zeros(())), dim=-1)


def measure_gap(
    config: RunConfig,
    *,
    base: Path,
    updates: Sequence[ClientUpdate],
    weights: Float[np.ndarray, " K"],
    step_size: float,
    items: Sequence[Prompt],
) -> PoolGap:
    """KL of the model of the aggregated update to the log-linear pool of the clients' models.

    Positions are those of the items' reference answers after their prompts, in fp32.

    Args:
        config: how prompts are put; its device runs the model.
        base: folder of the model that the updates began with.
        updates: of the clients.
        weights: a_k of the aggregated update.
        step_size: that it was multiplied by.
        items: with answers.

    Raises:
        DataError: an item has no answer.
        ModelError: the model cannot be loaded, or an update's file is damaged.
    """
    counted = [(float(a), update) for a, update in zip(weights, updates, strict=True) if a > 0]
    model = load_model(str(base), device=config.model.device, dtype="fp32")
    texts = list(_token_ids(config, base, items, context=context_length(model)))
    start = {name: value.detach().cpu().clone() for name, value in model.named_parameters()}
    _move(model, start, [(step_size * a, update) for a, update in counted])
    new = _next_tokens(model, texts)
    shares = [share for share, _ in counted]
    apart: list[float] = []

    def each() -> Iterator[Tensor]:
        for _, update in counted:
            _move(model, start, [(1.0, update)])
            own = _next_tokens(model, texts)
            apart.append(_mean_kl(new, own))
            yield own

    gap = _mean_kl(new, log_linear_pool(each(), shares))
    spread = sum(share * own for share, own in zip(shares, apart, strict=True))
    return PoolGap(gap=gap, spread=spread, positions=len(new))


def _token_ids(
    config: RunConfig, base: Path, items: Sequence[Prompt], *, context: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Prompt and answer of each item, until there are positions enough."""
    tokenizer = load_tokenizer(str(base))
    renderer = PromptRenderer(
        tokenizer,
        prompt_format=config.model.prompt_format,
        system=config.model.system,
        max_prompt_tokens=context,  # the recipe's limit is for training, as where items are asked
    )
    left = _MOST_POSITIONS
    for item in renderer.render_all(items):
        answer = str(item.columns.get("answer") or "")
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        if not ids:
            raise DataError(f"item {item.id!r} has no answer to compare distributions on")
        assert item.token_ids is not None, "it was rendered"
        if left <= 0:
            return
        yield list(item.token_ids), ids[:left]
        left -= len(ids)


@torch.inference_mode()
def _next_tokens(
    model: PreTrainedModel, texts: Sequence[tuple[list[int], list[int]]]
) -> Float[Tensor, "N V"]:
    """Log-probabilities at the answers' positions, in fp64 on the CPU."""
    found = []
    for prompt, answer in texts:
        ids = torch.tensor([[*prompt, *answer]], device=model.device)
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        found.append(torch.log_softmax(logits.double(), dim=-1).cpu())
    return torch.cat(found)


@torch.no_grad()
def _move(
    model: PreTrainedModel,
    start: dict[str, Tensor],
    counted: Sequence[tuple[float, ClientUpdate]],
) -> None:
    """Set the weights to the start plus a sum of updates."""
    for name, parameter in model.named_parameters():
        moved = start[name].double().flatten()
        for coefficient, update in counted:
            at = 0
            for piece in update.tensors[name].pieces():
                moved[at : at + len(piece)] += coefficient * torch.from_numpy(piece.copy()).double()
                at += len(piece)
        parameter.copy_(moved.view_as(parameter))


def _mean_kl(one: Float[Tensor, "N V"], other: Float[Tensor, "N V"]) -> float:
    """Mean over positions of KL(one || other), nats."""
    terms = torch.where(one > -torch.inf, one.exp() * (one - other), 0.0)
    return max(float(terms.sum(dim=-1).mean()), 0.0)
