"""The training loop: rounds of rollouts, each with several optimizer steps."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from gmpo.assembly import TrainingParts, assemble
from gmpo.checkpoint import (
    TrainingState,
    checkpoint_round,
    latest_checkpoint,
    save_checkpoint,
)
from gmpo.config import RunConfig
from gmpo.errors import GuardStopped, RunStopped
from gmpo.evaluation import Evaluation
from gmpo.inputs import Given
from gmpo.outlook import Outlook
from gmpo.recipe import recipe_values
from gmpo.reporting import rollout_records, round_metrics
from gmpo.resumption import begin_or_resume, inputs_of_run, tidy_checkpoints
from gmpo.rounds import prompts_of_round, sample_round
from gmpo.saved_rounds import SampledRound, load_round, save_round
from gmpo.steps import RoundUpdate, update_policy
from gmpo.trackers import TrackedRun, Trackers, require_packages
from gmpo.tracking import RunFolder, read_lines
from gmpo.watch import reason_to_stop, watch_round

__all__ = ["Report", "TrainingResult", "train"]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the loop tells its caller as it happens.

    Attributes:
        stage: "start", "forecast", "before", "round", "evaluation", "checkpoint" or "after".
        round: rounds done; after a resume not 0 at the start.
        step: optimizer steps done (stages "start" and "round").
        metrics: the round's figures, steps averaged (stage "round").
        steps: the figures of each of its optimizer steps (stage "round").
        epoch: passes over the prompts done (stages "start" and "round").
        evaluations: results of the stage.
        sentence: for people (stage "forecast").
    """

    stage: str
    round: int
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    steps: tuple[dict[str, float], ...] = ()
    epoch: float = 0.0
    evaluations: tuple[Evaluation, ...] = ()
    sentence: str = ""


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """A finished run: where it lies and how it did."""

    folder: Path
    checkpoint: Path
    before: tuple[Evaluation, ...]
    after: tuple[Evaluation, ...]


def train(  # noqa: PLR0913 - all by keyword, and each is its own concern
    config: RunConfig,
    *,
    folder: str | Path,
    resume: bool = False,
    report: Callable[[Report], None] = lambda _: None,
    warn: Callable[[str], None] = print,
    should_stop: Callable[[], bool] = lambda: False,
    given: Given | None = None,
) -> TrainingResult:
    """Run a recipe from its start, or from the folder's newest checkpoint, to its last round.

    A run that was killed at any moment and is resumed on the same machine with the same number of
    threads ends with the weights of a run that was not, bit for bit.

    Args:
        config: the recipe.
        folder: of the run; no two processes train in one.
        resume: go on from the newest checkpoint and the rollouts saved since.
        report: told what happens, as it happens.
        warn: told in one sentence what is not as expected.
        should_stop: asked between rounds; once it says so, the run is saved and ends.
        given: functions that stand in for those that the recipe names.

    Raises:
        RunStopped: `should_stop` said so; the run was saved.
        GuardStopped: a critical alarm in mode "stop"; the run was saved.
        gmpo.errors.GmpoError: anything the recipe, model, data, disk or a diverging run gets wrong.
    """
    run = RunFolder(folder)
    require_packages(config.tracking.to)
    with run.locked():
        inputs = inputs_of_run(run, config, resume=resume, warn=warn, given=given)
        outlook = Outlook(run, inputs)
        with closing(assemble(inputs, warn=warn)) as parts:
            state = begin_or_resume(run, parts, resume=resume, warn=warn)
            _tell(report, outlook.announce(parts, state), round_number=state.round)
            report(_standing("start", parts, state))
            before = _evaluated_before(run, parts, state, report)
            _stop_if(should_stop, run, parts, state)
            with closing(_trackers(run, parts.config, warn)) as trackers:
                while state.round < config.training.rounds:
                    state, done = _run_round(run, parts, trackers, state)
                    report(done)
                    state, alarms = watch_round(run, config.guard, state, done.metrics, warn=warn)
                    compared = outlook.compare(done.metrics, round_number=done.round)
                    _tell(report, compared, round_number=done.round)
                    _evaluate_during(run, parts, state, report)
                    _checkpoint_if_due(run, parts, state, report)
                    _stop_on(reason_to_stop(config.guard, alarms), run, parts, state)
                    _stop_if(should_stop, run, parts, state)
            # A finished run that is resumed has its answer already.
            after = _recorded_evaluations(run, "after") or _evaluate_fully(
                run, parts, state, stage="after", report=report
            )
    checkpoint = latest_checkpoint(run.checkpoints)
    assert checkpoint is not None, "the last round writes a checkpoint"
    return TrainingResult(folder=run.path, checkpoint=checkpoint, before=before, after=after)


def _run_round(
    run: RunFolder, parts: TrainingParts, trackers: Trackers, state: TrainingState
) -> tuple[TrainingState, Report]:
    """Sample once, reward, update several times, publish the weights; what there is to tell."""
    sampled = _rollouts(run, parts, state)
    started = time.perf_counter()
    training, done = parts.config.training, state.round + 1
    update = update_policy(
        parts,
        sampled.trained_groups,
        first_step=state.step,
        may_trust_sampler=state.mismatch_is_small is not False,
        measures_cosine=_is_due(done, training.gradient_cosine_every),
        measures_kl_ref=_is_due(done, training.kl_ref_every),
    )
    state = _after(state, sampled, update)
    parts.publish_weights(state.step)
    metrics = round_metrics(parts, sampled, update) | {
        "time/update_seconds": time.perf_counter() - started
    }
    metrics |= trackers.new_counts()
    for number, step in enumerate(update.steps, start=state.step - len(update.steps) + 1):
        run.log_metrics("step", step.metrics, round=state.round, step=number)
    run.log_metrics("round", metrics, round=state.round, step=state.step)
    for record in rollout_records(parts, sampled, update, round_number=state.round):
        run.log_record("rollouts.jsonl", record)
    steps = tuple(step.metrics for step in update.steps)
    return state, replace(_standing("round", parts, state), metrics=metrics, steps=steps)


def _standing(stage: str, parts: TrainingParts, state: TrainingState) -> Report:
    """How far the run has come."""
    epoch = state.prompts_taken / len(parts.prompts)
    return Report(stage=stage, round=state.round, step=state.step, epoch=epoch)


def _is_due(round_number: int, every: int) -> bool:
    return every > 0 and round_number % every == 0


def _rollouts(run: RunFolder, parts: TrainingParts, state: TrainingState) -> SampledRound:
    """The round's rewarded rollouts: those a killed run left, or new ones, saved before use."""
    saved = load_round(run.rounds, state.round + 1, prompts_of_round(parts, state))
    if saved is not None:
        return saved
    sampled = sample_round(parts, state)
    save_round(run.rounds, state.round + 1, sampled)
    return sampled


def _after(state: TrainingState, sampled: SampledRound, update: RoundUpdate) -> TrainingState:
    mismatch = update.mismatch
    return replace(
        state,
        round=state.round + 1,
        step=state.step + len(update.steps),
        prompts_taken=state.prompts_taken + len(sampled.scored.groups),
        mismatch_is_small=state.mismatch_is_small if mismatch is None else mismatch.is_small,
    )


def _tell(report: Callable[[Report], None], sentence: str | None, *, round_number: int) -> None:
    if sentence is not None:
        report(Report(stage="forecast", round=round_number, sentence=sentence))


def _trackers(run: RunFolder, config: RunConfig, warn: Callable[[str], None]) -> Trackers:
    """The recipe's trackers, which from now on get every row of `metrics.jsonl`."""
    identity = run.path / "tracking.json"
    if config.tracking.to and not identity.exists():
        run.write_text(identity.name, json.dumps({"id": uuid.uuid4().hex}))
    trackers = Trackers(
        config.tracking.to,
        TrackedRun(
            id=json.loads(identity.read_text())["id"] if config.tracking.to else "",
            name=config.tracking.name or run.path.resolve().name,
            project=config.tracking.project,
            folder=run.path,
            parameters=recipe_values(config),
        ),
        earlier=read_lines(run.path, "metrics.jsonl"),
        warn=warn,
    )
    run.follow(trackers.send)
    return trackers


def _evaluated_before(
    run: RunFolder, parts: TrainingParts, state: TrainingState, report: Callable[[Report], None]
) -> tuple[Evaluation, ...]:
    """The untrained model's evaluations, which only a run that has not begun can make."""
    recorded = _recorded_evaluations(run, "before")
    if recorded or state.round:
        return recorded
    return _evaluate_fully(run, parts, state, stage="before", report=report)


def _recorded_evaluations(run: RunFolder, stage: str) -> tuple[Evaluation, ...]:
    for line in read_lines(run.path, "evaluations.jsonl"):
        if line["stage"] == stage:
            return tuple(Evaluation.from_record(record) for record in line["results"])
    return ()


def _evaluate_during(
    run: RunFolder, parts: TrainingParts, state: TrainingState, report: Callable[[Report], None]
) -> None:
    evaluation = parts.config.evaluation
    if not parts.held_out or not evaluation.every_rounds or state.round % evaluation.every_rounds:
        return
    evaluator = parts.evaluator_at(step=state.step, prompts_taken=state.prompts_taken)
    result = evaluator.greedy(parts.held_out[: evaluation.items_during])
    metrics = {f"evaluation/{result.measure}": result.mean}
    run.log_metrics("evaluation", metrics, round=state.round, step=state.step)
    report(Report(stage="evaluation", round=state.round, metrics=metrics, evaluations=(result,)))


def _evaluate_fully(
    run: RunFolder,
    parts: TrainingParts,
    state: TrainingState,
    *,
    stage: str,
    report: Callable[[Report], None],
) -> tuple[Evaluation, ...]:
    """All held-out items asked greedily, few-shot and sampled, if there are any."""
    if not parts.held_out:
        return ()
    config = parts.config
    key = (config.training.seed, stage) if config.evaluation.sampled else None
    results: list[Evaluation] = []
    evaluator = parts.evaluator_at(step=state.step, prompts_taken=state.prompts_taken)
    for result in evaluator.every_way(parts.held_out, sampled_key=key):
        results.append(result)
        report(Report(stage=stage, round=state.round, evaluations=(result,)))
    run.log_record(
        "evaluations.jsonl",
        {"stage": stage, "round": state.round, "results": [r.as_record() for r in results]},
    )
    return tuple(results)


def _checkpoint_if_due(
    run: RunFolder, parts: TrainingParts, state: TrainingState, report: Callable[[Report], None]
) -> None:
    checkpoint = parts.config.checkpoint
    is_last = state.round == parts.config.training.rounds
    if not is_last and state.round % checkpoint.every_rounds:
        return
    _save(run, parts, state)
    report(Report(stage="checkpoint", round=state.round))


def _stop_if(
    should_stop: Callable[[], bool], run: RunFolder, parts: TrainingParts, state: TrainingState
) -> None:
    if not should_stop():
        return
    _save_if_new(run, parts, state)
    raise RunStopped(
        f"stopped after round {state.round} of {parts.config.training.rounds}, which is saved; go "
        f"on with: gmpo train --run {run.path} --resume"
    )


def _stop_on(
    reason: str | None, run: RunFolder, parts: TrainingParts, state: TrainingState
) -> None:
    """End a run that the guard gave up, which a person may still go on with."""
    if reason is None:
        return
    _save_if_new(run, parts, state)
    raise GuardStopped(
        f"the guard stopped the run after round {state.round} of {parts.config.training.rounds}, "
        f"which is saved: {reason}; to go on as it is: gmpo train --run {run.path} --resume"
    )


def _save_if_new(run: RunFolder, parts: TrainingParts, state: TrainingState) -> None:
    newest = latest_checkpoint(run.checkpoints)
    if newest is None or checkpoint_round(newest) != state.round:
        _save(run, parts, state)


def _save(run: RunFolder, parts: TrainingParts, state: TrainingState) -> None:
    save_checkpoint(
        run.checkpoints,
        policy=parts.policy,
        optimizer=parts.optimizer.adamw,
        tokenizer=parts.tokenizer,
        state=state,
    )
    tidy_checkpoints(run, keep=parts.config.checkpoint.keep)
