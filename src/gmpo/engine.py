"""What one process of a run samples and computes gradients with: model, adapters, sampler."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gmpo.config import RunConfig
from gmpo.data_parallel import Engine
from gmpo.errors import ConfigError, ModelError
from gmpo.inputs import Given
from gmpo.named_functions import load_function
from gmpo.policy.agreement import LARGEST_OVER_POSITIONS, why_not_alike
from gmpo.policy.load import (
    context_length,
    end_token_ids,
    load_model,
    require_context,
    restore_stored_digits,
)
from gmpo.policy.lora import adapters_of, add_adapters, has_these_adapters
from gmpo.policy.score import BasePolicy, Policy, Scorer
from gmpo.rollout_functions import FunctionRollouts, RolloutFunction
from gmpo.rollouts import (
    GroupSampler,
    SamplingSettings,
    decode_text,
    sample_groups,
    special_tokens,
)
from gmpo.sampler.agreement import decoded_difference
from gmpo.sampler.decoders import Decoder, LlamaDecoder, TransformersDecoder
from gmpo.sampler.graphed import capture_for
from gmpo.sampler.local import LocalSampler

__all__ = [
    "build_decoder",
    "build_engine",
    "build_sampler",
    "frozen_policy",
    "group_sampler",
    "named_model",
    "rollout_function",
    "sampling_settings",
]


def build_engine(
    config: RunConfig,
    *,
    tokenizer: PreTrainedTokenizerBase,
    given: Given | None = None,
    warn: Callable[[str], None],
) -> Engine:
    """What a process of the run samples and computes gradients with.

    Args:
        config: the recipe, device and precision resolved.
        tokenizer: of the model.
        given: objects that stand in for those that the recipe names.
        warn: told in one sentence what is not as expected.

    Raises:
        gmpo.errors.GmpoError: the model or a function that the recipe names is not usable.
    """
    given = given or Given()
    rollout = rollout_function(config, given.rollout)
    model = given.model or named_model(config)
    require_context(model, max_length=config.sampling.max_length)
    sampling = sampling_settings(config, end_token_ids(model, tokenizer))
    policy = _policy(config, model, warn=warn)
    name = config.model.name if given.model is None else given.model_name
    if name is not None:
        restore_stored_digits(policy, name, warn=warn)
    reference = _reference(config, policy, given, warn=warn)
    sampler = build_sampler(policy, tokenizer, max_rows=config.sampling.max_rows)
    return Engine(
        policy=policy,
        reference=reference,
        tokenizer=tokenizer,
        sampler=sampler,
        sample=group_sampler(config, sampler, tokenizer, policy, rollout),
        sampling=sampling,
    )


def build_sampler(
    policy: Policy, tokenizer: PreTrainedTokenizerBase, *, max_rows: int
) -> LocalSampler:
    """A sampler over the policy's own weights, as fast as its model allows."""
    return LocalSampler(
        build_decoder(policy, max_rows=max_rows),
        context_length=context_length(policy.model),
        max_rows=max_rows,
        decode=partial(decode_text, tokenizer),
        special_tokens=special_tokens(tokenizer),
    )


def build_decoder(policy: Policy, *, max_rows: int) -> Decoder:
    """What decodes with the policy's own weights, as fast as its model allows.

    The fast steps are compared with the model's own logits first; if they differ, the policy's
    `warn` is told, and the model decodes by its own forward.
    """
    if policy.body is None:
        return TransformersDecoder(policy.model)
    capture = capture_for(policy.device)
    problem = why_not_alike(
        "decoding",
        difference=decoded_difference(policy.body, over_fixed_buffers=capture is not None),
        allowed=LARGEST_OVER_POSITIONS[policy.dtype],
    )
    if problem:
        policy.warn(f"{problem}; the model decodes by its own forward: same results, slower")
        return TransformersDecoder(policy.model)
    return LlamaDecoder(policy.body, max_rows=max_rows, capture=capture)


def rollout_function(config: RunConfig, given: RolloutFunction | None) -> RolloutFunction | None:
    """The function that makes the rollouts; None where the policy completes prompts by itself."""
    reference = config.sampling.rollout
    if given is not None and reference is None:
        raise ConfigError(
            "a rollout function was given, and the recipe's sampling.rollout is not set; name the "
            "function there, as module:function, so that the recipe says how rollouts are made"
        )
    if given is not None or reference is None:
        return given
    return load_function(reference, key="sampling.rollout")


def group_sampler(
    config: RunConfig,
    sampler: LocalSampler,
    tokenizer: PreTrainedTokenizerBase,
    policy: Policy,
    function: RolloutFunction | None,
) -> GroupSampler:
    """What draws groups of completions: the sampler, or the function by means of it."""
    if function is None:
        return partial(sample_groups, sampler, tokenizer=tokenizer)
    return FunctionRollouts(
        function=function,
        sampler=sampler,
        tokenizer=tokenizer,
        max_length=config.sampling.max_length,
        vocabulary_size=policy.model.config.vocab_size,
    )


def sampling_settings(config: RunConfig, stop_ids: tuple[int, ...]) -> SamplingSettings:
    """How the recipe's completions are drawn.

    Raises:
        ModelError: nothing would end a completion but its limit.
    """
    sampling = config.sampling
    if not stop_ids and not sampling.stop_strings:
        raise ModelError(
            f"neither model {config.model.name!r} nor its tokenizer names an end token, so every "
            "completion would run to the limit; set eos_token_id in its generation config, or "
            "sampling.stop_strings in the recipe"
        )
    return SamplingSettings(
        num_completions=sampling.group_size,
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        stop_ids=stop_ids,
        stop_strings=sampling.stop_strings,
    )


def _policy(config: RunConfig, model: PreTrainedModel, *, warn: Callable[[str], None]) -> Policy:
    """The policy that is trained, with its adapters if the recipe has any."""
    lora, training = config.lora, config.training
    alpha = lora.scale_numerator()
    if not adapters_of(model):
        if lora.rank:
            add_adapters(
                model, rank=lora.rank, alpha=alpha, targets=lora.targets, seed=training.seed
            )
    elif not has_these_adapters(model, rank=lora.rank, alpha=alpha, targets=lora.targets):
        raise ConfigError(
            "the model has adapters of an earlier run already, and those of the recipe's [lora] "
            f"table (rank {lora.rank}, alpha {alpha:g}) are others; load the model anew, or give "
            "the same rank, alpha and targets to train these on"
        )
    return Policy(
        model,
        engine=training.engine,
        gradient_checkpointing=training.gradient_checkpointing,
        warn=warn,
    )


def frozen_policy(model: PreTrainedModel, *, engine: str, warn: Callable[[str], None]) -> Policy:
    """The model as it is: to be asked and not trained."""
    model.requires_grad_(False)  # before Policy makes fp32 masters of what is trained
    return Policy(model, engine=engine, warn=warn)


def named_model(config: RunConfig) -> PreTrainedModel:
    """The recipe's model on its device and in its precision."""
    model = config.model
    return load_model(model.name, device=model.device, dtype=model.dtype)


def _reference(
    config: RunConfig,
    policy: Policy,
    given: Given,
    *,
    warn: Callable[[str], None],
) -> Scorer | None:
    """The starting model, if anything is compared with it: under adapters it is there already."""
    if not config.needs_reference():
        return None
    if policy.adapters:
        return BasePolicy(policy)
    # Where the policy left the fast path, which was said, a copy of its model would leave it too.
    engine = "plain" if policy.body is None else "fast"
    if given.model is None:
        model = named_model(config)
    else:
        model = given.reference or copy.deepcopy(given.model)
    return frozen_policy(model, engine=engine, warn=warn)
