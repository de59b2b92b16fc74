"""The training loop: rounds of rollouts, each with several optimizer steps."""

from __future__ import annotations

import hashlib
import json
import math
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from gmpo import __version__
from gmpo.advantages import group_advantages
from gmpo.assembly import TrainingParts, build_parts
from gmpo.batch import StepBatch, build_step, reward_table, split_steps
from gmpo.checkpoint import (
    TrainingState,
    latest_checkpoint,
    load_checkpoint,
    remove_old_checkpoints,
    save_checkpoint,
)
from gmpo.config import RunConfig
from gmpo.errors import CheckpointError, RunFolderError
from gmpo.evaluation import Evaluation
from gmpo.objective import step_diagnostics
from gmpo.recipe import dump_recipe
from gmpo.records import Group
from gmpo.rewards import ScoredGroups
from gmpo.rollouts import sample_groups
from gmpo.schedules import learning_rate_factor
from gmpo.tracking import REWARD_COMPONENT_PREFIX, RunFolder, provenance, read_lines
from gmpo.update import (
    Mismatch,
    StepMeasures,
    accumulate_gradients,
    gradient_cosine,
    with_old_logprobs,
    with_reference_logprobs,
)

__all__ = ["Report", "TrainingResult", "peak_memory_gib", "train"]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the loop tells its caller as it happens.

    Attributes:
        stage: "before", "round", "evaluation", "checkpoint" or "after".
        round: rounds done.
        metrics: the round's figures, steps averaged (stage "round").
        evaluations: results of the stage.
    """

    stage: str
    round: int
    metrics: dict[str, float]
    evaluations: tuple[Evaluation, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _StepResult:
    measures: StepMeasures
    metrics: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """A finished run: where it lies and how it did."""

    folder: Path
    checkpoint: Path
    before: tuple[Evaluation, ...]
    after: tuple[Evaluation, ...]


def train(
    config: RunConfig,
    *,
    folder: str | Path,
    resume: bool = False,
    report: Callable[[Report], None] = lambda _: None,
    warn: Callable[[str], None] = print,
) -> TrainingResult:
    """Run a recipe from its start, or from the folder's newest checkpoint, to its last round.

    Raises:
        gmpo.errors.GmpoError: anything the recipe, model, data, disk or a diverging run gets wrong.
    """
    run = RunFolder(folder)
    _require_fresh(run, resume=resume)
    with closing(build_parts(config, warn=warn)) as parts:
        state, before = _start(run, parts, resume=resume, report=report)
        while state.round < config.training.rounds:
            state = _run_round(run, parts, state, report)
            _evaluate_during(run, parts, state, report)
            _checkpoint_if_due(run, parts, state)
        after = _evaluate_fully(run, parts, stage="after", round_number=state.round, report=report)
    checkpoint = latest_checkpoint(run.checkpoints)
    assert checkpoint is not None, "the last round writes a checkpoint"
    return TrainingResult(folder=run.path, checkpoint=checkpoint, before=before, after=after)


def _run_round(
    run: RunFolder, parts: TrainingParts, state: TrainingState, report: Callable[[Report], None]
) -> TrainingState:
    """Sample once, reward, update several times, publish the weights."""
    started = time.perf_counter()
    groups = sample_groups(
        parts.sampler,
        parts.prompts.take(state.round),
        tokenizer=parts.tokenizer,
        settings=parts.sampling,
        key=(parts.config.training.seed, state.round),
    )
    sampled = time.perf_counter()
    scored = parts.score(groups)
    rewarded = time.perf_counter()
    state, results = _update(run, parts, scored.groups, state)
    parts.publish_weights(state.step)
    metrics = _round_metrics(parts, scored, results) | {
        "time/rollout_seconds": sampled - started,
        "time/reward_seconds": rewarded - sampled,
        "time/update_seconds": time.perf_counter() - rewarded,
        "time/tokens_per_second": _num_tokens(groups) / (sampled - started),
    }
    run.log_metrics("round", metrics, round=state.round, step=state.step)
    _log_rollouts(run, parts, scored.groups, results, state.round)
    report(Report(stage="round", round=state.round, metrics=metrics))
    return state


def _require_fresh(run: RunFolder, *, resume: bool) -> None:
    has_run = (run.path / "metrics.jsonl").exists() or latest_checkpoint(run.checkpoints)
    if has_run and not resume:
        raise RunFolderError(
            f"run folder {run.path} already holds a run; continue it with --resume or choose "
            "another with --run"
        )


def _start(
    run: RunFolder, parts: TrainingParts, *, resume: bool, report: Callable[[Report], None]
) -> tuple[TrainingState, tuple[Evaluation, ...]]:
    """Where the run stands: restored from a checkpoint, or evaluated before its first round."""
    digest = hashlib.blake2b(dump_recipe(parts.config).encode(), digest_size=8).hexdigest()
    checkpoint = latest_checkpoint(run.checkpoints) if resume else None
    if resume and checkpoint is None and not (run.path / "recipe.toml").exists():
        raise CheckpointError(
            f"run folder {run.path} holds no run to resume; start it without --resume"
        )
    if checkpoint is not None:
        state = load_checkpoint(
            checkpoint,
            policy=parts.policy,
            optimizer=parts.optimizer.adamw,
            recipe_digest=digest,
        )
        parts.publish_weights(state.step)
        run.forget_after(state.round)
        return state, _evaluations_before(run)
    # A run that died before its first checkpoint left lines, but nothing to go on from.
    run.forget_after(-1)
    run.write_text("recipe.toml", dump_recipe(parts.config))
    run.write_text("run.json", json.dumps(provenance(), indent=1))
    state = TrainingState(
        round=0, step=0, mismatch_is_small=None, recipe_digest=digest, version=__version__
    )
    return state, _evaluate_fully(run, parts, stage="before", round_number=0, report=report)


def _evaluations_before(run: RunFolder) -> tuple[Evaluation, ...]:
    for line in read_lines(run.path, "evaluations.jsonl"):
        if line["stage"] == "before":
            return tuple(Evaluation.from_record(record) for record in line["results"])
    return ()


def _update(
    run: RunFolder, parts: TrainingParts, groups: Sequence[Group], state: TrainingState
) -> tuple[TrainingState, list[_StepResult]]:
    """The round's optimizer steps; old log-probabilities stay those of the round's start."""
    steps = _build_steps(parts, groups)
    if parts.reference is not None:
        temperature = parts.loss.temperature
        steps = with_reference_logprobs(parts.reference, steps, temperature=temperature)
    # bf16 kernels differ too much between sampling and scoring: do not even try.
    is_precise = parts.policy.dtype != torch.bfloat16
    trusts_sampler = (
        parts.config.training.engine == "fast"
        and is_precise
        and state.mismatch_is_small is not False
        and bool(steps[0].micro_batches)
    )
    results, mismatch, used_sampler = _run_steps(parts, steps, state, trusts_sampler=trusts_sampler)
    results[0].metrics["rollout/old_from_sampler"] = float(used_sampler)
    if mismatch is not None:
        results[0].metrics["rollout/mismatch_mean"] = mismatch.mean
        results[0].metrics["rollout/mismatch_max"] = mismatch.max
    done = state.round + 1
    for number, result in enumerate(results, start=1):
        run.log_metrics("step", result.metrics, round=done, step=state.step + number)
    is_small = state.mismatch_is_small if mismatch is None else mismatch.is_small
    new_state = replace(state, round=done, step=state.step + len(steps), mismatch_is_small=is_small)
    return new_state, results


def _build_steps(parts: TrainingParts, groups: Sequence[Group]) -> list[StepBatch]:
    """Micro-batches of every optimizer step, with group-relative advantages."""
    config = parts.config
    advantages = _advantages(parts, groups)
    has_extra_terms = (
        config.objective.kl_coefficient > 0 or config.objective.entropy_coefficient > 0
    )
    return [
        build_step(
            [groups[place] for place in places],
            advantages[places.start : places.stop],
            max_tokens=config.training.max_tokens_per_micro_batch,
            shares_prompts=parts.policy.shares_prompts,
            skips_dead_rows=config.training.engine == "fast" and not has_extra_terms,
            device=parts.policy.device,
        )
        for places in split_steps(len(groups), steps_per_round=config.training.steps_per_round)
    ]


def _run_steps(
    parts: TrainingParts, steps: list[StepBatch], state: TrainingState, *, trusts_sampler: bool
) -> tuple[list[_StepResult], Mismatch | None, bool]:
    """Gradient and AdamW step of each batch; also the mismatch, and if the sampler was trusted."""
    mismatch: Mismatch | None = None
    if not trusts_sampler:
        steps, mismatch = with_old_logprobs(parts.policy, steps, temperature=parts.loss.temperature)
    results = []
    for number, step in enumerate(steps):
        is_last = number == len(steps) - 1
        extra = _gradient_cosine_if_due(parts, step, state) if is_last else {}
        measures = accumulate_gradients(parts.policy, step, parts.loss)
        if number == 0 and trusts_sampler:
            mismatch = measures.mismatch
            if mismatch is not None and not mismatch.is_small:
                # Seen at no extra pass, before any weight moved: start the round's steps again.
                parts.optimizer.zero_gradients()
                return _run_steps(parts, steps, state, trusts_sampler=False)
        metrics = _apply_step(parts, measures, state.step + number) | extra
        results.append(_StepResult(measures=measures, metrics=metrics))
    return results, mismatch, trusts_sampler


def _apply_step(parts: TrainingParts, measures: StepMeasures, step_number: int) -> dict[str, float]:
    """Move the weights; the step's figures."""
    training = parts.config.training
    learning_rate = training.learning_rate * learning_rate_factor(
        step_number,
        total_steps=training.rounds * training.steps_per_round,
        warmup_steps=training.warmup_steps,
        schedule=training.schedule,
        final_fraction=training.final_learning_rate_fraction,
    )
    norm = parts.optimizer.apply_step(
        learning_rate=learning_rate, clip_norm=training.gradient_clip_norm
    )
    metrics = {
        "update/loss": measures.loss,
        "update/gradient_norm": norm,
        "update/learning_rate": learning_rate,
        "update/live_rollouts": float(len(measures.row_names)),
    }
    if measures.terms:
        metrics |= step_diagnostics(measures.terms, measures.masks)
    if measures.kl_ref_k3 is not None:
        metrics["kl_ref/k3"] = measures.kl_ref_k3
    if measures.entropy is not None:
        metrics["update/entropy"] = measures.entropy
    return metrics


def _gradient_cosine_if_due(
    parts: TrainingParts, step: StepBatch, state: TrainingState
) -> dict[str, float]:
    """How far the objective's gradient points away from GRPO's, on the round's last step."""
    every = parts.config.training.gradient_cosine_every
    if every == 0 or (state.round + 1) % every or not step.micro_batches:
        return {}
    plain = replace(parts.loss, kl_coefficient=0.0, entropy_coefficient=0.0)
    cosine = gradient_cosine(parts.policy, step, settings=plain, other=parts.grpo_loss)
    return {"update/gradient_cosine_grpo": cosine}


def _advantages(parts: TrainingParts, groups: Sequence[Group]) -> torch.Tensor:
    rewards, valid = reward_table(groups)
    objective = parts.config.objective
    return group_advantages(
        rewards, valid=valid, scale=objective.scale(), eps=objective.advantage_eps
    )


def _round_metrics(
    parts: TrainingParts, scored: ScoredGroups, results: Sequence[_StepResult]
) -> dict[str, float]:
    """The round's figures: of its rollouts, and its steps' figures averaged (extremes kept)."""
    rollouts = [rollout for group in scored.groups for rollout in group.rollouts]
    rewarded = [rollout for rollout in rollouts if rollout.reward is not None]
    rewards, valid = reward_table(scored.groups)
    advantages = group_advantages(rewards, valid=valid, scale="none")
    logprobs = np.concatenate([r.sampler_logprobs[r.from_policy] for r in rollouts])
    metrics = {
        "rollout/reward": float(rewards[valid].mean()) if rewarded else math.nan,
        "rollout/groups": float(len(scored.groups)),
        "rollout/dead_groups": float((advantages == 0).all(dim=-1).sum()),
        "rollout/completion_tokens": _num_tokens(scored.groups) / len(rollouts),
        "rollout/truncated_fraction": sum(r.is_truncated for r in rollouts) / len(rollouts),
        "rollout/entropy": float(-logprobs.mean()),
        "rollout/errors_total": float(len(rollouts) - len(rewarded)),
        "grading/timeouts_total": float(scored.num_timeouts),
        "memory/peak_gib": peak_memory_gib(parts.policy.device),
    }
    for name in parts.rewards:
        values = [r.rewards[name] for r in rewarded if name in r.rewards]
        if values:
            metrics[f"{REWARD_COMPONENT_PREFIX}{name}"] = sum(values) / len(values)
    for name in sorted({name for result in results for name in result.metrics}):
        series = [result.metrics[name] for result in results if name in result.metrics]
        combine = {"ratio/min": min, "ratio/max": max}.get(name, _mean)
        metrics[name] = combine(series)
    return metrics


def _evaluate_during(
    run: RunFolder, parts: TrainingParts, state: TrainingState, report: Callable[[Report], None]
) -> None:
    evaluation = parts.config.evaluation
    if not evaluation.every_rounds or state.round % evaluation.every_rounds:
        return
    result = parts.evaluator.greedy(parts.held_out[: evaluation.items_during])
    metrics = {"evaluation/accuracy": result.accuracy}
    run.log_metrics("evaluation", metrics, round=state.round, step=state.step)
    report(Report(stage="evaluation", round=state.round, metrics=metrics, evaluations=(result,)))


def _evaluate_fully(
    run: RunFolder,
    parts: TrainingParts,
    *,
    stage: str,
    round_number: int,
    report: Callable[[Report], None],
) -> tuple[Evaluation, ...]:
    """Greedy, greedy few-shot and sampled accuracy on all held-out items."""
    config = parts.config
    kinds: list[Callable[[], Evaluation]] = [lambda: parts.evaluator.greedy(parts.held_out)]
    if config.evaluation.few_shot:
        kinds.append(lambda: parts.evaluator.greedy_few_shot(parts.held_out))
    if config.evaluation.sampled:
        key = (config.training.seed, stage)
        kinds.append(lambda: parts.evaluator.sampled(parts.held_out, key=key))
    results: list[Evaluation] = []
    for kind in kinds:
        results.append(kind())
        report(Report(stage=stage, round=round_number, metrics={}, evaluations=tuple(results[-1:])))
    run.log_record(
        "evaluations.jsonl",
        {"stage": stage, "round": round_number, "results": [r.as_record() for r in results]},
    )
    return tuple(results)


def _checkpoint_if_due(run: RunFolder, parts: TrainingParts, state: TrainingState) -> None:
    checkpoint = parts.config.checkpoint
    is_last = state.round == parts.config.training.rounds
    if not is_last and state.round % checkpoint.every_rounds:
        return
    save_checkpoint(
        run.checkpoints,
        policy=parts.policy,
        optimizer=parts.optimizer.adamw,
        tokenizer=parts.tokenizer,
        state=state,
    )
    remove_old_checkpoints(run.checkpoints, keep=checkpoint.keep)


def _log_rollouts(
    run: RunFolder,
    parts: TrainingParts,
    groups: Sequence[Group],
    results: Sequence[_StepResult],
    round_number: int,
) -> None:
    """Write the first groups of the round with advantages and ratios, for `gmpo inspect`."""
    advantages = _advantages(parts, groups)
    ratios = _row_ratios(results)
    for place, group in enumerate(groups[: parts.config.tracking.groups_per_round]):
        record = {
            "round": round_number,
            "group": place,
            "prompt_id": group.prompt.id,
            "prompt": _prompt_text(group),
            "answer": group.prompt.columns.get("answer"),
            "rollouts": [
                {
                    "text": rollout.text,
                    "tokens": rollout.num_tokens,
                    "finish_reason": rollout.finish_reason,
                    "reward": rollout.reward,
                    "rewards": dict(rollout.rewards),
                    "error": rollout.error,
                    "advantage": float(advantages[place, column]),
                    "ratio": ratios.get(f"{rollout.prompt_id}#{rollout.index}"),
                }
                for column, rollout in enumerate(group.rollouts)
            ],
        }
        run.log_record("rollouts.jsonl", record)


def _row_ratios(results: Sequence[_StepResult]) -> dict[str, dict[str, float]]:
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


def _num_tokens(groups: Sequence[Group]) -> int:
    return sum(rollout.num_tokens for group in groups for rollout in group.rollouts)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory so far in GiB: allocated on a CUDA device, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
