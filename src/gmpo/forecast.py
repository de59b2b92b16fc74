"""What memory a run will need, by arithmetic, before anything of it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gmpo.assembly import RunInputs, read_inputs
from gmpo.batch import split_steps
from gmpo.config import RunConfig
from gmpo.errors import ConfigError, ModelError
from gmpo.memory import (
    GIB,
    ModelShape,
    activation_bytes,
    available_bytes,
    cache_bytes,
    head_bytes,
    largest_micro_batch,
    resident_bytes,
    sampling_bytes,
    weight_bytes,
)
from gmpo.policy.llama import why_unsupported
from gmpo.policy.load import model_folder
from gmpo.records import Prompt
from gmpo.tasks import few_shot_prompt

__all__ = [
    "Forecast",
    "forecast",
    "forecast_inputs",
    "free_bytes",
    "require_memory",
]


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Needs of a run if every completion ran to its limit and every group were live.

    Attributes:
        num_parameters: weights of the model.
        train_items: training prompts.
        held_out_items: items of the evaluations before and after.
        longest_prompt_tokens: of the prompts that the run's rounds will take.
        completion_tokens_per_round: if every completion ran to its limit.
        prompt_tokens_per_round: prompts run once a group.
        optimizer_steps: of the whole run.
        process_gib: what the process holds before the model is loaded; 0 on an accelerator.
        weights_gib: weights, gradients and AdamW's moments; a compute copy if bf16, the reference
            if there is a KL term, a second gradient if its cosine to GRPO's is measured.
        cache_gib: the sampler's keys and values, which stay between rounds.
        update_gib: what the largest micro-batch takes for a moment.
        sampling_gib: what sampling takes for a moment.
        peak_gib: what stays, and the larger of the two that do not; a checkpoint copies nothing.
    """

    num_parameters: int
    train_items: int
    held_out_items: int
    longest_prompt_tokens: int
    completion_tokens_per_round: int
    prompt_tokens_per_round: int
    optimizer_steps: int
    process_gib: float
    weights_gib: float
    cache_gib: float
    update_gib: float
    sampling_gib: float
    peak_gib: float

    def as_dict(self) -> dict[str, Any]:
        """Figures for JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class _Lengths:
    """Prompt lengths in tokens.

    Attributes:
        steps: the longest prompt of each optimizer step of the run, each length once.
        evaluated: the longest prompt of any evaluation, with its examples.
    """

    steps: frozenset[int]
    evaluated: int

    @property
    def trained(self) -> int:
        """The longest prompt of the run's rounds."""
        return max(self.steps)


def forecast(config: RunConfig) -> Forecast:
    """A run's memory and tokens from its recipe, the model's shape and the prompts.

    Raises:
        gmpo.errors.GmpoError: the model, task or a prompt is not usable as the recipe wants it.
    """
    return forecast_inputs(read_inputs(config))


def forecast_inputs(inputs: RunInputs) -> Forecast:
    """`forecast` of what has been read already."""
    config = inputs.config
    sampling, training = config.sampling, config.training
    lengths = _lengths(inputs)
    return Forecast(
        **_memory(config, _model_shape(config), lengths, process=_process_bytes(config)),
        train_items=inputs.train_items,
        held_out_items=len(inputs.held_out),
        longest_prompt_tokens=lengths.trained,
        completion_tokens_per_round=sampling.prompts_per_round
        * sampling.group_size
        * sampling.max_new_tokens,
        prompt_tokens_per_round=sampling.prompts_per_round * lengths.trained,
        optimizer_steps=training.rounds * training.steps_per_round,
    )


def require_memory(inputs: RunInputs, needs: Forecast, *, free: int | None) -> None:
    """Refuse a run that cannot fit, and say what to lower to which value.

    Args:
        inputs: of the run.
        needs: its forecast.
        free: bytes that this process may still take; None where that is not known.

    Raises:
        ConfigError: it needs more than there is, and the recipe does not say to go on anyway.
    """
    wanted = needs.peak_gib - needs.process_gib
    if not inputs.config.training.refuse_beyond_memory or free is None or wanted * GIB <= free:
        return
    raise ConfigError(
        f"the run needs about {wanted:.2f} GiB of memory and {free / GIB:.2f} GiB are free "
        f"(weights, gradients and moments {needs.weights_gib:.2f}, sampler's cache "
        f"{needs.cache_gib:.2f}, micro-batch {needs.update_gib:.2f}); {_remedy(inputs, free)}, or "
        "set training.refuse_beyond_memory = false to try anyway"
    )


def free_bytes(device: torch.device) -> int | None:
    """What this process may still take where the model will lie; None if that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_bytes()


def _model_shape(config: RunConfig) -> ModelShape:
    """Sizes of the recipe's model, without its weights.

    Raises:
        ModelError: its configuration cannot be read.
    """
    name = config.model.name
    try:
        sizes_of = AutoConfig.from_pretrained(model_folder(name))
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ModelError(
            f"cannot read the configuration of model {name!r}: {first_line}; give a hub name or a "
            "folder with config.json"
        ) from None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(sizes_of)
    sizes = sizes_of.to_dict()
    hidden, heads = sizes_of.hidden_size, sizes_of.num_attention_heads
    return ModelShape(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=sizes_of.num_hidden_layers,
        hidden=hidden,
        feed_forward=sizes.get("intermediate_size") or 4 * hidden,
        heads=heads,
        key_value_heads=sizes.get("num_key_value_heads") or heads,
        head_size=sizes.get("head_dim") or hidden // heads,
        vocabulary=sizes_of.vocab_size,
        width=2 if config.model.dtype == "bf16" else 4,
        is_fast=config.training.engine == "fast" and why_unsupported(model) is None,
    )


def _memory(
    config: RunConfig, shape: ModelShape, lengths: _Lengths, *, process: int
) -> dict[str, Any]:
    """The memory figures of a `Forecast`."""
    sampling, evaluation = config.sampling, config.evaluation
    weights = weight_bytes(
        shape,
        has_reference=config.objective.kl_coefficient > 0,
        keeps_second_gradient=0 < config.training.gradient_cosine_every <= config.training.rounds,
    )
    positions = max(
        lengths.trained + sampling.max_new_tokens,
        lengths.evaluated + (evaluation.max_new_tokens or sampling.max_new_tokens),
    )
    rows = sampling.max_rows
    cache = cache_bytes(shape, rows=rows, positions=positions)
    update = max(_update_bytes(config, shape, prompt_tokens=n) for n in lengths.steps)
    longest = max(lengths.trained, lengths.evaluated)
    drawing = sampling_bytes(shape, rows=rows, prompt_tokens=longest)
    # A cache that grows is there twice for a moment.
    sampling_peak = drawing + cache
    peak = process + weights + cache + max(update, sampling_peak)
    return {
        "num_parameters": shape.num_parameters,
        "process_gib": process / GIB,
        "weights_gib": weights / GIB,
        "cache_gib": cache / GIB,
        "update_gib": update / GIB,
        "sampling_gib": sampling_peak / GIB,
        "peak_gib": peak / GIB,
    }


def _update_bytes(config: RunConfig, shape: ModelShape, *, prompt_tokens: int) -> int:
    """Of the largest micro-batch of a step with prompts of that length."""
    sampling, training = config.sampling, config.training
    size = largest_micro_batch(
        max_tokens=training.max_tokens_per_micro_batch,
        group_size=sampling.group_size,
        groups=sampling.prompts_per_round // training.steps_per_round,
        prompt_tokens=prompt_tokens,
        completion_tokens=sampling.max_new_tokens,
        shares_prompts=shape.is_fast,
    )
    return activation_bytes(shape, size) + head_bytes(shape, size)


def _lengths(inputs: RunInputs) -> _Lengths:
    config, renderer, examples = inputs.config, inputs.renderer, inputs.examples
    asked = list(inputs.held_out)
    if examples:
        asked += [few_shot_prompt(prompt, examples) for prompt in inputs.held_out]
    rounds = (inputs.prompts.take(number) for number in range(config.training.rounds))
    return _Lengths(
        steps=frozenset(
            max(_length(prompts[place]) for place in places)
            for prompts in rounds
            for places in split_steps(len(prompts), steps_per_round=config.training.steps_per_round)
        ),
        evaluated=max(_length(renderer.render(prompt)) for prompt in asked),
    )


def _length(prompt: Prompt) -> int:
    assert prompt.token_ids is not None, "prompts are rendered before they are counted"
    return len(prompt.token_ids)


def _process_bytes(config: RunConfig) -> int:
    return 0 if config.model.device == "cuda" else resident_bytes()


def _remedy(inputs: RunInputs, free: int) -> str:
    """The largest values of the keys that cost nothing but time with which the run would fit."""
    shape, lengths = _model_shape(inputs.config), _lengths(inputs)

    def needed(config: RunConfig) -> float:
        figures = _memory(config, shape, lengths, process=0)
        return float(figures["peak_gib"]) * GIB

    def with_values(tokens: int, rows: int) -> RunConfig:
        config = inputs.config
        training = config.training.model_copy(update={"max_tokens_per_micro_batch": tokens})
        sampling = config.sampling.model_copy(update={"max_rows": rows})
        return config.model_copy(update={"training": training, "sampling": sampling})

    most_tokens = inputs.config.training.max_tokens_per_micro_batch
    most_rows = inputs.config.sampling.max_rows
    tokens = _largest(most_tokens, lambda n: needed(with_values(n, most_rows)) <= free)
    if tokens:
        return f"training.max_tokens_per_micro_batch = {tokens} would fit"
    rows = _largest(most_rows, lambda n: needed(with_values(most_tokens, n)) <= free)
    if rows:
        return f"sampling.max_rows = {rows} would fit"
    rows = _largest(most_rows, lambda n: needed(with_values(1, n)) <= free)
    if rows:
        tokens = _largest(most_tokens, lambda n: needed(with_values(n, rows)) <= free)
        return (
            f"training.max_tokens_per_micro_batch = {tokens} with sampling.max_rows = {rows} "
            "would fit"
        )
    least = needed(with_values(1, 1)) / GIB
    return (
        f"with one row at a time it would still need {least:.2f} GiB; take a smaller model or a "
        "machine with more memory"
    )


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number from 1 to `most` that fits, by halving; 0 if none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
