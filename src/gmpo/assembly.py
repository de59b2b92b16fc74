"""From a recipe to the parts of a run: model, sampler, task, reward, optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState

from gmpo.config import ModelConfig, RunConfig
from gmpo.errors import ConfigError, DataError, ModelError
from gmpo.evaluation import Evaluator
from gmpo.grading import Grader
from gmpo.named_functions import load_function
from gmpo.policy.load import (
    choose_device,
    choose_dtype,
    end_token_ids,
    load_model,
    load_tokenizer,
)
from gmpo.policy.lora import adapters_of, add_adapters
from gmpo.policy.score import BasePolicy, Policy, Scorer
from gmpo.records import Group, Prompt
from gmpo.reward_table import build_rewards, reward_rule
from gmpo.rewards import RewardFunction, RewardFunctions, ScoredGroups, score_groups
from gmpo.rollout_functions import FunctionRollouts, RolloutFunction
from gmpo.rollouts import (
    GroupSampler,
    PromptRenderer,
    SamplingSettings,
    decode_text,
    sample_groups,
)
from gmpo.sampler.decoders import Decoder, LlamaDecoder, TransformersDecoder
from gmpo.sampler.local import LocalSampler
from gmpo.task_config import (
    ArithmeticTask,
    BundledTask,
    CountdownTask,
    DatasetTask,
    GivenTask,
    GymTask,
    JsonlTask,
    TaskConfig,
)
from gmpo.tasks import (
    RowForm,
    Task,
    arithmetic_task,
    bundled_task,
    countdown_task,
    dataset_task,
    gym_task,
    jsonl_task,
)
from gmpo.update import LossSettings, PolicyOptimizer, bind_objective

__all__ = [
    "Given",
    "PromptStream",
    "TrainingParts",
    "build_evaluator",
    "build_parts",
    "build_sampler",
    "build_task",
    "resolve_model",
]


class PromptStream:
    """Training prompts in a fixed endless order: a fresh permutation each epoch, keyed by the seed.

    The order depends on nothing but its arguments, so a resumed run goes on where it stood.
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int) -> None:
        self._prompts = prompts
        self._seed = seed

    def __len__(self) -> int:
        return len(self._prompts)

    def take(self, first: int, count: int) -> list[Prompt]:
        """`count` prompts from position `first` on, counted from 0 and never ending."""
        return [self._at(position) for position in range(first, first + count)]

    def _at(self, position: int) -> Prompt:
        epoch, place = divmod(position, len(self._prompts))
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._prompts))
        return self._prompts[int(order[place])]


@dataclass(frozen=True, kw_only=True)
class Given:
    """Objects that a Python caller hands over instead of having them loaded or imported.

    Attributes:
        model: trained in place of the one that the recipe names, and really in place.
        tokenizer: of that model.
        task: whose items are asked in place of those of `[task]`, which has `kind = "given"`.
        rewards: by a name of the recipe's `[reward.functions]`, whose reference is then a record
            of where the function came from and is not imported.
        rollout: in place of the recipe's `sampling.rollout`, which names it likewise.
    """

    model: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    task: Task | None = None
    rewards: Mapping[str, RewardFunction] = field(default_factory=dict)
    rollout: RolloutFunction | None = None


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
    prompts: PromptStream
    held_out: tuple[Prompt, ...]
    evaluator: Evaluator
    grader: Grader
    rewards: RewardFunctions
    sampling: SamplingSettings
    loss: LossSettings
    grpo_loss: LossSettings
    warn: Callable[[str], None]

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
    config = config.model_copy(update={"model": resolve_model(config.model, warn=warn)})
    given = given or Given()
    task = given.task or build_task(config.task)
    for note in task.notes():
        warn(note)
    grader = Grader(time_limit_seconds=config.reward.timeout_seconds, warn=warn)
    rewards = build_rewards(config, grader, given=given.rewards)
    rewards.require_columns(list({name for prompt in task.train for name in prompt.columns}))
    rollout = _rollout_function(config, given.rollout)
    tokenizer = given.tokenizer or load_tokenizer(config.model.name)
    renderer = _renderer(config, tokenizer)
    train_prompts = [renderer.render(prompt) for prompt in task.train]
    policy = _policy(config, given.model, warn=warn)
    reference = _reference(config, policy, given.model, warn=warn)
    sampler = build_sampler(policy, tokenizer, max_rows=config.sampling.max_rows)
    sample = _group_sampler(config, sampler, tokenizer, policy, rollout)
    sampling = _sampling_settings(config, end_token_ids(policy.model, tokenizer))
    return TrainingParts(
        config=config,
        policy=policy,
        reference=reference,
        tokenizer=tokenizer,
        sampler=sampler,
        sample=sample,
        optimizer=_optimizer(config, policy),
        prompts=PromptStream(train_prompts, seed=config.training.seed),
        held_out=_held_out(config, task),
        evaluator=_evaluator(config, task, sample, renderer, grader, sampling),
        grader=grader,
        rewards=rewards,
        sampling=sampling,
        loss=_loss(config),
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
    for note in task.notes():
        warn(note)
    tokenizer = load_tokenizer(config.model.name)
    renderer = _renderer(config, tokenizer)
    policy = _frozen_policy(config, None, warn=warn)
    sampler = build_sampler(policy, tokenizer, max_rows=config.sampling.max_rows)
    sample = _group_sampler(config, sampler, tokenizer, policy, _rollout_function(config, None))
    sampling = _sampling_settings(config, end_token_ids(policy.model, tokenizer))
    with Grader(time_limit_seconds=config.reward.timeout_seconds, warn=warn) as grader:
        evaluator = _evaluator(config, task, sample, renderer, grader, sampling)
        with ExitStack() as opened:
            if config.evaluation.measure == "reward":
                rewards = opened.enter_context(closing(build_rewards(config, grader, given={})))
                rule, state = reward_rule(config.reward), TrainerState()
                reward = partial(score_groups, rewards=rewards, rule=rule, trainer_state=state)
                evaluator = replace(evaluator, reward=reward)
            yield evaluator, _held_out(config, task)


def build_task(config: TaskConfig) -> Task:
    """The task of a recipe's `[task]` table.

    Raises:
        DataError: it is empty or its rows are not usable.
    """
    if isinstance(config, GivenTask):
        raise DataError(
            f"this recipe's {config.train_items} training items were handed over in Python and are "
            "not in it; run the script that made it, with resume=True to go on with its run"
        )
    arguments = config.model_dump(exclude={"kind"})
    if isinstance(config, ArithmeticTask):
        task = arithmetic_task(**arguments)
    elif isinstance(config, CountdownTask):
        task = countdown_task(**arguments)
    elif isinstance(config, GymTask):
        task = gym_task(**arguments)
    elif isinstance(config, JsonlTask):
        task = jsonl_task(
            path=config.path,
            held_out_path=config.held_out_path,
            **_row_arguments(config, has_held_out_side=config.held_out_path is not None),
        )
    elif isinstance(config, DatasetTask):
        task = dataset_task(
            name=config.name,
            config_name=config.config_name,
            revision=config.revision,
            split=config.split,
            held_out_split=config.held_out_split,
            **_row_arguments(config, has_held_out_side=config.held_out_split is not None),
        )
    else:
        assert isinstance(config, BundledTask)
        task = bundled_task(name=config.kind, **arguments)
    if not task.train or not task.held_out:
        raise DataError(
            f"task {task.name!r} has {len(task.train)} training and {len(task.held_out)} held-out "
            "items; both sides need at least one"
        )
    return task


def _row_arguments(config: JsonlTask | DatasetTask, *, has_held_out_side: bool) -> dict[str, Any]:
    """What tasks made of rows have in common."""
    held_out_items = config.held_out_items
    if held_out_items is None:
        held_out_items = 0 if has_held_out_side else 500
    form = RowForm(
        prompt_column=config.prompt_column,
        answer_column=config.answer_column,
        id_column=config.id_column,
        keep_columns=config.keep_columns,
        answer_is_marked=config.answer_marked,
        where=config.where,
        unusable=config.unusable_rows,
    )
    return {
        "held_out_items": held_out_items,
        "split_seed": config.split_seed,
        "instruction": config.instruction,
        "form": form,
        "held_out_where": config.held_out_where,
    }


def build_sampler(
    policy: Policy, tokenizer: PreTrainedTokenizerBase, *, max_rows: int
) -> LocalSampler:
    """A sampler over the policy's own weights, as fast as its model allows."""
    decoder: Decoder = (
        TransformersDecoder(policy.model)
        if policy.body is None
        else LlamaDecoder(policy.body, max_rows=max_rows)
    )
    return LocalSampler(
        decoder,
        context_length=policy.model.config.max_position_embeddings,
        max_rows=max_rows,
        decode=partial(decode_text, tokenizer),
    )


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


def resolve_model(
    config: ModelConfig, *, warn: Callable[[str], None] = lambda _: None
) -> ModelConfig:
    """The model table with "auto" replaced by what this machine takes, which `warn` is told."""
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device=device, warn=warn)
    return config.model_copy(update={"device": device.type, "dtype": dtype})


def _renderer(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PromptRenderer:
    return PromptRenderer(
        tokenizer,
        prompt_format=config.model.prompt_format,
        system=config.model.system,
        max_prompt_tokens=config.max_prompt_tokens(),
    )


def _held_out(config: RunConfig, task: Task) -> tuple[Prompt, ...]:
    """The held-out items used, in an order of no meaning, so that the first n are a fair sample."""
    order = np.random.default_rng(config.task.split_seed).permutation(len(task.held_out))
    return tuple(task.held_out[int(place)] for place in order[: config.evaluation.items])


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


def _evaluator(
    config: RunConfig,
    task: Task,
    sample: GroupSampler,
    renderer: PromptRenderer,
    grader: Grader,
    sampling: SamplingSettings,
) -> Evaluator:
    limit = config.evaluation.max_new_tokens
    return Evaluator(
        sample=sample,
        renderer=renderer,
        grader=grader,
        settings=sampling if limit is None else replace(sampling, max_tokens=limit),
        examples=task.train[: config.evaluation.few_shot],
    )


def _policy(
    config: RunConfig, given: PreTrainedModel | None, *, warn: Callable[[str], None]
) -> Policy:
    """The policy that is trained, with its adapters if the recipe has any."""
    model = given or _named_model(config)
    lora, training = config.lora, config.training
    if lora.rank and not adapters_of(model):
        add_adapters(
            model,
            rank=lora.rank,
            alpha=lora.scale_numerator(),
            targets=lora.targets,
            seed=training.seed,
        )
    return Policy(
        model,
        engine=training.engine,
        gradient_checkpointing=training.gradient_checkpointing,
        warn=warn,
    )


def _frozen_policy(
    config: RunConfig, given: PreTrainedModel | None, *, warn: Callable[[str], None]
) -> Policy:
    """A copy of the given model, or the named one, as it is: to be asked and not trained."""
    model = _named_model(config) if given is None else copy.deepcopy(given)
    model.requires_grad_(False)  # before Policy makes fp32 masters of what is trained
    return Policy(model, engine=config.training.engine, warn=warn)


def _named_model(config: RunConfig) -> PreTrainedModel:
    model = config.model
    return load_model(model.name, device=model.device, dtype=model.dtype)


def _reference(
    config: RunConfig,
    policy: Policy,
    given: PreTrainedModel | None,
    *,
    warn: Callable[[str], None],
) -> Scorer | None:
    """The starting model, if there is a KL term: under adapters it is there already."""
    if not config.objective.kl_coefficient:
        return None
    return BasePolicy(policy) if policy.adapters else _frozen_policy(config, given, warn=warn)


def _optimizer(config: RunConfig, policy: Policy) -> PolicyOptimizer:
    training = config.training
    return PolicyOptimizer(
        policy,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_eps,
        weight_decay=training.weight_decay,
    )


def _loss(config: RunConfig) -> LossSettings:
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
