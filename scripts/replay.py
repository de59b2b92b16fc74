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
from transformers import PreTrainedModel, PreTrainedTokenizerBase
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
        model: fp32, on the CPU.
        tokenizer: only decodes completions for TRL's log.
        rounds: what is replayed.
        kind: the trainer; TRL's own for the objective unless given.
        options: of TRL's config, over those set here.
    """
    trainer_class = kind or {"gmpo": GMPOTrainer, "grpo": GRPOTrainer}[rounds.objective]
    config_class = GRPOConfig if rounds.objective == "grpo" else GMPOConfig
    rollouts = {(group.prompt.id, r.index): r for group in rounds.groups for r in group.rollouts}
    group_of = {group.prompt.id: group for group in rounds.groups}
    seen: list[dict[str, Any]] = []

    class Recording(trainer_class):  # type: ignore[misc, valid-type]
        def _prepare_inputs(self, generation_batch: Any) -> Any:
            inputs = super()._prepare_inputs(generation_batch)
            seen.append(inputs)
            return inputs

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

    def reward(
        prompts: list[str], completion_ids: list[list[int]], **_: Any
    ) -> list[float | None]:
        return [
            next(r.reward for r in group_of[name].rollouts if r.token_ids.tolist() == ids)
            for name, ids in zip(prompts, completion_ids, strict=True)
        ]

    before = copied(model)
    with tempfile.TemporaryDirectory() as folder:
        arguments = {
            "output_dir": folder,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "logging_steps": 1,
            "dataloader_pin_memory": False,
            "optim": {"sgd": "sgd", "adamw": "adamw_torch"}[rounds.optimizer],
            "learning_rate": rounds.learning_rate,
            "lr_scheduler_type": "constant",
            # Unclipped SGD sees a gradient of the wrong size, which AdamW does not.
            "max_grad_norm": {"sgd": 0.0, "adamw": 1.0}[rounds.optimizer],
            "num_generations": len(rounds.groups[0].rollouts),
            "per_device_train_batch_size": rounds.rows_per_step,
            "steps_per_generation": STEPS_PER_ROUND,
            "gradient_accumulation_steps": 1,
            "max_steps": rounds.num_rounds * STEPS_PER_ROUND,
            **({"loss_type": "grpo"} if rounds.objective == "grpo" else {}),
            **options,
        }
        trainer = Recording(
            model,
            reward,
            args=config_class(**arguments),
            train_dataset=Dataset.from_dict({"prompt": list(group_of)}),
            processing_class=tokenizer,
            rollout_func=rollout_func,
        )
        trainer.train()
    steps = [rows_of(inputs, rollouts, group_of) for inputs in seen]
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


def rows_of(
    inputs: Mapping[str, Tensor],
    rollouts: Mapping[tuple[str, int], Rollout],
    group_of: Mapping[str, Group],
) -> list[tuple[str, int]]:
    """Which rollouts the rows of TRL's micro-batch are, by their token ids."""
    by_tokens = {
        (group_of[name].prompt.token_ids, tuple(rollout.token_ids.tolist())): (name, index)
        for (name, index), rollout in rollouts.items()
    }
    assert len(by_tokens) == len(rollouts), "two rollouts of one prompt must not be equal"
    found = []
    for row in range(len(inputs["completion_ids"])):
        tokens = [
            tuple(inputs[f"{part}_ids"][row][inputs[f"{part}_mask"][row].bool()].tolist())
            for part in ("prompt", "completion")
        ]
        found.append(by_tokens[tokens[0], tokens[1]])
    return found


def through_gmpo(
    model: PreTrainedModel,
    rounds: Rounds,
    steps: Sequence[Sequence[tuple[str, int]]],
    *,
    engine: str = "fast",
    objective: Callable[..., Any] | None = None,
) -> tuple[Weights, list[dict[str, float]]]:
    """The update of gmpo on the rows that TRL took step by step, and each step's figures.

    Args:
        model: fp32, trained in place.
        rounds: what is replayed.
        steps: rows of each optimizer step, STEPS_PER_ROUND of them a round.
        engine: gmpo's `training.engine`.
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
            step_batch(rows, rounds.groups, advantages, policy)
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
) -> StepBatch:
    """One step on the given rows: each group with those of its rollouts that are among them."""
    parts = []
    for group in groups:
        kept = tuple(r for r in group.rollouts if (group.prompt.id, r.index) in rows)
        if kept:
            parts.append(replace(group, rollouts=kept))
    table = torch.zeros(len(parts), max(len(part.rollouts) for part in parts))
    for number, part in enumerate(parts):
        for place, rollout in enumerate(part.rollouts):
            table[number, place] = advantages[part.prompt.id, rollout.index]
    return build_step(
        parts,
        table,
        max_tokens=2048,
        shares_prompts=policy.shares_prompts,
        skips_dead_rows=True,
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
    gap = math.sqrt(sum(float((update[n] - e).double().square().sum()) for n, e in expected.items()))
    size = math.sqrt(sum(float(e.double().square().sum()) for e in expected.values()))
    return gap / size


def random_rounds(
    *,
    vocabulary: int,
    prompt_lengths: Sequence[int],
    group_size: int,
    longest: int,
    prompts_per_round: int,
    objective: str,
    optimizer: str,
    learning_rate: float,
    seed: int = 0,
) -> Rounds:
    """Random prompts and completions of 1 to `longest` tokens, with rewards of three kinds.

    The groups' rewards are 0 or 1, fractions, and all equal in every fourth group, whose
    advantages are 0.
    """
    generator = np.random.default_rng(seed)
    groups = []
    for number, length in enumerate(prompt_lengths):
        rewards = generator.integers(0, 2, size=group_size).astype(float)
        if number % 4 == 1:
            rewards = generator.random(group_size).round(3)
        if number % 4 == 3:
            rewards[:] = 1.0
        drawn = [
            generator.integers(5, vocabulary, size=generator.integers(1, longest + 1))
            for _ in range(group_size)
        ]
        groups.append(
            Group(
                prompt=Prompt(
                    id=f"p{number}",
                    text=f"p{number}",
                    token_ids=tuple(generator.integers(5, vocabulary, size=length).tolist()),
                ),
                rollouts=tuple(
                    Rollout(
                        prompt_id=f"p{number}",
                        index=index,
                        token_ids=ids,
                        from_policy=np.ones(len(ids), dtype=np.bool_),
                        sampler_logprobs=np.zeros(len(ids), dtype=np.float32),
                        text="",
                        finish_reason="stop",
                        first_version=0,
                        last_version=0,
                        reward=float(reward),
                    )
                    for index, (ids, reward) in enumerate(zip(drawn, rewards, strict=True))
                ),
            )
        )
    return Rounds(
        groups=tuple(groups),
        prompts_per_round=prompts_per_round,
        objective=objective,
        optimizer=optimizer,
        learning_rate=learning_rate,
    )
