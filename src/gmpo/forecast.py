"""What a recipe will need, before anything of it runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gmpo.config import RunConfig
from gmpo.errors import ModelError
from gmpo.inputs import resolve_model
from gmpo.policy.load import load_tokenizer, model_folder
from gmpo.rollouts import PromptRenderer
from gmpo.task_table import build_task

__all__ = ["Forecast", "forecast"]

_GIB = 2**30
_LIBRARIES_GIB = 0.6
"""Resident memory of Python, torch and transformers before any weight is loaded."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Estimated needs of a run; memory is an estimate, token counts are upper bounds.

    Attributes:
        num_parameters: weights of the model.
        train_items: training prompts.
        held_out_items: items of the evaluations before and after.
        longest_prompt_tokens: of the training prompts.
        completion_tokens_per_round: if every completion ran to its limit.
        prompt_tokens_per_round: prompts run once a group.
        optimizer_steps: of the whole run.
        weights_gib: weights, gradients and AdamW's moments; a compute copy if bf16, the reference
            if there is a KL term, a second gradient if its cosine to GRPO's is measured.
        activations_gib: of one micro-batch's forward and backward pass.
        sampler_gib: keys and values of the rows decoded at once, and their logits.
        total_gib: all of these with the libraries.
    """

    num_parameters: int
    train_items: int
    held_out_items: int
    longest_prompt_tokens: int
    completion_tokens_per_round: int
    prompt_tokens_per_round: int
    optimizer_steps: int
    weights_gib: float
    activations_gib: float
    sampler_gib: float
    total_gib: float

    def as_dict(self) -> dict[str, Any]:
        """Figures for JSON."""
        return asdict(self)


def forecast(config: RunConfig) -> Forecast:
    """Estimate a run's memory and tokens from its recipe, the model's shape and the prompts.

    Raises:
        gmpo.errors.GmpoError: the model, task or a prompt is not usable as the recipe wants it.
    """
    config = config.model_copy(update={"model": resolve_model(config.model)})
    task = build_task(config.task)
    sampling, training = config.sampling, config.training
    renderer = PromptRenderer(
        load_tokenizer(config.model.name),
        prompt_format=config.model.prompt_format,
        system=config.model.system,
        max_prompt_tokens=config.max_prompt_tokens(),
    )
    lengths = [len(renderer.render(prompt).token_ids or ()) for prompt in task.train]
    longest = max(lengths)
    shape, num_parameters = _shape(config.model.name)
    width = 2 if config.model.dtype == "bf16" else 4
    # fp32 weights, gradients and two moments; bf16 adds a compute copy and its gradients.
    per_weight = 16 + (4 if width == 2 else 0)
    per_weight += width if config.objective.kl_coefficient else 0
    per_weight += 4 if training.gradient_cosine_every else 0
    weights = num_parameters * per_weight / _GIB
    rows = sampling.max_rows
    cache_tokens = rows * (longest + sampling.max_new_tokens)
    sampler = (
        cache_tokens * 2 * shape.key_value_size * shape.layers * width
        + 3 * rows * shape.vocabulary * 4
    ) / _GIB
    micro_batch = min(
        training.max_tokens_per_micro_batch,
        sampling.prompts_per_round
        // training.steps_per_round
        * (longest + sampling.group_size * sampling.max_new_tokens),
    )
    # Kept for the backward pass of a layer: about ten hidden-sized and five feed-forward tensors.
    kept = (10 * shape.hidden + 5 * shape.feed_forward) * shape.layers * width
    activations = (micro_batch * kept + 3 * 256 * shape.vocabulary * 4) / _GIB
    evaluation = config.evaluation.items
    held_out = len(task.held_out) if evaluation is None else min(evaluation, len(task.held_out))
    return Forecast(
        num_parameters=num_parameters,
        train_items=len(task.train),
        held_out_items=held_out,
        longest_prompt_tokens=longest,
        completion_tokens_per_round=sampling.most_prompts()
        * sampling.group_size
        * sampling.max_new_tokens,
        prompt_tokens_per_round=sampling.most_prompts() * longest,
        optimizer_steps=training.rounds * training.steps_per_round,
        weights_gib=weights,
        activations_gib=activations,
        sampler_gib=sampler,
        total_gib=weights + activations + sampler + _LIBRARIES_GIB,
    )


@dataclass(frozen=True, kw_only=True)
class _Shape:
    layers: int
    hidden: int
    feed_forward: int
    key_value_size: int
    vocabulary: int


def _shape(name: str) -> tuple[_Shape, int]:
    """Sizes of a model without its weights."""
    try:
        config = AutoConfig.from_pretrained(model_folder(name))
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ModelError(
            f"cannot read the configuration of model {name!r}: {first_line}; give a hub name or a "
            "folder with config.json"
        ) from None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    sizes = config.to_dict()
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_size = sizes.get("head_dim") or hidden // heads
    key_value_heads = sizes.get("num_key_value_heads") or heads
    shape = _Shape(
        layers=config.num_hidden_layers,
        hidden=hidden,
        feed_forward=sizes.get("intermediate_size") or 4 * hidden,
        key_value_size=key_value_heads * head_size,
        vocabulary=config.vocab_size,
    )
    return shape, sum(parameter.numel() for parameter in model.parameters())
