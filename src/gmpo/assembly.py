"""From a recipe to the parts of a run: model, sampler, task, reward, optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from transformers import PreTrainedTokenizerBase

from gmpo.config import (
    ArithmeticTask,
    BundledTask,
    CountdownTask,
    JsonlTask,
    ModelConfig,
    RunConfig,
    TaskConfig,
)
from gmpo.errors import DataError, ModelError
from gmpo.evaluation import Evaluator
from gmpo.grading import Grader
from gmpo.policy.load import (
    choose_device,
    choose_dtype,
    end_token_ids,
    load_policy,
    load_tokenizer,
)
from gmpo.policy.score import Policy
from gmpo.records import Group, Prompt
from gmpo.rewards import RewardFunction, ScoredGroups, correct_reward, format_reward, score_groups
from gmpo.rollouts import PromptRenderer, SamplingSettings, decode_text
from gmpo.sampler.decoders import Decoder, LlamaDecoder, TransformersDecoder
from gmpo.sampler.local import LocalSampler
from gmpo.tasks import Task, arithmetic_task, bundled_task, countdown_task, jsonl_task
from gmpo.update import LossSettings, PolicyOptimizer, bind_objective

__all__ = [
    "PromptStream",
    "RunInputs",
    "TrainingParts",
    "assemble",
    "build_evaluator",
    "build_parts",
    "build_sampler",
    "build_task",
    "read_inputs",
    "resolve_model",
]


class PromptStream:
    """Training prompts in a fixed endless order: a fresh permutation each epoch, keyed by the seed.

    The order depends on nothing but its arguments, so a resumed run goes on where it stood.
    """

    def __init__(self, prompts: Sequence[Prompt], *, prompts_per_round: int, seed: int) -> None:
        self._prompts = prompts
        self._per_round = prompts_per_round
        self._seed = seed
        self._orders: dict[int, np.ndarray] = {}

    def take(self, round_number: int) -> list[Prompt]:
        """The prompts of a round, counted from 0."""
        first = round_number * self._per_round
        return [self._at(position) for position in range(first, first + self._per_round)]

    def _at(self, position: int) -> Prompt:
        epoch, place = divmod(position, len(self._prompts))
        if epoch not in self._orders:
            order = np.random.default_rng([self._seed, epoch]).permutation(len(self._prompts))
            self._orders = {epoch: order}  # a round looks at one epoch, seldom at two
        return self._prompts[int(self._orders[epoch][place])]


@dataclass(frozen=True, kw_only=True)
class RunInputs:
    """What a run reads before its model is loaded; `config` has device and precision resolved.

    Attributes:
        config: the recipe.
        tokenizer: of its model.
        renderer: turns prompts into token ids.
        train_items: training prompts.
        prompts: the same, rendered, in the order in which rounds take them.
        held_out: items of the evaluations, not rendered.
        examples: worked examples of the few-shot evaluation.
    """

    config: RunConfig
    tokenizer: PreTrainedTokenizerBase
    renderer: PromptRenderer
    train_items: int
    prompts: PromptStream
    held_out: tuple[Prompt, ...]
    examples: tuple[Prompt, ...]


@dataclass(frozen=True, kw_only=True)
class TrainingParts:
    """Everything the loop works with; `config` has device and precision resolved."""

    config: RunConfig
    policy: Policy
    reference: Policy | None
    tokenizer: PreTrainedTokenizerBase
    sampler: LocalSampler
    optimizer: PolicyOptimizer
    prompts: PromptStream
    held_out: tuple[Prompt, ...]
    evaluator: Evaluator
    grader: Grader
    rewards: dict[str, RewardFunction]
    sampling: SamplingSettings
    loss: LossSettings
    grpo_loss: LossSettings

    def score(self, groups: Sequence[Group]) -> ScoredGroups:
        """Groups with rewards, by the recipe's reward table."""
        reward = self.config.reward
        return score_groups(
            groups,
            self.rewards,
            weights={str(name): weight for name, weight in reward.weights.items()},
            combine=reward.combine,
            floor=reward.floor,
            truncated=reward.truncated,
        )

    def publish_weights(self, version: int) -> None:
        """Hand the policy's weights to the sampler."""
        self.sampler.load_weights(version, self.policy.named_weights())

    def close(self) -> None:
        """Stop the grading worker."""
        self.grader.close()


def build_parts(config: RunConfig, *, warn: Callable[[str], None]) -> TrainingParts:
    """Load and connect everything a recipe names.

    Raises:
        gmpo.errors.GmpoError: a model, task or prompt is not usable as the recipe wants it.
    """
    return assemble(read_inputs(config, warn=warn), warn=warn)


def read_inputs(config: RunConfig, *, warn: Callable[[str], None] = lambda _: None) -> RunInputs:
    """What a recipe's prompts are, for its model's tokenizer; the model itself is not loaded.

    Raises:
        gmpo.errors.GmpoError: the task, the tokenizer or a prompt is not usable.
    """
    config = config.model_copy(update={"model": resolve_model(config.model, warn=warn)})
    task = build_task(config.task)
    tokenizer = load_tokenizer(config.model.name)
    renderer = _renderer(config, tokenizer)
    return RunInputs(
        config=config,
        tokenizer=tokenizer,
        renderer=renderer,
        train_items=len(task.train),
        prompts=PromptStream(
            [renderer.render(prompt) for prompt in task.train],
            prompts_per_round=config.sampling.prompts_per_round,
            seed=config.training.seed,
        ),
        held_out=_held_out(config, task),
        examples=task.train[: config.evaluation.few_shot],
    )


def assemble(inputs: RunInputs, *, warn: Callable[[str], None]) -> TrainingParts:
    """Load the model and connect it with what was read.

    Raises:
        ModelError: the model cannot be loaded or used.
    """
    config, tokenizer = inputs.config, inputs.tokenizer
    policy = _policy(config, warn=warn)
    sampler = build_sampler(policy, tokenizer, max_rows=config.sampling.max_rows)
    sampling = _sampling_settings(config, end_token_ids(policy.model, tokenizer))
    grader = Grader(time_limit_seconds=config.reward.timeout_seconds)
    return TrainingParts(
        config=config,
        policy=policy,
        reference=_reference(config, warn=warn) if config.objective.kl_coefficient > 0 else None,
        tokenizer=tokenizer,
        sampler=sampler,
        optimizer=_optimizer(config, policy),
        prompts=inputs.prompts,
        held_out=inputs.held_out,
        evaluator=_evaluator(config, inputs.examples, sampler, inputs.renderer, grader, sampling),
        grader=grader,
        rewards=_rewards(config, grader),
        sampling=sampling,
        loss=_loss(config),
        grpo_loss=LossSettings(
            objective=bind_objective("grpo", clips={}, max_tokens=config.sampling.max_new_tokens),
            temperature=config.sampling.temperature,
        ),
    )


@contextmanager
def build_evaluator(
    config: RunConfig, *, warn: Callable[[str], None]
) -> Iterator[tuple[Evaluator, tuple[Prompt, ...]]]:
    """What asks a recipe's held-out items of its model, and these items; no optimizer is made."""
    config = config.model_copy(update={"model": resolve_model(config.model, warn=warn)})
    task = build_task(config.task)
    tokenizer = load_tokenizer(config.model.name)
    renderer = _renderer(config, tokenizer)
    policy = _policy(config, warn=warn)
    sampler = build_sampler(policy, tokenizer, max_rows=config.sampling.max_rows)
    sampling = _sampling_settings(config, end_token_ids(policy.model, tokenizer))
    with Grader(time_limit_seconds=config.reward.timeout_seconds) as grader:
        examples = task.train[: config.evaluation.few_shot]
        evaluator = _evaluator(config, examples, sampler, renderer, grader, sampling)
        yield evaluator, _held_out(config, task)


def build_task(config: TaskConfig) -> Task:
    """The task of a recipe's `[task]` table.

    Raises:
        DataError: it is empty or its rows are not usable.
    """
    arguments = config.model_dump(exclude={"kind"})
    if isinstance(config, ArithmeticTask):
        task = arithmetic_task(**arguments)
    elif isinstance(config, CountdownTask):
        task = countdown_task(**arguments)
    elif isinstance(config, JsonlTask):
        if config.held_out_items is None:
            arguments["held_out_items"] = 0 if config.held_out_path else 500
        task = jsonl_task(**arguments)
    else:
        assert isinstance(config, BundledTask)
        task = bundled_task(name=config.kind, **arguments)
    if not task.train or not task.held_out:
        raise DataError(
            f"task {task.name!r} has {len(task.train)} training and {len(task.held_out)} held-out "
            "items; both sides need at least one"
        )
    return task


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
    examples: tuple[Prompt, ...],
    sampler: LocalSampler,
    renderer: PromptRenderer,
    grader: Grader,
    sampling: SamplingSettings,
) -> Evaluator:
    limit = config.evaluation.max_new_tokens
    return Evaluator(
        sampler=sampler,
        renderer=renderer,
        grader=grader,
        settings=sampling if limit is None else replace(sampling, max_tokens=limit),
        examples=examples,
    )


def _policy(config: RunConfig, *, warn: Callable[[str], None]) -> Policy:
    model = config.model
    engine = config.training.engine
    return load_policy(model.name, device=model.device, dtype=model.dtype, engine=engine, warn=warn)


def _reference(config: RunConfig, *, warn: Callable[[str], None]) -> Policy:
    reference = _policy(config, warn=warn)
    reference.model.requires_grad_(False)
    return reference


def _optimizer(config: RunConfig, policy: Policy) -> PolicyOptimizer:
    training = config.training
    return PolicyOptimizer(
        policy,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_eps,
        weight_decay=training.weight_decay,
    )


def _rewards(config: RunConfig, grader: Grader) -> dict[str, RewardFunction]:
    available: dict[str, Callable[[], RewardFunction]] = {
        "correct": lambda: correct_reward(grader),
        "format": lambda: format_reward(config.reward.format_pattern),
    }
    return {name: available[name]() for name in config.reward.weights}


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
