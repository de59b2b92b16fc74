"""The same rounds through TRL's trainers and through gmpo, and how far their updates are apart.

TRL is used as it is: completions come in through its `rollout_func`, rewards through a reward
function, and each step's rows are read from what its `_prepare_inputs` hands out, so that its own
shuffle decides which row goes into which step. gmpo then takes the same rows step by step.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

from gmpo.advantages import group_advantages
from gmpo.batch import StepBatch, build_step
from gmpo.objective import step_diagnostics
from gmpo.policy.score import Policy
from gmpo.records import Group, Prompt, Rollout
from gmpo.update import (
    LossSettings,
    PolicyOptimizer,
    accumulate_gradients,
    bind_objective,
    with_old_logprobs,
)

STEPS_PER_ROUND = 4
ADVANTAGE_EPS = 1e-4
"""What TRL adds to the standard deviation."""

LIMITS = {"sgd": 1e-4, "adamw": 1e-2}
"""Largest |d_gmpo - d_trl| / |d_trl|. AdamW divides near-zero gradients by themselves, which makes
whole steps of their rounding errors."""

TRL_ON_CPU: dict[str, Any] = {
    "use_cpu": True,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "lr_scheduler_type": "constant",
    "steps_per_generation": STEPS_PER_ROUND,
    "gradient_accumulation_steps": 1,
}
"""Of TRL's config: on the CPU, nothing written, STEPS_PER_ROUND steps a round."""

Weights = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """Groups with rewards, `prompts_per_round` of them a round, and the steps taken on them."""

    groups: tuple[Group, ...]
    prompts_per_round: int
    objective: str
    optimizer: str
    learning_rate: float

    @property
    def num_rounds(self) -> int:
        return len(self.groups) // self.prompts_per_round

    @property
    def rows_per_step(self) -> int:
        return self.prompts_per_round * len(self.groups[0].rollouts) // STEPS_PER_ROUND


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """TRL's update, and which rows (prompt id, rollout index) each of its steps took."""

    update: Weights
    steps: list[list[tuple[str, int]]]
    advantages: dict[tuple[str, int], float]
    logged: list[dict[str, float]]


def through_trl(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rounds: Rounds,
    *,
    kind: type[GRPOTrainer] | None = None,
    **options: Any,
) -> Replayed:
    """Train `model` in place on the rounds.

    Args:
        model: fp32 or fp64, on the CPU.
        tokenizer: only decodes completions for TRL's log.
        rounds: what is replayed.
        kind: the trainer; TRL's own for the objective unless given.
        options: of TRL's config, over those set here.
    """
    trainer_class = kind or {"gmpo": GMPOTrainer, "grpo": GRPOTrainer}[rounds.objective]
    seen: list[dict[str, Any]] = []

    class Recording(trainer_class):  # type: ignore[misc, valid-type]
        def _prepare_inputs(self, generation_batch: Any) -> Any:
            inputs = super()._prepare_inputs(generation_batch)
            seen.append(inputs)
            return inputs

    rollout_func, reward = answers_of(rounds.groups)
    before = copied(model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Recording(
            model,
            reward,
            args=trl_config(rounds, folder, options),
            train_dataset=Dataset.from_dict(
                {"prompt": [group.prompt.id for group in rounds.groups]}
            ),
            processing_class=tokenizer,
            rollout_func=rollout_func,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    pad_token = int(trainer.model.config.pad_token_id)
    steps = [rows_of(inputs, rounds.groups, pad_token=pad_token) for inputs in seen]
    advantages = {
        row: value
        for rows, inputs in zip(steps, seen, strict=True)
        for row, value in zip(rows, inputs["advantages"].tolist(), strict=True)
    }
    return Replayed(
        update=moved(model, before),
        steps=steps,
        advantages=advantages,
        logged=trainer.state.log_history,
    )


def answers_of(
    groups: Sequence[Group],
) -> tuple[Callable[..., dict[str, Any]], Callable[..., list[float | None]]]:
    """A `rollout_func` and a reward function for TRL that give the groups' own, by prompt id."""
    group_of = {group.prompt.id: group for group in groups}

    def rollout_func(prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        occurrences: Counter[str] = Counter()
        chosen = []
        for name in prompts:
            chosen.append(group_of[name].rollouts[occurrences[name]])
            occurrences[name] += 1
        return {
            "prompt_ids": [list(group_of[name].prompt.token_ids or ()) for name in prompts],
            "completion_ids": [rollout.token_ids.tolist() for rollout in chosen],
            "logprobs": None,
        }

    def reward(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [
            next(r.reward for r in group_of[name].rollouts if r.token_ids.tolist() == ids)
            for name, ids in zip(prompts, completion_ids, strict=True)
        ]

    return rollout_func, reward


def trl_config(rounds: Rounds, folder: str, options: dict[str, Any]) -> GRPOConfig:
    """No autocast, on the CPU, STEPS_PER_ROUND steps a round; `options` come last."""
    config_class = GRPOConfig if rounds.objective == "grpo" else GMPOConfig
    arguments = {
        **TRL_ON_CPU,
        "output_dir": folder,
        "bf16": False,
        "logging_steps": 1,
        "optim": {"sgd": "sgd", "adamw": "adamw_torch"}[rounds.optimizer],
        "learning_rate": rounds.learning_rate,
        # Unclipped SGD sees a gradient of the wrong size, which AdamW does not.
        "max_grad_norm": {"sgd": 0.0, "adamw": 1.0}[rounds.optimizer],
        "num_generations": len(rounds.groups[0].rollouts),
        "per_device_train_batch_size": rounds.rows_per_step,
        "max_steps": rounds.num_rounds * STEPS_PER_ROUND,
        **({"loss_type": "grpo"} if rounds.objective == "grpo" else {}),
        **options,
    }
    return config_class(**arguments)


def rows_of(
    inputs: Mapping[str, Tensor], groups: Sequence[Group], *, pad_token: int
) -> list[tuple[str, int]]:
    """Which rollouts the rows of TRL's micro-batch are, by their token ids.

    Not by its mask, which is empty for a completion that TRL leaves out of the loss.
    """

    def unpadded(tokens: Sequence[int]) -> tuple[int, ...]:
        end = len(tokens)
        while end and tokens[end - 1] == pad_token:
            end -= 1
        return tuple(tokens[:end])

    by_tokens = {
        (group.prompt.token_ids, unpadded(rollout.token_ids.tolist())): (
            group.prompt.id,
            rollout.index,
        )
        for group in groups
        for rollout in group.rollouts
    }
    assert len(by_tokens) == sum(len(group.rollouts) for group in groups), "equal rollouts"
    prompts = [
        tuple(ids[mask.bool()].tolist())
        for ids, mask in zip(inputs["prompt_ids"], inputs["prompt_mask"], strict=True)
    ]
    completions = [unpadded(ids) for ids in inputs["completion_ids"].tolist()]
    return [by_tokens[row] for row in zip(prompts, completions, strict=True)]


def through_gmpo(
    model: PreTrainedModel,
    rounds: Rounds,
    steps: Sequence[Sequence[tuple[str, int]]],
    *,
    engine: str = "fast",
    skips_dead_rows: bool = True,
    objective: Callable[..., Any] | None = None,
) -> tuple[Weights, list[dict[str, float]]]:
    """The update of gmpo on the rows that TRL took step by step, and each step's figures.

    Args:
        model: as TRL got it, trained in place.
        rounds: what is replayed.
        steps: rows of each optimizer step, STEPS_PER_ROUND of them a round.
        engine: gmpo's `training.engine`.
        skips_dead_rows: leave rows with advantage 0 out, from the figures too.
        objective: in place of the named one, to see a wrong one fail.
    """
    policy = Policy(model, engine=engine, warn=print)
    settings = LossSettings(
        objective=objective or bind_objective(rounds.objective, clips={}, max_tokens=1)
    )
    apply_step = optimizer_step(policy, rounds)
    advantages = advantages_of(rounds.groups)
    before = copied(model)
    figures = []
    for first in range(0, len(steps), STEPS_PER_ROUND):
        batches = [
            step_batch(rows, rounds.groups, advantages, policy, skips_dead_rows=skips_dead_rows)
            for rows in steps[first : first + STEPS_PER_ROUND]
        ]
        batches, _ = with_old_logprobs(policy, batches, temperature=1.0)
        for batch in batches:
            measures = accumulate_gradients(policy, batch, settings)
            if measures.terms:  # not a step of rows with advantage 0 alone
                figures.append(step_diagnostics(measures.terms, measures.masks))
            apply_step()
    return moved(model, before), figures


def advantages_of(groups: Sequence[Group]) -> dict[tuple[str, int], float]:
    """gmpo's advantages of whole groups with TRL's eps, by prompt id and rollout index."""
    rewards = torch.tensor(
        [[r.reward for r in group.rollouts] for group in groups], dtype=torch.float64
    )
    table = group_advantages(rewards, eps=ADVANTAGE_EPS)
    return {
        (group.prompt.id, rollout.index): value
        for group, row in zip(groups, table.tolist(), strict=True)
        for rollout, value in zip(group.rollouts, row, strict=True)
    }


def step_batch(
    rows: Sequence[tuple[str, int]],
    groups: Sequence[Group],
    advantages: Mapping[tuple[str, int], float],
    policy: Policy,
    *,
    skips_dead_rows: bool,
) -> StepBatch:
    """One step on the given rows: each group with those of its rollouts that are among them."""
    parts = []
    # A micro-batch has the precision of its log-probabilities; these are replaced later.
    dtype = np.float64 if policy.dtype == torch.float64 else np.float32
    for group in groups:
        kept = tuple(
            replace(r, sampler_logprobs=np.zeros(r.num_tokens, dtype=dtype))
            for r in group.rollouts
            if (group.prompt.id, r.index) in rows
        )
        if kept:
            parts.append(replace(group, rollouts=kept))
    table = torch.zeros(len(parts), max(len(part.rollouts) for part in parts), dtype=torch.float64)
    for number, part in enumerate(parts):
        for place, rollout in enumerate(part.rollouts):
            table[number, place] = advantages[part.prompt.id, rollout.index]
    return build_step(
        parts,
        table,
        max_tokens=2048,
        shares_prompts=policy.shares_prompts,
        skips_dead_rows=skips_dead_rows,
        device=policy.device,
    )


def optimizer_step(policy: Policy, rounds: Rounds) -> Callable[[], object]:
    """One step of the rounds' optimizer at their learning rate."""
    if rounds.optimizer == "adamw":
        adamw = PolicyOptimizer(policy, betas=(0.9, 0.999))
        return lambda: adamw.apply_step(learning_rate=rounds.learning_rate, clip_norm=1.0)
    sgd = torch.optim.SGD(list(policy.masters.values()), lr=rounds.learning_rate)

    def step() -> None:
        sgd.step()
        policy.publish_masters()
        sgd.zero_grad()

    return step


def copied(model: PreTrainedModel) -> Weights:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def moved(model: PreTrainedModel, before: Weights) -> Weights:
    return {name: weight.detach() - before[name] for name, weight in model.named_parameters()}


def relative_difference(update: Weights, expected: Weights) -> float:
    """|update - expected| / |expected| over all weights, in Euclidean norm."""
    gap = {name: update[name] - moved_by for name, moved_by in expected.items()}
    return norm(gap) / norm(expected)


def norm(update: Weights) -> float:
    """Euclidean, over all weights."""
    return math.sqrt(sum(float(each.double().square().sum()) for each in update.values()))


def cosine_similarity(update: Weights, expected: Weights) -> float:
    """Cosine between two updates over all weights; 0 where only one of them is zero."""
    product = ours = theirs = 0.0
    for name, each in expected.items():
        a, b = update[name].double(), each.double()
        product += float((a * b).sum())
        ours += float(a.square().sum())
        theirs += float(b.square().sum())
    return product / math.sqrt(ours * theirs) if ours and theirs else 0.0


def random_groups(
    *,
    vocabulary: int,
    end_token: int,
    prompt_lengths: Sequence[int],
    group_size: int,
    longest: int,
) -> tuple[Group, ...]:
    """Groups of random completions of 1 to `longest` tokens, of which every second one ends."""
    generator = np.random.default_rng(0)
    prompts, completions = [], []
    for length in prompt_lengths:
        prompts.append(generator.integers(5, vocabulary, size=length))
        completions.append(
            [
                generator.integers(5, vocabulary, size=generator.integers(1, longest + 1))
                for _ in range(group_size)
            ]
        )
        for ended in completions[-1][::2]:
            ended[-1] = end_token
    return rewarded_groups(prompts, completions)


def rewarded_groups(
    prompts: Sequence[np.ndarray], completions: Sequence[Sequence[np.ndarray]]
) -> tuple[Group, ...]:
    """Groups of the given tokens with random rewards.

    Rewards are 0 or 1 in most groups, fractions in some, and all equal in every fourth, whose
    advantages are 0.
    """
    generator = np.random.default_rng(1)
    groups = []
    for number, (prompt_ids, drawn) in enumerate(zip(prompts, completions, strict=True)):
        name = f"p{number}"
        rewards = generator.permutation(np.arange(len(drawn)) % 2).astype(float)
        if number % 4 == 1:
            rewards = generator.random(len(drawn)).round(3)
        if number % 4 == 3:
            rewards[:] = 1.0
        groups.append(
            Group(
                prompt=Prompt(id=name, text=name, token_ids=tuple(prompt_ids.tolist())),
                rollouts=tuple(
                    _rollout(name, index, ids, reward)
                    for index, (ids, reward) in enumerate(zip(drawn, rewards.tolist(), strict=True))
                ),
            )
        )
    return tuple(groups)


def _rollout(prompt_id: str, index: int, drawn: np.ndarray, reward: float) -> Rollout:
    """A rollout of given tokens; gmpo scores them itself, so the sampler's figures are zeros."""
    return Rollout(
        prompt_id=prompt_id,
        index=index,
        token_ids=drawn,
        from_policy=np.ones(len(drawn), dtype=np.bool_),
        sampler_logprobs=np.zeros(len(drawn), dtype=np.float32),
        text="",
        finish_reason="stop",
        first_version=0,
        last_version=0,
        reward=reward,
    )
