"""The training loop: rounds of rollouts, each with several optimizer steps."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from gmpo import __version__
from gmpo.assembly import TrainingParts, build_parts
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
from gmpo.recipe import dump_recipe
from gmpo.reporting import num_completion_tokens, rollout_records, round_metrics
from gmpo.rollouts import sample_groups
from gmpo.steps import RoundUpdate, update_policy
from gmpo.tracking import RunFolder, provenance, read_lines

__all__ = ["Report", "TrainingResult", "train"]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the loop tells its caller as it happens.

    Attributes:
        stage: "before", "round", "evaluation" or "after".
        round: rounds done.
        metrics: the round's figures, steps averaged (stage "round").
        evaluations: results of the stage.
    """

    stage: str
    round: int
    metrics: dict[str, float]
    evaluations: tuple[Evaluation, ...] = ()


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
    every = parts.config.training.gradient_cosine_every
    done = state.round + 1
    update = update_policy(
        parts,
        scored.groups,
        first_step=state.step,
        may_trust_sampler=state.mismatch_is_small is not False,
        measures_cosine=every > 0 and done % every == 0,
    )
    state = _after(state, update)
    parts.publish_weights(state.step)
    metrics = round_metrics(parts, scored, update) | {
        "time/rollout_seconds": sampled - started,
        "time/reward_seconds": rewarded - sampled,
        "time/update_seconds": time.perf_counter() - rewarded,
        "time/tokens_per_second": num_completion_tokens(groups) / (sampled - started),
    }
    for number, step in enumerate(update.steps, start=state.step - len(update.steps) + 1):
        run.log_metrics("step", step.metrics, round=state.round, step=number)
    run.log_metrics("round", metrics, round=state.round, step=state.step)
    for record in rollout_records(parts, scored.groups, update, round_number=state.round):
        run.log_record("rollouts.jsonl", record)
    report(Report(stage="round", round=state.round, metrics=metrics))
    return state


def _after(state: TrainingState, update: RoundUpdate) -> TrainingState:
    mismatch = update.mismatch
    return replace(
        state,
        round=state.round + 1,
        step=state.step + len(update.steps),
        mismatch_is_small=state.mismatch_is_small if mismatch is None else mismatch.is_small,
    )


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
    key = (config.training.seed, stage) if config.evaluation.sampled else None
    results: list[Evaluation] = []
    for result in parts.evaluator.every_way(parts.held_out, sampled_key=key):
        results.append(result)
        report(Report(stage=stage, round=round_number, metrics={}, evaluations=(result,)))
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
