"""TRL's GRPO trainer with gmpo's objective as its loss; generation, rewards and steps stay TRL's.

Dimensions: **B** rows of a micro-batch, **T** completion tokens.

The loss is a private method of TRL, so the module is pinned to the release that it was written
against and refuses any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gmpo.errors import ConfigError, DependencyError, NonFiniteError
from gmpo.objective import ObjectiveTerms, gmpo_terms, kl_k3, step_diagnostics, token_mean

__all__ = ["IGNORED_OPTIONS", "TRLGMPOTrainer", "require_trl"]

_TESTED = "1.16"

IGNORED_OPTIONS: Mapping[str, str] = {
    "loss_type": "the loss is GMPO's, always a mean over sequences",
    "importance_sampling_level": "GMPO clips tokens and weighs sequences, there is no choice",
    "delta": "the upper clip of negative advantages is not part of this loss",
    "top_entropy_quantile": "the geometric mean is over all of a completion's tokens",
    "off_policy_mask_threshold": "no sequence is left out of the loss",
    "entropy_coef": "there is no entropy bonus",
    "use_adaptive_entropy": "there is no entropy bonus",
    "entropy_coef_min": "there is no entropy bonus",
    "entropy_coef_max": "there is no entropy bonus",
    "entropy_coef_delta": "there is no entropy bonus",
    "entropy_target": "there is no entropy bonus",
    "sapo_temperature_neg": "the loss is not SAPO's",
    "sapo_temperature_pos": "the loss is not SAPO's",
    "vespo_k_pos": "the loss is not VESPO's",
    "vespo_k_neg": "the loss is not VESPO's",
    "vespo_lambda_pos": "the loss is not VESPO's",
    "vespo_lambda_neg": "the loss is not VESPO's",
}
"""Options of TRL's loss that this one has no use for, and why; only their defaults are allowed."""

# What a vision-language model's forward pass needs beside token ids, by TRL's own names.
_MODEL_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


def require_trl(tested: str) -> None:
    """Check that TRL is there in the tested release.

    Raises:
        DependencyError: it is missing, or of another release.
    """
    try:
        found = version("trl")
    except PackageNotFoundError:
        raise DependencyError(
            f"gmpo.adapters.trl needs trl {tested}; pip install 'gmpo[trl]'"
        ) from None
    if not f"{found}.".startswith(f"{tested}."):
        raise DependencyError(
            f"gmpo.adapters.trl replaces a private method of trl {tested}, but trl {found} is "
            f"installed; pip install 'trl=={tested}.*'"
        )


require_trl(_TESTED)

from trl.experimental.gmpo.gmpo_config import GMPOConfig  # noqa: E402
from trl.trainer.grpo_trainer import GRPOTrainer  # noqa: E402
from trl.trainer.utils import nanmax, nanmin  # noqa: E402

# How a figure of `step_diagnostics` is brought together over processes.
_OVER_PROCESSES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "ratio/min": nanmin,
    "ratio/max": nanmax,
    "ratio/log_q01": torch.nanmean,
    "ratio/log_q50": torch.nanmean,
    "ratio/log_q99": torch.nanmean,
    "ratio/am_gm_gap": torch.nanmean,
    "ratio/effective_sample_fraction": torch.nanmean,
    "clip/low_fraction": torch.nanmean,
    "clip/high_fraction": torch.nanmean,
    "kl_old/k1": torch.nanmean,
}


class TRLGMPOTrainer(GRPOTrainer):  # type: ignore[misc]
    """TRL's `GRPOTrainer` whose loss is `gmpo_terms`; arguments and use are TRL's.

    The loss of an optimizer step is the mean over its rows, whatever the number of micro-batches.
    vLLM's importance weights multiply the advantages, `beta` adds the k3 estimate of the KL to the
    reference (times the ratio with `use_bias_correction_kl`), and rows whose tokens are all masked
    give 0 and are counted.

    Args:
        model: as TRL takes it.
        reward_funcs: as TRL takes them.
        args: `trl.experimental.gmpo.GMPOConfig`, whose `epsilon` is in log space.
        kwargs: the other arguments of TRL's constructor, which refuses unknown ones.

    Raises:
        ConfigError: an option is set that this loss would ignore, or the config is GRPO's.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "gmpo"]

    def __init__(self, model: Any, reward_funcs: Any, args: GMPOConfig, **kwargs: Any) -> None:
        _refuse_ignored_options(args)
        super().__init__(model, reward_funcs, args=args, **kwargs)
        if self.aux_loss_enabled:
            raise ConfigError(
                f"router_aux_loss_coef is {self.router_aux_loss_coef} (the model's own unless "
                "set), but this loss has no auxiliary term; set router_aux_loss_coef=0.0"
            )

    def _compute_loss(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        policy_logprobs, entropies = self._scores(model, inputs)
        mask = _counted_tokens(inputs)
        # A completion cut by the limit may have no token left (`mask_truncated_completions`): it
        # has no mean, so it is left out of the terms and stays in the denominator.
        rows = mask.any(dim=-1)
        old_logprobs = inputs.get("old_per_token_logps")
        if old_logprobs is None:  # TRL's sign that the step is on-policy
            old_logprobs = policy_logprobs.detach()
        terms = gmpo_terms(
            policy_logprobs=policy_logprobs[rows],
            old_logprobs=old_logprobs[rows],
            advantages=_weighted_advantages(inputs)[rows],
            mask=mask[rows],
            clip_low=self.epsilon_low,
            clip_high=self.epsilon_high,
        )
        losses = terms.loss
        if self.beta != 0.0:
            divergence = kl_k3(
                p_logprobs=policy_logprobs[rows],
                q_logprobs=inputs["ref_per_token_logps"][rows],
            )
            if self.args.use_bias_correction_kl:
                divergence = divergence * terms.log_ratio.exp()
            self._log_token_mean("kl", divergence, mask[rows])
            losses = losses + self.beta * token_mean(divergence, mask=mask[rows])
        loss = losses.sum() / len(mask)
        self._require_finite(loss)
        self._log_token_mean("entropy", entropies, mask)
        self._log_terms(terms, mask)
        # TRL's micro-batches of a step are equally large, so a mean of means is the step's mean.
        return loss / self.current_gradient_accumulation_steps if self._mode == "train" else loss

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _scores(
        self, model: Any, inputs: Mapping[str, Any]
    ) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
        """Log-probabilities and entropies of the completions, in nats, by TRL's own forward."""
        logprobs, entropies, _ = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].size(1),
            compute_entropy=True,
            **{name: inputs.get(name) for name in _MODEL_INPUTS},
        )
        return logprobs, entropies

    def _require_finite(self, loss: Tensor) -> None:
        """All processes stop together: one that went on alone would wait for the others."""
        all_losses = self.accelerator.gather(loss.detach().reshape(1))
        if not all_losses.isfinite().all():
            raise NonFiniteError(
                f"the loss is {all_losses.tolist()} (one a process) in step "
                f"{self.state.global_step}; the weights were not moved. Lower the learning rate, "
                "or resume from the last checkpoint"
            )

    def _log_token_mean(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Mean over the counted tokens of all processes; nothing where there are none."""
        local = torch.stack([torch.where(mask, values.detach(), 0.0).sum(), mask.sum().float()])
        total, count = self.accelerator.reduce(local, reduction="sum").tolist()
        if count:
            self._metrics[self._mode][name].append(total / count)

    def _log_terms(self, terms: ObjectiveTerms, mask: Bool[Tensor, "B T"]) -> None:
        """Ratio and clip figures of the micro-batch, and how many rows had no token to count."""
        rows = mask.any(dim=-1)
        # A process without a counted token still takes part in the gather.
        figures = dict.fromkeys(_OVER_PROCESSES, torch.nan)
        if rows.any():
            figures |= step_diagnostics([terms], [mask[rows]])
        local = torch.tensor([*figures.values()], device=mask.device)
        gathered = self.accelerator.gather(local[None])
        metrics = self._metrics[self._mode]
        for place, name in enumerate(figures):
            metrics[name].append(_OVER_PROCESSES[name](gathered[:, place]).item())
        empty = self.accelerator.reduce((~rows).sum(), reduction="sum")
        metrics["rows_without_tokens"].append(float(empty))


def _refuse_ignored_options(args: GMPOConfig) -> None:
    """Check that nothing is asked for that the loss would leave out.

    Raises:
        ConfigError: names the option, its value and what is allowed.
    """
    if not isinstance(args, GMPOConfig):
        raise ConfigError(
            f"args is a {type(args).__name__}, whose epsilon is a half-width of the ratio; GMPO "
            "clips in log space: pass trl.experimental.gmpo.GMPOConfig"
        )
    defaults = {field.name: field.default for field in fields(GMPOConfig)}
    for name, reason in IGNORED_OPTIONS.items():
        value = vars(args)[name]
        if value != defaults[name]:
            raise ConfigError(
                f"{name}={value!r} would have no effect: {reason}; leave it at {defaults[name]!r}"
            )
    mode = args.vllm_importance_sampling_mode
    if args.use_vllm and args.vllm_importance_sampling_correction and mode.startswith("token"):
        raise ConfigError(
            f"vllm_importance_sampling_mode={mode!r} weighs single tokens, but GMPO has one weight "
            "a sequence; use 'sequence_mask' or 'sequence_truncate', or set "
            "vllm_importance_sampling_correction=False"
        )


def _counted_tokens(inputs: Mapping[str, Any]) -> Bool[Tensor, "B T"]:
    """True on completion tokens that the policy sampled: neither padding nor a tool's answer."""
    mask: Tensor = inputs["completion_mask"].bool()
    return mask & inputs["tool_mask"].bool() if "tool_mask" in inputs else mask


def _weighted_advantages(inputs: Mapping[str, Any]) -> Float[Tensor, " B"]:
    """Advantages times vLLM's weight of each sequence, where there is one.

    The weight is at least 0, so it changes no sign; a weight of 0 makes the row's loss exactly 0
    even where its ratio overflows.
    """
    advantages: Tensor = inputs["advantages"]
    if "importance_sampling_ratio" not in inputs:
        return advantages
    weights: Tensor = inputs["importance_sampling_ratio"]
    return advantages * weights.squeeze(1)
