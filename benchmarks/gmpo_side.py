"""gmpo, driven round by round with the functions its own loop calls; started by vs_trl.py."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any, cast

import numpy as np
import torch
from scripts.replay import ADVANTAGE_EPS, cosine_similarity, relative_difference
from torch import nn
from transformers import AutoConfig

from benchmarks.devices import forget_peak_memory, peak_memory_gib, wait_for
from benchmarks.exchange import (
    SampledRows,
    Scratch,
    clear_moments,
    gradient_sample,
    load_weights,
    save_weights,
)
from benchmarks.worker import serve
from benchmarks.workloads import (
    STEPS_PER_ROUND,
    Workload,
    patterned_rewards,
    training_prompts,
)
from gmpo import __version__
from gmpo.assembly import TrainingParts, build_parts
from gmpo.checkpoint import TrainingState
from gmpo.config import RunConfig
from gmpo.inputs import Given
from gmpo.policy.load import end_token_ids, model_folder
from gmpo.policy.score import Policy
from gmpo.records import Group, Prompt, Rollout
from gmpo.reporting import num_completion_tokens, round_metrics
from gmpo.reward_table import build_rewards
from gmpo.rounds import live_groups as live_places
from gmpo.rounds import sample_round
from gmpo.steps import RoundUpdate, build_steps, update_policy
from gmpo.tasks.task import Task
from gmpo.update import accumulate_gradients, with_old_logprobs

PATTERN = "pattern"
Changes = Mapping[str, Mapping[str, Any]]


class GmpoSide:
    """The parts of a run, set back to the same weights before every round.

    Args:
        workload: what is timed.
        dtype: as the recipe's `model.dtype`.
        scratch: where the starting weights and TRL's rounds lie.
        changes: of the recipe, by table and key.
        device: "cpu" or "cuda".
    """

    def __init__(
        self,
        workload: Workload,
        dtype: str,
        scratch: Scratch,
        changes: Changes | None = None,
        *,
        device: str = "cpu",
    ) -> None:
        self._device = device
        self._workload = workload
        self._scratch = scratch
        self.notes: list[str] = []
        task = Task(
            name=workload.name,
            train=training_prompts(workload.prompts),
            held_out=(),
            instruction="",
        )
        self.parts = build_parts(
            recipe(workload, dtype, changes or {}, device=device),
            warn=self.notes.append,
            given=Given(task=task),
        )
        if workload.ignores_end:
            endless = replace(self.parts.sampling, stop_ids=())
            self.parts = replace(self.parts, sampling=endless)
        self._version = 0
        self._may_trust_sampler = True

    def round(self, *, number: int, live_groups: int | None) -> dict[str, Any]:
        """One round as the training loop runs it: seconds of its stages, tokens, peak memory.

        Args:
            number: of the round, which decides the prompts.
            live_groups: groups that get different rewards; None asks the task.
        """
        return self._played(self._restarted(live_groups), number)

    def learn(self, *, number: int) -> dict[str, Any]:
        """The next round of a run that learns: it begins with the weights of the one before."""
        return self._played(self.parts, number)

    def save(self) -> dict[str, Any]:
        """Leave the weights in the scratch folder."""
        masters = self.parts.policy.masters.items()
        save_weights({name: w.detach() for name, w in masters}, self._scratch.learned)
        return {}

    def _played(self, parts: TrainingParts, number: int) -> dict[str, Any]:
        forget_peak_memory(self._device)
        started = time.perf_counter()
        sampled = sample_round(parts, self._state(number))
        rewarded = time.perf_counter()
        update = self._update(parts, sampled.trained_groups, first_step=number * STEPS_PER_ROUND)
        figures = round_metrics(parts, sampled, update)
        wait_for(self._device)
        ended = time.perf_counter()
        self._may_trust_sampler = update.mismatch is None or update.mismatch.is_small
        groups = sampled.scored.groups
        return {
            "rollout_seconds": sampled.rollout_seconds,
            "reward_seconds": sampled.reward_seconds,
            "update_seconds": ended - rewarded,
            "round_seconds": ended - started,
            "tokens": num_completion_tokens(groups),
            "prompt_tokens": mean(len(group.prompt.token_ids or ()) for group in groups),
            "live_share": len(live_places(groups)) / len(groups),
            "mean_reward": figures["rollout/reward"],
            "peak_gib": peak_memory_gib(self._device),
            "mismatch_mean": None if update.mismatch is None else update.mismatch.mean,
            "used_sampler_logprobs": update.used_sampler_logprobs,
        }

    def replay(self, *, number: int, sgd_learning_rate: float | None = None) -> dict[str, Any]:
        """The update on TRL's last completions and rewards: seconds, and how far it is from TRL's.

        What the sampler would have reported beside the tokens is filled in before the clock
        starts, because a round's sampler does so at no extra cost; where log-probabilities are
        recomputed, that is part of the update and is timed.

        Args:
            number: of the round that TRL did.
            sgd_learning_rate: that TRL took; None if it took AdamW.
        """
        parts = self._restarted(None)
        if sgd_learning_rate is not None:
            parts = with_sgd(parts, sgd_learning_rate)
        groups = self._groups(number, SampledRows.read(self._scratch.completions))
        groups = with_sampler_logprobs(parts, groups)
        wait_for(self._device)
        started = time.perf_counter()
        update = self._update(parts, groups, first_step=0)
        wait_for(self._device)
        seconds = time.perf_counter() - started
        return {
            "update_seconds": seconds,
            "used_sampler_logprobs": update.used_sampler_logprobs,
            **self._compared(),
            "gradient_cosine": self._gradient_cosine(number),
        }

    def record(self, *, number: int, live_groups: int, sgd_learning_rate: float) -> dict[str, Any]:
        """A round with SGD whose completions and update are left where TRL leaves its own.

        So that another side's `replay` is held against this one's.
        """
        parts = with_sgd(self._restarted(live_groups), sgd_learning_rate)
        sampled = sample_round(parts, self._state(number))
        rows_of(sampled.scored.groups).write(self._scratch.completions)
        groups = with_sampler_logprobs(parts, sampled.trained_groups)
        self._update(parts, groups, first_step=0)
        save_weights(self._moved(), self._scratch.update)
        gradient = gradient_sample(self._with_first_gradient(number).items())
        save_weights(gradient, self._scratch.gradient)
        self.parts.optimizer.zero_gradients()
        return {"tokens": num_completion_tokens(groups)}

    def first_gradient(self, *, number: int) -> dict[str, torch.Tensor]:
        """The first gradient on the completions that were left, in fp32 on the CPU."""
        masters = self._with_first_gradient(number).items()
        gradients = {name: w.grad.float().cpu() for name, w in masters if w.grad is not None}
        self.parts.optimizer.zero_gradients()
        return gradients

    def _gradient_cosine(self, number: int) -> float:
        """Of the first gradient and TRL's; 1 where neither side has one."""
        theirs = load_weights(self._scratch.gradient)
        ours = gradient_sample(self._with_first_gradient(number).items())
        self.parts.optimizer.zero_gradients()
        if not theirs or not ours:
            return float(bool(theirs) == bool(ours))
        return cosine_similarity(ours, theirs)

    def _with_first_gradient(self, number: int) -> Mapping[str, torch.Tensor]:
        """The first weights with the gradient of the first step that has one.

        Until that step no weight has moved.
        """
        parts = self._restarted(None)
        groups = self._groups(number, SampledRows.read(self._scratch.completions))
        for step in build_steps(parts, groups):
            accumulate_gradients(parts.policy, step, parts.loss, is_old_policy=True)
            if gradient_sample(parts.policy.masters.items()):
                break
        return parts.policy.masters

    def mismatch(self, *, number: int) -> dict[str, Any]:
        """|log pi_trainer - log pi_sampler| of each token of a round, in nats, on equal weights."""
        parts = self._restarted(self._workload.prompts_per_round)
        groups = sample_round(parts, self._state(number)).trained_groups
        scored, _ = with_old_logprobs(
            parts.policy, build_steps(parts, groups), temperature=parts.loss.temperature
        )
        gaps = [
            (batch.old_logprobs - batch.sampler_logprobs)[batch.mask].abs().float()
            for step in scored
            for batch in step.micro_batches
        ]
        return {"gaps": torch.cat(gaps).tolist()}

    def about(self) -> dict[str, Any]:
        """What has to be alike on both sides, and what was resolved here."""
        parts = self.parts
        return {
            "end_tokens": sorted(end_token_ids(parts.policy.model, parts.tokenizer)),
            "dtype": parts.config.model.dtype,
            "engine": parts.config.training.engine,
            "notes": self.notes,
        }

    def close(self) -> None:
        self.parts.close()

    def _restarted(self, live_groups: int | None) -> TrainingParts:
        """The parts with the first weights, a fresh optimizer and the wanted rewards."""
        parts = self.parts
        parts.policy.load_weights(load_weights(self._scratch.start).items())
        clear_moments(parts.optimizer.adamw)
        # Comparing widens gradients that a round may leave narrow; their room is not the round's.
        parts.policy.forget_gradients(keeps_room=False)
        self._publish(parts)
        return parts if live_groups is None else self._with_pattern(parts, live_groups)

    def _publish(self, parts: TrainingParts) -> None:
        self._version += STEPS_PER_ROUND
        parts.publish_weights(self._version)

    def _with_pattern(self, parts: TrainingParts, live_groups: int) -> TrainingParts:
        """Rewards by place instead of by answer."""
        group_size = self._workload.group_size

        def pattern(*, completions: Sequence[Any], **_: Any) -> list[float]:
            return patterned_rewards(
                len(completions), group_size=group_size, live_groups=live_groups
            )

        config = with_pattern(parts.config)
        rewards = build_rewards(config, parts.grader, given={PATTERN: pattern})
        return replace(parts, config=config, rewards=rewards)

    def _update(
        self, parts: TrainingParts, groups: Sequence[Group], *, first_step: int
    ) -> RoundUpdate:
        update = update_policy(
            parts,
            groups,
            first_step=first_step,
            may_trust_sampler=self._may_trust_sampler,
            measures_cosine=False,
        )
        self._publish(parts)
        return update

    def _state(self, number: int) -> TrainingState:
        return TrainingState(
            round=number,
            step=number * STEPS_PER_ROUND,
            prompts_taken=number * self._workload.prompts_per_round,
            mismatch_is_small=None,
            recipe_digest="",
            version=__version__,
        )

    def _groups(self, number: int, rows: SampledRows) -> list[Group]:
        """TRL's rows as groups of the round's prompts, which must be the tokens that TRL saw."""
        count, size = self._workload.prompts_per_round, self._workload.group_size
        prompts = self.parts.prompts.take(number * count, count)
        groups = []
        for place, prompt in enumerate(prompts):
            places = range(place * size, (place + 1) * size)
            differing = [n for n in places if tuple(rows.prompt_ids[n]) != prompt.token_ids]
            if differing:
                raise ValueError(
                    f"prompt {prompt.id!r} has {len(prompt.token_ids or ())} tokens here and "
                    f"{len(rows.prompt_ids[differing[0]])} others in TRL; use the same tokenizer "
                    "and chat template"
                )
            groups.append(group_of(prompt, rows, places))
        return groups

    def _moved(self) -> dict[str, torch.Tensor]:
        """How far each weight is from where rounds start."""
        start = load_weights(self._scratch.start)
        masters = self.parts.policy.masters.items()
        return {name: weight.detach().cpu() - start[name] for name, weight in masters}

    def _compared(self) -> dict[str, float]:
        theirs, update = load_weights(self._scratch.update), self._moved()
        if not any(bool(moved.any()) for moved in theirs.values()):
            # Every group was dead, so neither side may have moved.
            has_moved = any(bool(moved.any()) for moved in update.values())
            return {"difference": math.inf if has_moved else 0.0, "cosine": float(not has_moved)}
        return {
            "difference": relative_difference(update, theirs),
            "cosine": cosine_similarity(update, theirs),
        }


class Sgd:
    """Stands for `PolicyOptimizer` where gradients are compared: no moments and no clipping."""

    def __init__(self, policy: Policy, learning_rate: float) -> None:
        self._policy = policy
        self._weights = list(policy.masters.values())
        self._sgd = torch.optim.SGD(self._weights, lr=learning_rate)

    def zero_gradients(self) -> None:
        self._sgd.zero_grad()

    def apply_step(
        self, *, learning_rate: float, clip_norm: float, is_wanted: Callable[[float], bool]
    ) -> float:
        """One step if it is wanted; the rate and the norm are AdamW's and are left aside."""
        del learning_rate, clip_norm
        self._policy.widen_gradients()
        norm = float(nn.utils.get_total_norm([w.grad for w in self._weights if w.grad is not None]))
        if is_wanted(norm):
            self._sgd.step()
            self._policy.publish_masters()
        self.zero_gradients()
        return norm


def with_sgd(parts: TrainingParts, learning_rate: float) -> TrainingParts:
    return replace(parts, optimizer=cast(Any, Sgd(parts.policy, learning_rate)))


def recipe(workload: Workload, dtype: str, changes: Changes, *, device: str) -> RunConfig:
    """A run of the workload with TRL's constants where the two differ by default."""
    tables: dict[str, dict[str, Any]] = {
        "model": {"name": workload.model, "device": device, "dtype": dtype},
        "task": {
            "kind": "given",
            "train_items": len(training_prompts(workload.prompts)),
            "digest": workload.name,
        },
        "sampling": {
            "group_size": workload.group_size,
            "prompts_per_round": workload.prompts_per_round,
            "max_new_tokens": workload.max_new_tokens,
            "max_length": min(4096, context_length(workload.model)),
        },
        "objective": {"advantage_eps": ADVANTAGE_EPS},
        "training": {
            "steps_per_round": STEPS_PER_ROUND,
            "learning_rate": workload.learning_rate,
            "adam_beta2": 0.999,
            "seed": workload.seed,
        },
        "evaluation": {"every_rounds": 0, "few_shot": 0, "sampled": False},
    }
    return RunConfig.model_validate(
        tables | {name: tables[name] | dict(of_table) for name, of_table in changes.items()}
    )


def context_length(model: str) -> int:
    """Tokens that a model takes, prompt and completion together."""
    length: int = AutoConfig.from_pretrained(model_folder(model)).max_position_embeddings
    return length


def with_pattern(config: RunConfig) -> RunConfig:
    """The same recipe rewarding by place."""
    reward = {
        "weights": {PATTERN: 1.0},
        "functions": {PATTERN: "benchmarks.workloads:patterned_rewards"},
    }
    return RunConfig.model_validate(config.model_dump() | {"reward": reward})


def group_of(prompt: Prompt, rows: SampledRows, places: range) -> Group:
    """One group of given completions and rewards; log-probabilities are zeros for now."""
    return Group(
        prompt=prompt,
        rollouts=tuple(
            Rollout(
                prompt_id=prompt.id,
                index=index,
                token_ids=np.array(rows.completion_ids[place], dtype=np.int64),
                from_policy=np.ones(len(rows.completion_ids[place]), dtype=np.bool_),
                sampler_logprobs=np.zeros(len(rows.completion_ids[place]), dtype=np.float32),
                text="",
                finish_reason="stop",
                first_version=0,
                last_version=0,
                reward=rows.rewards[place],
            )
            for index, place in enumerate(places)
        ),
    )


def rows_of(groups: Sequence[Group]) -> SampledRows:
    """Completions and rewards, group by group."""
    rollouts = [(group, rollout) for group in groups for rollout in group.rollouts]
    return SampledRows(
        prompt_ids=[list(group.prompt.token_ids or ()) for group, _ in rollouts],
        completion_ids=[rollout.token_ids.tolist() for _, rollout in rollouts],
        rewards=[float(rollout.reward or 0.0) for _, rollout in rollouts],
    )


def with_sampler_logprobs(parts: TrainingParts, groups: Sequence[Group]) -> list[Group]:
    """The groups with the policy's own log-probabilities on live rows, as its sampler reports."""
    scored, _ = with_old_logprobs(
        parts.policy, build_steps(parts, groups), temperature=parts.loss.temperature
    )
    found: dict[str, np.ndarray] = {}
    for step in scored:
        for batch in step.micro_batches:
            lengths = batch.completion_lengths.tolist()
            for name, row, length in zip(batch.row_names, batch.old_logprobs, lengths, strict=True):
                found[name] = row[:length].float().cpu().numpy()

    def reported(rollout: Rollout) -> Rollout:
        logprobs = found.get(f"{rollout.prompt_id}#{rollout.index}", rollout.sampler_logprobs)
        return replace(rollout, sampler_logprobs=logprobs)

    return [replace(group, rollouts=tuple(map(reported, group.rollouts))) for group in groups]


def commands_of(side: GmpoSide) -> dict[str, Callable[..., dict[str, Any]]]:
    return {
        "round": side.round,
        "replay": side.replay,
        "mismatch": side.mismatch,
        "about": side.about,
        "learn": side.learn,
        "save": side.save,
    }


def main(settings: Mapping[str, Any]) -> None:
    torch.set_num_threads(settings["threads"])
    side = GmpoSide(
        Workload(**settings["workload"]),
        settings["dtype"],
        Scratch(folder=Path(settings["scratch"])),
        settings.get("changes"),
        device=settings.get("device", "cpu"),
    )
    serve(commands_of(side))
    side.close()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
