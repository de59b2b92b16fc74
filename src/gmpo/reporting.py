"""A round's figures and some of its completions, as records for the run folder."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from gmpo.advantages import group_advantages
from gmpo.assembly import TrainingParts
from gmpo.batch import reward_table
from gmpo.host_memory import peak_resident_bytes
from gmpo.records import Group, Rollout
from gmpo.rewards import ScoredGroups
from gmpo.saved_rounds import SampledRound
from gmpo.steps import RoundUpdate, StepResult, advantages_of

__all__ = ["num_completion_tokens", "peak_memory_gib", "rollout_records", "round_metrics"]

_COMBINED: Mapping[str, Callable[[Sequence[float]], float]] = {
    "ratio/min": min,
    "ratio/max": max,
    "update/skipped_steps_total": sum,
}
"""How a round's figure comes from its steps', where it is not their mean."""


def round_metrics(
    parts: TrainingParts, sampled: SampledRound, update: RoundUpdate
) -> dict[str, float]:
    """The round's figures: of its rollouts, and its steps' figures averaged or summed up.

    Groups that a refilled round sampled and does not train on count like the others: without them
    the reward would be that of chosen groups.
    """
    scored = sampled.scored
    rollouts = [rollout for group in scored.groups for rollout in group.rollouts]
    rewarded = [rollout for rollout in rollouts if rollout.reward is not None]
    rewards, valid = reward_table(scored.groups)
    advantages = group_advantages(rewards, valid=valid, scale="none")
    logprobs = np.concatenate([r.sampler_logprobs[r.from_policy] for r in rollouts])
    num_tokens = num_completion_tokens(scored.groups)
    metrics = {
        "rollout/reward": float(rewards[valid].mean()) if rewarded else math.nan,
        "rollout/groups": float(len(scored.groups)),
        "rollout/trained_groups": float(len(sampled.trained)),
        "rollout/dead_groups": float((advantages == 0).all(dim=-1).sum()),
        "rollout/tokens": float(num_tokens),
        "rollout/completion_tokens": num_tokens / len(rollouts),
        "rollout/given_tokens_fraction": 1 - len(logprobs) / num_tokens if num_tokens else math.nan,
        "rollout/truncated_fraction": sum(r.is_truncated for r in rollouts) / len(rollouts),
        "rollout/entropy": float(-logprobs.mean()) if len(logprobs) else math.nan,
        "rollout/errors_total": float(len(rollouts) - len(rewarded)),
        "grading/timeouts_total": float(scored.num_timeouts),
        "grading/scorer_errors_total": float(scored.grading.get("scorer_errors", 0)),
        "memory/peak_gib": peak_memory_gib(parts.policy.device),
        "time/rollout_seconds": sampled.rollout_seconds,
        "time/reward_seconds": sampled.reward_seconds,
        "time/tokens_per_second": num_tokens / sampled.rollout_seconds,
    }
    metrics |= _component_metrics(scored, rewarded)
    metrics["rollout/old_from_sampler"] = float(update.used_sampler_logprobs)
    if update.mismatch is not None:
        metrics["rollout/mismatch_mean"] = update.mismatch.mean
        metrics["rollout/mismatch_max"] = update.mismatch.max
    for name in sorted({name for step in update.steps for name in step.metrics}):
        series = [step.metrics[name] for step in update.steps if name in step.metrics]
        metrics[name] = _COMBINED.get(name, _mean)(series)
    return metrics


def rollout_records(
    parts: TrainingParts, sampled: SampledRound, update: RoundUpdate, *, round_number: int
) -> Iterator[dict[str, Any]]:
    """Some of the round's groups with advantages and ratios, for `gmpo inspect`.

    They are spread over the round up to its last group: in the first step every ratio is 1.
    """
    groups = sampled.scored.groups
    num_shown = min(parts.config.tracking.groups_per_round, len(groups))
    shown = [(number + 1) * len(groups) // num_shown - 1 for number in range(num_shown)]
    advantages = advantages_of(parts, groups)
    row_ratios = _row_ratios(update.steps)
    for place in shown:
        group = groups[place]
        ratios = row_ratios if place in sampled.trained else {}
        yield {
            "round": round_number,
            "group": place,
            "prompt_id": group.prompt.id,
            "prompt": _prompt_text(group),
            "answer": group.prompt.columns.get("answer"),
            "is_trained": place in sampled.trained,
            "rollouts": [
                {
                    "text": rollout.text,
                    "tokens": rollout.num_tokens,
                    "finish_reason": rollout.finish_reason,
                    "reward": rollout.reward,
                    "rewards": dict(rollout.rewards),
                    "notes": dict(rollout.notes),
                    "error": rollout.error,
                    "advantage": float(advantages[place, column]),
                    "ratio": ratios.get(f"{rollout.prompt_id}#{rollout.index}"),
                }
                for column, rollout in enumerate(group.rollouts)
            ],
        }


def _component_metrics(scored: ScoredGroups, rewarded: Sequence[Rollout]) -> dict[str, float]:
    """Each reward component's figures, apart from the others and before weights."""
    metrics = {}
    for name, num_errors in scored.component_errors.items():
        values = [rollout.rewards[name] for rollout in rewarded if name in rollout.rewards]
        if values:
            metrics[f"rollout/reward/{name}"] = float(np.mean(values))
            metrics[f"rollout/reward_deviation/{name}"] = float(np.std(values))
        if rewarded:
            absent = 1 - len(values) / len(rewarded)
            metrics[f"rollout/reward_absent_fraction/{name}"] = absent
        metrics[f"rollout/reward_errors_total/{name}"] = float(num_errors)
    for name, logged in scored.metrics.items():
        metrics[f"reward_metric/{name}"] = _mean(logged)
    return metrics


def num_completion_tokens(groups: Sequence[Group]) -> int:
    """Completion tokens of all rollouts."""
    return sum(rollout.num_tokens for group in groups for rollout in group.rollouts)


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory so far in GiB: allocated on a CUDA device, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return peak_resident_bytes() / 2**30


def _row_ratios(results: Sequence[StepResult]) -> dict[str, dict[str, float]]:
    """Each trained row's sequence ratio and its tokens' smallest and largest ratio."""
    table = {}
    # A prompt that came twice in the round has two rows of one name: none beats the wrong one.
    repeats = Counter(name for result in results for name in result.measures.row_names)
    for result in results:
        names = iter(result.measures.row_names)
        for terms, mask in zip(result.measures.terms, result.measures.masks, strict=True):
            low = torch.where(mask, terms.log_ratio, torch.inf).amin(dim=-1).exp().tolist()
            high = torch.where(mask, terms.log_ratio, -torch.inf).amax(dim=-1).exp().tolist()
            for row, sequence_ratio in enumerate(terms.sequence_ratio.tolist()):
                ratio = {"sequence": sequence_ratio, "min": low[row], "max": high[row]}
                name = next(names)
                if repeats[name] == 1:
                    table[name] = ratio
    return table


def _prompt_text(group: Group) -> str:
    if group.prompt.messages is None:
        return group.prompt.text or ""
    return "\n".join(f"{turn.role}: {turn.content}" for turn in group.prompt.messages)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
