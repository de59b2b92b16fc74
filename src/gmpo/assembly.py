"""From a recipe to the parts of a run: model, sampler, task, reward, optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState

from gmpo.config import RunConfig
from gmpo.errors import ConfigError, ModelError
from gmpo.evaluation import Evaluator, require_fit
from gmpo.grading import Grader
from gmpo.inputs import (
    Given,
    PromptStream,
    RunInputs,
    held_out_items,
    notes_of_evaluation,
    prompt_renderer,
    read_inputs,
    resolve_model,
)
from gmpo.named_functions import load_function
from gmpo.policy.agreement import LARGEST_OVER_POSITIONS, why_not_alike
from gmpo.policy.integrity import WeightsWatch
from gmpo.policy.load import (
    context_length,
    end_token_ids,
    load_model,
    load_tokenizer,
    require_context,
    restore_stored_digits,
)
from gmpo.policy.lora import adapters_of, add_adapters, has_these_adapters
from gmpo.policy.score import BasePolicy, Policy, Scorer
from gmpo.records import Group, Prompt
from gmpo.reward_table import build_rewards, reward_rule
from gmpo.rewards import RewardFunctions, ScoredGroups, score_groups
from gmpo.rollout_functions import FunctionRollouts, RolloutFunction
from gmpo.rollouts import (
    GroupSampler,
    PromptRenderer,
    SamplingSettings,
    decode_text,
    sample_groups,
    special_tokens,
)
from gmpo.sampler.agreement import decoded_difference
from gmpo.sampler.decoders import Decoder, LlamaDecoder, TransformersDecoder
from gmpo.sampler.graphed import capture_for
from gmpo.sampler.local import LocalSampler
from gmpo.task_table import build_task
from gmpo.tasks import Task
from gmpo.update import LossSettings, PolicyOptimizer, bind_objective

__all__ = [
    "TrainingParts",
    "assemble",
    "build_decoder",
    "build_evaluator",
    "build_loss",
    "build_parts",
    "build_sampler",
    "open_evaluator",
]


@dataclass(frozen=True, kw_only=True)
class TrainingParts:
    """Everything the loop works with; `config` has device and precision resolved."""

    config: RunConfig
    policy: Policy
    reference: Scorer | None
    tokenizer: PreTrainedTokenizerBase
    sampler: LocalSampler
    sample: GroupSampler
    optimizer: PolicyOptimizer
    weights_watch: WeightsWatch
    prompts: PromptStream
    held_out: tuple[Prompt, ...]
    evaluator: Evaluator
    grader: Grader
    rewards: RewardFunctions
    sampling: SamplingSettings
    loss: LossSettings
    grpo_loss: LossSettings
    warn: Callable[[str], None]

    @property
    def base(self) -> Policy | None:
        """What holds frozen weights that the run needs beside those it trains; None if nothing."""
        if self.policy.adapters:
            return self.policy
        return self.reference if isinstance(self.reference, Policy) else None

    def score(self, groups: Sequence[Group], *, step: int, prompts_taken: int) -> ScoredGroups:
        """Groups with rewards, by the recipe's reward table.

        Args:
            groups: as sampled.
            step: optimizer steps done, which reward functions may ask for.
            prompts_taken: prompts sampled before these.
        """
        training = self.config.training
        state = TrainerState(
            global_step=step,
            max_steps=training.rounds * training.steps_per_round,
            epoch=prompts_taken / len(self.prompts),
        )
        rule = reward_rule(self.config.reward)
        return score_groups(groups, self.rewards, rule=rule, trainer_state=state)

    def evaluator_at(self, *, step: int, prompts_taken: int) -> Evaluator:
        """What asks held-out items, by `evaluation.measure`; the arguments are those of `score`."""
        if self.config.evaluation.measure == "accuracy":
            return self.evaluator
        reward = partial(self.score, step=step, prompts_taken=prompts_taken)
        return replace(self.evaluator, reward=reward)

    def under(self, config: RunConfig) -> TrainingParts:
        """These parts with the step size, clips and reward rule of a recipe that is else alike."""
        return replace(self, config=config, loss=build_loss(config))

    def publish_weights(self, version: int) -> None:
        """Hand the policy's weights to the sampler, which runs the policy's own module."""
        self.sampler.load_weights(version, self.policy.own_weights())

    def close(self) -> None:
        """Stop the grading worker and the event loop of async rewards; let the model go."""
        self.policy.release()
        self.grader.close()
        self.rewards.close()


def build_parts(
    config: RunConfig, *, warn: Callable[[str], None], given: Given | None = None
) -> TrainingParts:
    """Load and connect everything a recipe names.

    Args:
        config: the recipe.
        warn: told in one sentence what is not as expected, now and during the run.
        given: objects that stand in for those that the recipe names.

    Raises:
        gmpo.errors.GmpoError: a model, task or prompt is not usable as the recipe wants it.
    """
    return assemble(read_inputs(config, warn=warn, given=given), warn=warn)


def assemble(inputs: RunInputs, *, warn: Callable[[str], None]) -> TrainingParts:
    """Load the model and connect it with what was read.

    Raises:
        gmpo.errors.GmpoError: the model or a function that the recipe names is not usable.
    """
    config, given, task, tokenizer = inputs.config, inputs.given, inputs.task, inputs.tokenizer
    grader = Grader(time_limit_seconds=config.reward.timeout_seconds, warn=warn)
    rewards = build_rewards(config, grader, given=given.rewards)
    rewards.require_columns(list({name for prompt in task.train for name in prompt.columns}))
    rollout = _rollout_function(config, given.rollout)
    model = given.model or _named_model(config)
    require_context(model, max_length=config.sampling.max_length)
    sampling = _sampling_settings(config, end_token_ids(model, tokenizer))
    policy = _policy(config, model, warn=warn)
    name = config.model.name if given.model is None else given.model_name
    if name is not None:
        restore_stored_digits(policy, name, warn=warn)
    reference = _reference(config, policy, given, warn=warn)
    sampler = build_sampler(policy, tokenizer, max_rows=config.sampling.max_rows)
    sample = _group_sampler(config, sampler, tokenizer, policy, rollout)
    return TrainingParts(
        config=config,
        policy=policy,
        reference=reference,
        tokenizer=tokenizer,
        sampler=sampler,
        sample=sample,
        optimizer=_optimizer(config, policy),
        weights_watch=WeightsWatch(policy),
        prompts=inputs.prompts,
        held_out=inputs.held_out,
        evaluator=_with_limit_and_examples(
            Evaluator(sample=sample, renderer=inputs.renderer, grader=grader, settings=sampling),
            config,
            task,
        ),
        grader=grader,
        rewards=rewards,
        sampling=sampling,
        loss=build_loss(config),
        grpo_loss=LossSettings(
            objective=bind_objective("grpo", clips={}, max_tokens=config.sampling.max_new_tokens),
            temperature=config.sampling.temperature,
        ),
        warn=warn,
    )


@contextmanager
def build_evaluator(
    config: RunConfig, *, warn: Callable[[str], None]
) -> Iterator[tuple[Evaluator, tuple[Prompt, ...]]]:
    """What asks a recipe's held-out items of its model, and these items; no optimizer is made."""
    config = config.model_copy(update={"model": resolve_model(config.model, warn=warn)})
    task = build_task(config.task)
    for note in (*task.notes(), *notes_of_evaluation(config, task)):
        warn(note)
    tokenizer = load_tokenizer(config.model.name)
    renderer = prompt_renderer(config, tokenizer)
    held_out = held_out_items(config, task)
    require_fit(held_out, examples=task.train[: config.evaluation.few_shot], renderer=renderer)
    policy = _frozen_policy(_named_model(config), engine=config.training.engine, warn=warn)
    require_context(policy.model, max_length=config.sampling.max_length)
    with Grader(time_limit_seconds=config.reward.timeout_seconds, warn=warn) as grader:
        sampler = build_sampler(policy, tokenizer, max_rows=config.sampling.max_rows)
        asker = _asker(config, policy, tokenizer, renderer, grader, sampler)
        evaluator = _with_limit_and_examples(asker, config, task)
        with ExitStack() as opened:
            if config.evaluation.measure == "reward":
                rewards = opened.enter_context(closing(build_rewards(config, grader, given={})))
                rule, state = reward_rule(config.reward), TrainerState()
                reward = partial(score_groups, rewards=rewards, rule=rule, trainer_state=state)
                evaluator = replace(evaluator, reward=reward)
            yield evaluator, held_out


class _SamplerBuilder(Protocol):
    def __call__(
        self, policy: Policy, tokenizer: PreTrainedTokenizerBase, /, *, max_rows: int
    ) -> LocalSampler: ...


@contextmanager
def open_evaluator(
    config: RunConfig, *, warn: Callable[[str], None], build: _SamplerBuilder | None = None
) -> Iterator[tuple[Evaluator, int]]:
    """What asks any prompts of a recipe's model, and how many tokens its context has.

    Neither the recipe's task nor its limits of length are used: prompts may be as long as the
    context. `build` makes the sampler in place of `build_sampler`, for instance of a mixture.
    """
    config = config.model_copy(update={"model": resolve_model(config.model, warn=warn)})
    tokenizer = load_tokenizer(config.model.name)
    policy = _frozen_policy(_named_model(config), engine=config.training.engine, warn=warn)
    sampler = (build or build_sampler)(policy, tokenizer, max_rows=config.sampling.max_rows)
    context = sampler.context_length
    renderer = PromptRenderer(
        tokenizer,
        prompt_format=config.model.prompt_format,
        system=config.model.system,
        max_prompt_tokens=context,
    )
    sampling = config.sampling.model_copy(update={"max_length": context})  # of rollout functions
    config = config.model_copy(update={"sampling": sampling})
    with Grader(time_limit_seconds=config.reward.timeout_seconds, warn=warn) as grader:
        yield _asker(config, policy, tokenizer, renderer, grader, sampler), context


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


def _rollout_function(config: RunConfig, given: RolloutFunction | None) -> RolloutFunction | None:
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


def _group_sampler(
    config: RunConfig,
    sampler: LocalSampler,
    tokenizer: PreTrainedTokenizerBase,
    policy: Policy,
    function: RolloutFunction | None,
) -> GroupSampler:
    if function is None:
        return partial(sample_groups, sampler, tokenizer=tokenizer)
    return FunctionRollouts(
        function=function,
        sampler=sampler,
        tokenizer=tokenizer,
        max_length=config.sampling.max_length,
        vocabulary_size=policy.model.config.vocab_size,
    )


def _sampling_settings(config: RunConfig, stop_ids: tuple[int, ...]) -> SamplingSettings:
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


def _asker(
    config: RunConfig,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    renderer: PromptRenderer,
    grader: Grader,
    sampler: LocalSampler,
) -> Evaluator:
    """An evaluator over a policy of its own."""
    return Evaluator(
        sample=_group_sampler(config, sampler, tokenizer, policy, _rollout_function(config, None)),
        renderer=renderer,
        grader=grader,
        settings=_sampling_settings(config, end_token_ids(policy.model, tokenizer)),
    )


def _with_limit_and_examples(evaluator: Evaluator, config: RunConfig, task: Task) -> Evaluator:
    """The evaluator with what the recipe's `[evaluation]` table wants of it."""
    limit, settings = config.evaluation.max_new_tokens, evaluator.settings
    return replace(
        evaluator,
        settings=settings if limit is None else replace(settings, max_tokens=limit),
        examples=task.train[: config.evaluation.few_shot],
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


def _frozen_policy(model: PreTrainedModel, *, engine: str, warn: Callable[[str], None]) -> Policy:
    """The model as it is: to be asked and not trained."""
    model.requires_grad_(False)  # before Policy makes fp32 masters of what is trained
    return Policy(model, engine=engine, warn=warn)


def _named_model(config: RunConfig) -> PreTrainedModel:
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
        model = _named_model(config)
    else:
        model = given.reference or copy.deepcopy(given.model)
    return _frozen_policy(model, engine=engine, warn=warn)


def _optimizer(config: RunConfig, policy: Policy) -> PolicyOptimizer:
    training = config.training
    return PolicyOptimizer(
        policy,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_eps,
        weight_decay=training.weight_decay,
    )


def build_loss(config: RunConfig) -> LossSettings:
    """What a recipe's `[objective]` table minimises."""
    objective = config.objective
    return LossSettings(
        objective=bind_objective(
            objective.name,
            clips=objective.clips(),
            max_tokens=config.sampling.max_new_tokens,
        ),
        temperature=config.sampling.temperature,
        kl_coefficient=objective.kl_coefficient,
        entropy_coefficient=objective.entropy_coefficient,
    )
