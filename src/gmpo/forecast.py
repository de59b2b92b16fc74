"""What memory a run will need, by arithmetic, before anything of it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from gmpo.config import RunConfig
from gmpo.errors import ModelError
from gmpo.host_memory import resident_bytes
from gmpo.inputs import RunInputs, read_inputs
from gmpo.kernels import attention
from gmpo.memory import (
    GIB,
    MicroBatchSize,
    ModelShape,
    activation_bytes,
    largest_micro_batch,
    passing_bytes,
    weight_bytes,
)
from gmpo.policy.llama import why_unsupported
from gmpo.policy.load import model_folder
from gmpo.policy.lora import adapters_of, add_adapters
from gmpo.records import Prompt
from gmpo.sampler.prepared import order_of
from gmpo.sampling_memory import cache_bytes, rollout_bytes, sampling_bytes
from gmpo.tasks import few_shot_prompt

__all__ = [
    "Forecast",
    "forecast",
    "forecast_inputs",
    "forecaster",
    "model_shape",
]


_DTYPES = {2: torch.bfloat16, 4: torch.float32}
"""By their width; any other is fp64's."""
_MOMENT_BYTES = 8
"""Of AdamW's two fp32 moments of a weight."""
_HEADS = ("num_attention_heads", "n_head", "n_heads")
"""What families call the number of attention heads; a model without any counts as one head."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Needs of a run if every completion ran to its limit and every group were live.

    With `sampling.dynamic = "refill"` every round takes as many prompts as it may. With a rollout
    function, which decides itself how long a completion becomes, its limit is what
    `sampling.max_length` leaves. What the user's own functions hold is not known and not counted.

    Attributes:
        num_parameters: weights of the model, without adapters.
        trained_parameters: the adapters' weights, or without adapters the model's.
        train_items: training prompts.
        held_out_items: items of the evaluations before and after.
        longest_prompt_tokens: of the prompts that the run's rounds will take.
        completion_tokens_per_round: if every completion ran to its limit.
        prompt_tokens_per_round: prompts run once a group.
        optimizer_steps: of the whole run.
        process_gib: what the process holds besides the model; 0 on an accelerator.
        loaded_gib: of the weights, what is held already: a model that was handed over in Python,
            and the copy of it that KL is measured to.
        weights_gib: weights; of the trained ones gradients, AdamW's moments and a compute copy if
            bf16; the reference if a KL to it is trained or measured, a second gradient if its
            cosine to GRPO's is measured.
        cache_gib: the sampler's keys and values, which stay between rounds.
        update_gib: what the largest micro-batch takes for a moment.
        sampling_gib: what sampling takes for a moment.
        rollouts_gib: a round's rollouts and the tensors of its steps; on an accelerator the tensors
            alone, because rollouts stay with the host.
        peak_gib: what stays, and the larger of the two that do not; a checkpoint copies nothing.
        helpers_gib: what the other processes of `training.processes` take beside this one, all
            together: what it does but AdamW's moments. 0 where each has a device of its own.
    """

    num_parameters: int
    trained_parameters: int
    train_items: int
    held_out_items: int
    longest_prompt_tokens: int
    completion_tokens_per_round: int
    prompt_tokens_per_round: int
    optimizer_steps: int
    process_gib: float
    loaded_gib: float
    weights_gib: float
    cache_gib: float
    update_gib: float
    sampling_gib: float
    rollouts_gib: float
    peak_gib: float
    helpers_gib: float

    @property
    def wanted_gib(self) -> float:
        """Of the peak, what the process does not hold yet, and what its helpers will."""
        return self.peak_gib - self.process_gib - self.loaded_gib + self.helpers_gib

    def as_dict(self) -> dict[str, Any]:
        """Figures for JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class _Lengths:
    """Prompt lengths in tokens.

    Attributes:
        steps: the longest prompt of each optimizer step of the run, each length once; of refilled
            rounds, whose groups are not known before, that of all prompts that they may take.
        shortest: the shortest prompt that a round may take.
        evaluated: the longest prompt of any evaluation, with its examples.
        num_evaluated: prompts of an evaluation.
    """

    steps: frozenset[int]
    shortest: int
    evaluated: int
    num_evaluated: int

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
    return forecaster(inputs)(inputs.config)


def forecaster(inputs: RunInputs) -> Callable[[RunConfig], Forecast]:
    """Forecasts of the run by its recipe, and by others like it: model and prompts are read once.

    A recipe may have another micro-batch, other rows at once, and fewer rollouts, whose prompts are
    then as long as the longest of the recipe's own.
    """
    lengths, shape = _lengths(inputs), _shape_of_run(inputs)
    process, loaded = _held_bytes(inputs)

    def forecast_of(config: RunConfig) -> Forecast:
        sampling, training = config.sampling, config.training
        longest_completion = _longest_completion(config, lengths.shortest)
        return Forecast(
            num_parameters=shape.num_parameters,
            trained_parameters=shape.adapter_parameters or shape.num_parameters,
            train_items=len(inputs.prompts),
            held_out_items=len(inputs.held_out),
            longest_prompt_tokens=lengths.trained,
            completion_tokens_per_round=sampling.most_prompts()
            * sampling.group_size
            * longest_completion,
            prompt_tokens_per_round=sampling.most_prompts() * lengths.trained,
            optimizer_steps=training.rounds * training.steps_per_round,
            **_memory(config, shape, lengths, process=process, loaded=loaded),
        )

    return forecast_of


def model_shape(
    model: PreTrainedModel, *, width: int, device: str, engine: str, recomputes_layers: bool
) -> ModelShape:
    """Sizes of a model, which may be without weights, and of its adapters.

    Args:
        model: as it will be trained.
        width: bytes of a number in forward and backward passes.
        device: where they run: "cpu" or another.
        engine: "fast" or "plain".
        recomputes_layers: as gradient checkpointing has it.
    """
    text = model.config.get_text_config()
    sizes = text.to_dict()
    hidden, vocabulary = text.hidden_size, text.vocab_size
    heads = next((sizes[name] for name in _HEADS if sizes.get(name)), 1)
    is_fast = engine == "fast" and why_unsupported(model) is None
    adapters = adapters_of(model)
    adapter_parameters = sum(a.lora_A.numel() + a.lora_B.numel() for a in adapters.values())
    return ModelShape(
        num_parameters=sum(p.numel() for p in model.parameters()) - adapter_parameters,
        layers=text.num_hidden_layers,
        hidden=hidden,
        feed_forward=sizes.get("intermediate_size") or 4 * hidden,
        heads=heads,
        key_value_heads=sizes.get("num_key_value_heads") or heads,
        head_size=sizes.get("head_dim") or hidden // heads,
        vocabulary=vocabulary,
        has_head_norms=text.model_type == "qwen3",
        adapter_parameters=adapter_parameters,
        adapter_rank=max((adapter.rank for adapter in adapters.values()), default=0),
        adapted=frozenset(name.rpartition(".")[2] for name in adapters),
        width=width,
        attention_width=4 if is_fast and device == "cpu" else width,
        runs_compiled=is_fast and device == "cpu" and _runs_compiled(width),
        is_fast=is_fast,
        on_cpu=device == "cpu",
        reorders_weights=is_fast and _has_order(width, device),
        recomputes_layers=recomputes_layers,
    )


def _has_order(width: int, device: str) -> bool:
    return order_of(_DTYPES.get(width, torch.float64), device) is not None


def _runs_compiled(width: int) -> bool:
    """Whether the fast engine's attention is the compiled function in that precision."""
    return attention.is_compiled(torch.empty(0, dtype=_DTYPES.get(width, torch.float64)))


def _shape_of_run(inputs: RunInputs) -> ModelShape:
    """Of the model that will be trained, its adapters included: the given one, or the named one."""
    config, model = inputs.config, inputs.given.model
    if model is None or (config.lora.rank and not adapters_of(model)):
        model = _without_weights(config, model)
    return model_shape(
        model,
        width=2 if config.model.dtype == "bf16" else 4,
        device=config.model.device,
        engine=config.training.engine,
        recomputes_layers=config.training.gradient_checkpointing,
    )


def _without_weights(config: RunConfig, given: PreTrainedModel | None) -> PreTrainedModel:
    """A model like the given or the named one, adapted, that takes no memory."""
    sizes = None if given is not None else _named_sizes(config.model.name)
    with torch.device("meta"):
        if given is not None:
            model = type(given)(given.config)
        else:
            model = AutoModelForCausalLM.from_config(sizes)
    lora = config.lora
    if lora.rank:
        add_adapters(model, rank=lora.rank, alpha=lora.scale_numerator(), targets=lora.targets)
    return model


def _named_sizes(name: str) -> PreTrainedConfig:
    """The configuration of a named model.

    Raises:
        ModelError: it cannot be read.
    """
    folder = model_folder(name)
    try:
        sizes: PreTrainedConfig = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ModelError(
            f"cannot read the configuration of model {name!r}: {first_line}; give a hub name or a "
            "folder with config.json"
        ) from None
    return sizes


def _memory(
    config: RunConfig, shape: ModelShape, lengths: _Lengths, *, process: int, loaded: int
) -> dict[str, Any]:
    """The memory figures of a `Forecast`."""
    sampling, evaluation = config.sampling, config.evaluation
    compares_gradients = 0 < config.training.gradient_cosine_every <= config.training.rounds
    weights = weight_bytes(
        shape,
        has_reference=config.needs_reference(),
        keeps_second_gradient=compares_gradients,
        has_narrow_gradients=not compares_gradients
        and config.training.processes == 1
        and all(_leaves_gradients_narrow(config, shape, prompt_tokens=n) for n in lengths.steps),
    )
    longest = max(lengths.trained, lengths.evaluated)
    completion = max(sampling.max_new_tokens, evaluation.max_new_tokens or 0)
    rows = sampling.max_rows
    # One long completion may be what is left of each prompt; evaluations ask each once.
    prompts = min(rows, max(sampling.prompts_per_round, lengths.num_evaluated))
    if sampling.rollout is not None:
        # What tools put in is run as a prompt is, together with all that came before it.
        longest, prompts = sampling.max_length, rows
    cache = cache_bytes(
        shape,
        prompts=prompts,
        rows=rows,
        prompt_positions=longest,
        completion_positions=completion,
    )
    update = max(_update_bytes(config, shape, prompt_tokens=n) for n in lengths.steps)
    # A cache that grows is there twice for a moment.
    sampling_peak = sampling_bytes(shape, rows=rows, prompt_tokens=longest) + cache
    rollouts = rollout_bytes(
        sampling.most_prompts() * sampling.group_size,
        completion_tokens=_longest_completion(config, lengths.shortest),
        on_cpu=shape.on_cpu,
    )
    peak = process + weights + cache + rollouts + max(update, sampling_peak)
    trained = shape.adapter_parameters or shape.num_parameters
    helpers = (config.training.processes - 1) * shape.on_cpu
    return {
        "process_gib": process / GIB,
        "loaded_gib": min(loaded, weights) / GIB,
        "weights_gib": weights / GIB,
        "cache_gib": cache / GIB,
        "update_gib": update / GIB,
        "sampling_gib": sampling_peak / GIB,
        "rollouts_gib": rollouts / GIB,
        "peak_gib": peak / GIB,
        "helpers_gib": helpers * (peak - rollouts - _MOMENT_BYTES * trained) / GIB,
    }


def _update_bytes(config: RunConfig, shape: ModelShape, *, prompt_tokens: int) -> int:
    """Of the largest micro-batch of a step with prompts of that length."""
    size = _micro_batch(config, shape, prompt_tokens=prompt_tokens)
    return activation_bytes(shape, size) + passing_bytes(shape, size)


def _leaves_gradients_narrow(config: RunConfig, shape: ModelShape, *, prompt_tokens: int) -> bool:
    """Whether a step of prompts of that length is one micro-batch, and AdamW takes its bf16."""
    is_compiled = shape.width == 2 and shape.on_cpu and _runs_compiled(shape.width)
    rows = config.sampling.prompts_per_round // config.training.steps_per_round
    rows *= config.sampling.group_size
    size = _micro_batch(config, shape, prompt_tokens=prompt_tokens)
    return is_compiled and shape.trains_all and size.rows == rows


def _micro_batch(config: RunConfig, shape: ModelShape, *, prompt_tokens: int) -> MicroBatchSize:
    sampling, training = config.sampling, config.training
    return largest_micro_batch(
        max_tokens=training.max_tokens_per_micro_batch,
        group_size=sampling.group_size,
        groups=sampling.prompts_per_round // training.steps_per_round,
        prompt_tokens=prompt_tokens,
        completion_tokens=_longest_completion(config, prompt_tokens),
        shares_prompts=shape.is_fast,
    )


def _longest_completion(config: RunConfig, prompt_tokens: int) -> int:
    """Tokens; only `max_length` bounds what a rollout function returns."""
    sampling = config.sampling
    if sampling.rollout is None:
        return sampling.max_new_tokens
    return sampling.max_length - prompt_tokens


def _lengths(inputs: RunInputs) -> _Lengths:
    config, renderer, examples = inputs.config, inputs.renderer, inputs.examples
    asked = list(inputs.held_out)
    if examples:
        asked += [few_shot_prompt(prompt, examples) for prompt in inputs.held_out]
    rounds, steps_per_round = config.training.rounds, config.training.steps_per_round
    if config.sampling.dynamic == "refill":
        # Where a round begins depends on how many prompts those before it took.
        may_come = min(len(inputs.prompts), rounds * config.sampling.most_prompts())
        taken = [_length(prompt) for prompt in inputs.prompts.take(0, may_come)]
        steps = frozenset([max(taken)])
    else:
        per_step = config.sampling.prompts_per_round // steps_per_round
        num_taken = rounds * steps_per_round * per_step
        if per_step >= 2 * len(inputs.prompts):
            # Every step sees every prompt: one pass stands for what may be millions of prompts.
            num_taken = per_step = len(inputs.prompts)
        taken = [_length(prompt) for prompt in inputs.prompts.take(0, num_taken)]
        steps = frozenset(
            max(taken[first : first + per_step]) for first in range(0, len(taken), per_step)
        )
    return _Lengths(
        steps=steps,
        shortest=min(taken),
        evaluated=max((_length(renderer.render(prompt)) for prompt in asked), default=0),
        num_evaluated=len(inputs.held_out),
    )


def _length(prompt: Prompt) -> int:
    assert prompt.token_ids is not None, "prompts are rendered before they are counted"
    return len(prompt.token_ids)


def _held_bytes(inputs: RunInputs) -> tuple[int, int]:
    """What the process holds besides the model, and what it holds of models already."""
    tensors: list[Tensor] = []
    for model in (inputs.given.model, inputs.given.reference):
        tensors += [] if model is None else model.parameters()
    tensors += [tensor.grad for tensor in tensors if tensor.grad is not None]
    loaded = sum(tensor.nbytes for tensor in tensors)
    if inputs.config.model.device == "cuda":
        return 0, loaded
    # Weights that a file maps are resident only once they were read.
    return max(0, resident_bytes() - loaded), loaded
