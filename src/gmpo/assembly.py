"""From a recipe to the parts of a run: model, sampler, task, reward, optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from transformers import PreTrainedTokenizerBase, TrainerState

from gmpo.config import RunConfig
from gmpo.data_parallel import Engine, OneProcess, Processes
from gmpo.data_parallel.exchange import Helpers
from gmpo.data_parallel.leader import Leader
from gmpo.engine import (
    build_engine,
    build_sampler,
    frozen_policy,
    group_sampler,
    named_model,
    rollout_function,
    sampling_settings,
)
from gmpo.errors import ConfigError
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
from gmpo.policy.integrity import WeightsWatch
from gmpo.policy.load import end_token_ids, load_tokenizer, require_context
from gmpo.policy.score import Policy, Scorer
from gmpo.recipe import dump_recipe
from gmpo.records import Group, Prompt
from gmpo.reward_table import build_rewards, reward_rule
from gmpo.rewards import RewardFunctions, ScoredGroups, score_groups
from gmpo.rollouts import GroupSampler, PromptRenderer, SamplingSettings
from gmpo.sampler.local import LocalSampler
from gmpo.task_table import build_task
from gmpo.tasks import Task
from gmpo.update import LossSettings, PolicyOptimizer, bind_objective

__all__ = [
    "TrainingParts",
    "assemble",
    "build_evaluator",
    "build_loss",
    "build_parts",
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
    processes: Processes
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
    def sample(self) -> GroupSampler:
        """What draws the rollouts."""
        return self.processes.sample

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
        """Stop helpers, grading worker and the event loop of async rewards; let the model go."""
        with ExitStack() as closing_all:
            closing_all.callback(self.rewards.close)
            closing_all.callback(self.grader.close)
            closing_all.callback(self.policy.release)
            closing_all.callback(self.processes.close)


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
    _refuse_given(given, processes=config.training.processes)
    grader = Grader(time_limit_seconds=config.reward.timeout_seconds, warn=warn)
    rewards = build_rewards(config, grader, given=given.rewards)
    rewards.require_columns(list({name for prompt in task.train for name in prompt.columns}))
    engine = build_engine(config, tokenizer=tokenizer, given=given, warn=warn)
    policy, sampling = engine.policy, engine.sampling
    optimizer, watch = _optimizer(config, policy), WeightsWatch(policy)
    loss, grpo_loss = build_loss(config), _grpo_loss(config)
    processes = _processes(config, engine)  # last: it has processes to be ended
    asker = Evaluator(
        sample=processes.sample, renderer=inputs.renderer, grader=grader, settings=sampling
    )
    return TrainingParts(
        config=config,
        policy=policy,
        reference=engine.reference,
        tokenizer=tokenizer,
        sampler=engine.sampler,
        processes=processes,
        optimizer=optimizer,
        weights_watch=watch,
        prompts=inputs.prompts,
        held_out=inputs.held_out,
        evaluator=_with_limit_and_examples(asker, config, task),
        grader=grader,
        rewards=rewards,
        sampling=sampling,
        loss=loss,
        grpo_loss=grpo_loss,
        warn=warn,
    )


def _processes(config: RunConfig, engine: Engine) -> Processes:
    """This process alone, or with others that do a share of the work."""
    others = config.training.processes - 1
    if not others:
        return OneProcess(engine=engine)
    helpers = Helpers(dump_recipe(config), count=others, device=config.model.device)
    return Leader(engine, helpers)


def _refuse_given(given: Given, *, processes: int) -> None:
    if processes > 1 and (given.model or given.tokenizer or given.rollout):
        raise ConfigError(
            f"training.processes is {processes}, and model, tokenizer or rollout function were "
            "handed over in Python, which other processes cannot be; name them in the recipe, or "
            "set training.processes = 1"
        )


def _grpo_loss(config: RunConfig) -> LossSettings:
    return LossSettings(
        objective=bind_objective("grpo", clips={}, max_tokens=config.sampling.max_new_tokens),
        temperature=config.sampling.temperature,
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
    policy = frozen_policy(named_model(config), engine=config.training.engine, warn=warn)
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
    policy = frozen_policy(named_model(config), engine=config.training.engine, warn=warn)
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
        sample=group_sampler(config, sampler, tokenizer, policy, rollout_function(config, None)),
        renderer=renderer,
        grader=grader,
        settings=sampling_settings(config, end_token_ids(policy.model, tokenizer)),
    )


def _with_limit_and_examples(evaluator: Evaluator, config: RunConfig, task: Task) -> Evaluator:
    """The evaluator with what the recipe's `[evaluation]` table wants of it."""
    limit, settings = config.evaluation.max_new_tokens, evaluator.settings
    return replace(
        evaluator,
        settings=settings if limit is None else replace(settings, max_tokens=limit),
        examples=task.train[: config.evaluation.few_shot],
    )


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
