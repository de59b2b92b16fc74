"""A policy loss named `gmpo` for verl's registry, normalised over the whole mini-batch.

Dimensions: **B** rows of a micro-batch, **T** response tokens.

verl's engine adds the losses of a mini-batch's micro-batches up, and its own `geo_mean` (0.9.1)
returns each one's mean: with n micro-batches the gradient is n times too large, and with uneven
ones a row's weight depends on its neighbours (verl issue 7913). This loss divides by the
mini-batch's number of rows instead, as verl's other losses do.

Where verl is installed, importing this module registers the loss:

    VERL_USE_EXTERNAL_MODULES=gmpo.adapters.verl
    actor_rollout_ref.actor.policy_loss.loss_mode=gmpo
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gmpo.errors import ConfigError, DataError, DependencyError
from gmpo.objective import ObjectiveTerms, gmpo_terms, step_diagnostics, token_mean

__all__ = ["ActorOptions", "gmpo_policy_loss", "register"]

_LOSS_MODE = "gmpo"

# verl's name for a figure, its name here, and its value where no token counts. verl wants the same
# keys of every micro-batch of every process, and averages them.
_FIGURES: tuple[tuple[str, str, float], ...] = (
    ("actor/pg_clipfrac", "clip/high_fraction", 0.0),
    ("actor/pg_clipfrac_lower", "clip/low_fraction", 0.0),
    ("actor/ppo_kl", "kl_old/k1", 0.0),
    ("actor/ratio_min", "ratio/min", 1.0),
    ("actor/ratio_max", "ratio/max", 1.0),
)


class ActorOptions(Protocol):
    """What is read of verl's `ActorConfig`.

    Attributes:
        clip_ratio_low: lower half-width in log space; verl's default is 0.2, the paper's 0.4.
        clip_ratio_high: upper half-width in log space.
        global_batch_info: holds `global_batch_size`, the rows of the mini-batch over all
            processes, and `dp_size`; verl's `ppo_loss` fills it for every micro-batch.
    """

    clip_ratio_low: float
    clip_ratio_high: float
    global_batch_info: Mapping[str, Any]


def gmpo_policy_loss(  # noqa: PLR0913  verl calls it with these
    old_log_prob: Float[Tensor, "B T"],
    log_prob: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    response_mask: Bool[Tensor, "B T"],
    loss_agg_mode: str = "token-mean",
    config: ActorOptions | None = None,
    rollout_is_weights: Float[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, ""], dict[str, float]]:
    """A micro-batch's share of the mini-batch's mean loss, and its figures.

    The sum over the mini-batch's micro-batches, averaged over processes, is the mean of
    `gmpo_terms` over all its rows. Arguments come in verl's order and by its names.

    Args:
        old_log_prob: under the policy that the round began with, in nats.
        log_prob: under the current policy, in nats; the only one that carries gradient.
        advantages: one value a row, repeated over its tokens.
        response_mask: 1 on tokens that count. A row without any gives 0 and is counted.
        loss_agg_mode: how verl aggregates its KL and entropy terms; this loss is always a mean
            over rows.
        config: verl's `ActorConfig`, see `ActorOptions`.
        rollout_is_weights: verl's correction for the rollout engine; each row's loss is multiplied
            by the geometric mean of its tokens' weights.

    Raises:
        ConfigError: `config` or the mini-batch's size is missing.
        DataError: a row's tokens have different advantages, which GMPO has no form for.
    """
    if config is None:
        raise ConfigError(f"loss_mode={_LOSS_MODE!r} needs verl's actor config, got config=None")
    global_batch_size, dp_size = _mini_batch_rows(config)
    mask = response_mask.bool()
    rows = mask.any(dim=-1)
    of_rows = _row_advantages(advantages[rows], mask=mask[rows])
    if rollout_is_weights is not None:
        of_rows = of_rows * token_mean(rollout_is_weights[rows].log(), mask=mask[rows]).exp()
    terms = gmpo_terms(
        policy_logprobs=log_prob[rows],
        old_logprobs=old_log_prob[rows],
        advantages=of_rows,
        mask=mask[rows],
        clip_low=config.clip_ratio_low,
        clip_high=config.clip_ratio_high,
    )
    # Processes average their gradients, so each one's sum is taken dp_size times.
    loss = terms.loss.sum() / global_batch_size * dp_size
    return loss, _figures(terms, mask)


def register() -> None:
    """Add the loss to verl's registry.

    Raises:
        DependencyError: verl is not installed.
    """
    if find_spec("verl") is None:
        raise DependencyError(
            "gmpo.adapters.verl needs verl to register its loss with; pip install verl "
            "(tested with 0.9.1), which wants an environment of its own"
        )
    from verl.trainer.ppo.core_algos import register_policy_loss

    add: Callable[[object], object] = register_policy_loss(_LOSS_MODE)
    add(gmpo_policy_loss)


def _mini_batch_rows(config: ActorOptions) -> tuple[int, int]:
    info = config.global_batch_info
    if info.get("global_batch_size") is None:
        raise ConfigError(
            f"config.global_batch_info is {dict(info)}, without a global_batch_size: the rows of "
            "the whole mini-batch, which verl's ppo_loss sets; without it the loss would depend on "
            "the cut into micro-batches"
        )
    return info["global_batch_size"], info.get("dp_size", 1)


def _row_advantages(
    advantages: Float[Tensor, "R T"], *, mask: Bool[Tensor, "R T"]
) -> Float[Tensor, " R"]:
    """The one value of each row, exactly: a mean of equal values may be off by rounding."""
    first = advantages.gather(1, mask.int().argmax(dim=-1, keepdim=True))
    differs = (mask & (advantages != first)).any(dim=-1)
    if differs.any():
        raise DataError(
            f"rows {torch.nonzero(differs).flatten().tolist()[:5]} of the micro-batch have "
            "different advantages on their tokens, but GMPO has one a sequence; use an estimator "
            "of whole responses, such as algorithm.adv_estimator=grpo"
        )
    return first[:, 0]


def _figures(terms: ObjectiveTerms, mask: Bool[Tensor, "B T"]) -> dict[str, float]:
    rows = mask.any(dim=-1)
    found = step_diagnostics([terms], [mask[rows]]) if rows.any() else {}
    figures = {name: found.get(own, empty) for name, own, empty in _FIGURES}
    return {**figures, "actor/rows_without_tokens": float((~rows).sum())}


if find_spec("verl") is not None:
    register()
