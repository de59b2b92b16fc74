"""The training loop: rounds of rollouts, each with several optimizer steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from gmpo.adaptation import adapt_round, adapted_parts, adaptive_metrics
from gmpo.assembly import TrainingParts, assemble
from gmpo.checkpoint import (
    TrainingState,
    checkpoint_round,
    latest_checkpoint,
    save_checkpoint,
)
from gmpo.config import RunConfig
from gmpo.errors import GuardStopped, NonFiniteError, RunStopped
from gmpo.evaluation import Evaluation
from gmpo.guard import Measured
from gmpo.inputs import Given
from gmpo.outlook import Outlook
from gmpo.reporting import rollout_records, round_metrics
from gmpo.resumption import begin_or_resume, inputs_of_run, tidy_checkpoints
from gmpo.rollback import mended, mended_recipe, roll_back
from gmpo.rounds import prompts_of_round, sample_round
from gmpo.saved_rounds import SampledRound, load_round, save_round
from gmpo.schedules import judged_metrics
from gmpo.spikes import NormHistory, StepVerdict
from gmpo.steps import RoundUpdate, update_policy
from gmpo.tracked_attempts import TrackedAttempts
from gmpo.trackers import Trackers, require_packages
from gmpo.tracking import RunFolder, read_lines
from gmpo.watch import Watched, watch_evaluation, watch_non_finite, watch_round

__all__ = ["Report", "TrainingResult", "train"]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the loop tells its caller as it happens.

    Attributes:
        stage: "start", "forecast", "before", "round", "evaluation", "checkpoint", "rolled_back" or
            "after".
        round: rounds done; after a resume not 0 at the start, and fewer after a roll-back.
        step: optimizer steps done (stages "start", "round" and "rolled_back").
        metrics: the round's figures, steps averaged (stage "round").
        steps: the figures of each of its optimizer steps (stage "round").
        epoch: passes over the prompts done (stages "start", "round" and "rolled_back").
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
        should_stop: asked during the trial before the first round and between rounds; once it says
            so, the run is saved and ends.
        given: functions that stand in for those that the recipe names.

    Raises:
        RunStopped: `should_stop` said so; the run was saved.
        GuardStopped: a critical alarm in mode "stop", or in mode "mend" after its last roll-back;
            the run was saved.
        gmpo.errors.GmpoError: anything the recipe, model, data, disk or a diverging run gets wrong.
    """
    require_packages(config.tracking.to)
    run = RunFolder(folder)
    with run.locked():
        inputs = inputs_of_run(run, config, resume=resume, warn=warn, given=given)
        outlook = Outlook(run, inputs)
        with closing(assemble(inputs, warn=warn)) as parts:
            state = begin_or_resume(run, parts, resume=resume, warn=warn)
            announced = outlook.announce(parts, state, should_stop=should_stop)
            _tell(report, announced, round_number=state.round)
            _stop_if(should_stop, run, parts, state)
            report(_standing("start", parts, state))
            _save_the_beginning(run, parts, state, is_given=inputs.given.model is not None)
            before = _evaluated_before(run, parts, state, report)
            _stop_if(should_stop, run, parts, state)
            with closing(TrackedAttempts(run, parts.config, warn=warn)) as trackers:
                trackers.of(state.attempt, mended_recipe(parts.config, attempt=state.attempt))
                while state.round < config.training.rounds:
                    watched, done = _watched_round(run, parts, trackers, state, report)
                    if watched.to_round is None:
                        compared = outlook.compare(done.metrics, round_number=done.round)
                        _tell(report, compared, round_number=done.round)
                        watched = _watched_evaluation(run, parts, watched, before, report)
                    state = watched.state
                    if watched.to_round is not None:
                        state = roll_back(run, parts, state, to_round=watched.to_round, warn=warn)
                        report(_standing("rolled_back", parts, state))
                        continue
                    _checkpoint_if_due(run, parts, state, report)
                    _stop_on(watched, run, parts)
                    _stop_if(should_stop, run, parts, state)
            # A finished run that is resumed has its answer already.
            after = _recorded_evaluations(run, "after") or _evaluate_fully(
                run, parts, state, stage="after", report=report
            )
    checkpoint = latest_checkpoint(run.checkpoints)
    assert checkpoint is not None, "the last round writes a checkpoint"
    return TrainingResult(folder=run.path, checkpoint=checkpoint, before=before, after=after)


def _watched_round(
    run: RunFolder,
    parts: TrainingParts,
    trackers: TrackedAttempts,
    state: TrainingState,
    report: Callable[[Report], None],
) -> tuple[Watched, Report]:
    """The next round as the run's attempt trains it, and what the guard says of it."""
    parts = mended(parts, attempt=state.attempt)
    guard, warn = parts.config.guard, parts.warn
    try:
        of_attempt = trackers.of(state.attempt, parts.config)
        after, done, verdicts = _run_round(run, parts, of_attempt, state)
    except NonFiniteError:
        watched = watch_non_finite(run, guard, state=state, warn=warn)
        if watched.to_round is None:
            raise
        return watched, _standing("round", parts, state)
    report(done)
    judged = judged_metrics(done.metrics)
    watched = watch_round(run, guard, state=after, metrics=judged, steps=verdicts, warn=warn)
    if watched.to_round is None:
        watched = replace(watched, state=adapt_round(run, parts.config, watched.state, judged))
    return watched, done


def _run_round(
    run: RunFolder, parts: TrainingParts, trackers: Trackers, state: TrainingState
) -> tuple[TrainingState, Report, tuple[StepVerdict | None, ...]]:
    """Sample once, reward, update several times, publish the weights; what there is to tell."""
    recipe, parts = parts.config, adapted_parts(parts, state)
    sampled = _rollouts(run, parts, state)
    started = time.perf_counter()
    disturbed = _disturbed_weights(parts)
    training, done = parts.config.training, state.round + 1
    update = update_policy(
        parts,
        sampled.trained_groups,
        first_step=state.step,
        may_trust_sampler=state.mismatch_is_small is not False,
        measures_cosine=_is_due(done, training.gradient_cosine_every),
        measures_kl_ref=_is_due(done, training.kl_ref_every or 0),
        norms=NormHistory.from_record(state.norms),
    )
    _note_weights(parts)
    adaptive = adaptive_metrics(recipe, state, sampled.scored.groups)
    state = _after(state, sampled, update)
    parts.publish_weights(state.step)
    metrics = round_metrics(parts, sampled, update) | {
        "time/update_seconds": time.perf_counter() - started
    }
    metrics |= disturbed | adaptive | trackers.new_counts()
    for number, step in enumerate(update.steps, start=state.step - len(update.steps) + 1):
        run.log_metrics("step", step.metrics, round=state.round, step=number)
    run.log_metrics("round", metrics, round=state.round, step=state.step)
    for record in rollout_records(parts, sampled, update, round_number=state.round):
        run.log_record("rollouts.jsonl", record)
    steps = tuple(step.metrics for step in update.steps)
    told = replace(_standing("round", parts, state), metrics=metrics, steps=steps)
    return state, told, tuple(step.verdict for step in update.steps)


def _disturbed_weights(parts: TrainingParts) -> dict[str, float]:
    """How many tensors something changed since the last step, for a guard that judges it."""
    if parts.config.guard.mode == "off":
        return {}
    return {"update/disturbed_weights": float(len(parts.weights_watch.disturbed()))}


def _note_weights(parts: TrainingParts) -> None:
    if parts.config.guard.mode != "off":
        parts.weights_watch.note()


def _standing(stage: str, parts: TrainingParts, state: TrainingState) -> Report:
    """How far the run has come."""
    epoch = state.prompts_taken / len(parts.prompts)
    return Report(stage=stage, round=state.round, step=state.step, epoch=epoch)


def _is_due(round_number: int, every: int) -> bool:
    return every > 0 and round_number % every == 0


def _rollouts(run: RunFolder, parts: TrainingParts, state: TrainingState) -> SampledRound:
    """The round's rewarded rollouts: those a killed run left, or new ones, saved before use."""
    prompts, attempt = prompts_of_round(parts, state), state.attempt
    saved = load_round(run.rounds, state.round + 1, prompts, attempt=attempt)
    if saved is not None:
        return saved
    sampled = sample_round(parts, state)
    save_round(run.rounds, state.round + 1, sampled, attempt=attempt)
    return sampled


def _after(state: TrainingState, sampled: SampledRound, update: RoundUpdate) -> TrainingState:
    mismatch = update.mismatch
    return replace(
        state,
        round=state.round + 1,
        step=state.step + len(update.steps),
        prompts_taken=state.prompts_taken + len(sampled.scored.groups),
        mismatch_is_small=state.mismatch_is_small if mismatch is None else mismatch.is_small,
        norms=asdict(update.norms) if update.norms.is_begun else {},
    )


def _tell(report: Callable[[Report], None], sentence: str | None, *, round_number: int) -> None:
    if sentence is not None:
        report(Report(stage="forecast", round=round_number, sentence=sentence))


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


def _watched_evaluation(
    run: RunFolder,
    parts: TrainingParts,
    watched: Watched,
    before: Sequence[Evaluation],
    report: Callable[[Report], None],
) -> Watched:
    """The held-out evaluation of this round, if it is due, and what the guard says of it.

    Weights that the round's last step has broken show it here first.
    """
    guard, warn = parts.config.guard, parts.warn
    try:
        result = _evaluate_during(run, parts, watched.state, report)
    except NonFiniteError:
        broken = watch_non_finite(run, guard, state=watched.state, warn=warn)
        if broken.to_round is None:
            raise
        return broken
    if result is None or result.measure != "accuracy":
        return watched
    untrained = next((each for each in before if each.name == "greedy"), None)
    return watch_evaluation(
        run,
        guard,
        watched=watched,
        measured=_measured(result, watched.state.round),
        untrained=_measured(untrained, 0) if untrained else None,
        warn=warn,
    )


def _measured(evaluation: Evaluation, round_number: int) -> Measured:
    return Measured(round=round_number, accuracy=evaluation.mean, items=evaluation.num_items)


def _evaluate_during(
    run: RunFolder, parts: TrainingParts, state: TrainingState, report: Callable[[Report], None]
) -> Evaluation | None:
    evaluation = parts.config.evaluation
    if not parts.held_out or not evaluation.every_rounds or state.round % evaluation.every_rounds:
        return None
    evaluator = parts.evaluator_at(step=state.step, prompts_taken=state.prompts_taken)
    result = evaluator.greedy(parts.held_out[: evaluation.items_during])
    metrics = {f"evaluation/{result.measure}": result.mean}
    run.log_metrics("evaluation", metrics, round=state.round, step=state.step)
    report(Report(stage="evaluation", round=state.round, metrics=metrics, evaluations=(result,)))
    return result


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


def _stop_on(watched: Watched, run: RunFolder, parts: TrainingParts) -> None:
    """End a run that the guard gave up, which a person may still go on with."""
    if watched.answer != "stop":
        return
    state = watched.state
    _save_if_new(run, parts, state)
    tried = f" after {state.attempt} roll-backs" if state.attempt else ""
    raise GuardStopped(
        f"the guard stopped the run{tried} after round {state.round} of "
        f"{parts.config.training.rounds}, which is saved: {watched.reason}; to go on as it is: "
        f"gmpo train --run {run.path} --resume"
    )


def _save_the_beginning(
    run: RunFolder, parts: TrainingParts, state: TrainingState, *, is_given: bool
) -> None:
    """Untrained weights to go back to, where nothing else has them.

    A run that mends goes back to them, and a run of a model that was handed over, and that trains
    in place, where it is interrupted before its first checkpoint and resumed in the same process.
    """
    if (parts.config.guard.mends or is_given) and not state.round:
        _save_if_new(run, parts, state)


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
        base=parts.base,
    )
    tidy_checkpoints(run, parts.config)
