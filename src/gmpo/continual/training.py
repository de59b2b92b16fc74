"""A cycle's training run, in a process of its own that a later call finds and goes on with."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gmpo.config import RunConfig
from gmpo.errors import ConfigError, RunStopped, StudyError
from gmpo.run_process import MOST_TRIES, Attempt, RunProcess, death, is_trained_in
from gmpo.stability import run_figures
from gmpo.tracking import read_lines
from gmpo.tuning.score import given_up_rounds, stability

__all__ = [
    "TrainedRun",
    "judged_elsewhere",
    "stability_metrics",
    "train_run",
    "trained_model",
]

_POLL_SECONDS = 0.1
_FIGURES = (
    "loss_variance",
    "gradient_norm_deviation",
    "log_ratio_range",
    "clip_fraction",
    "entropy_end",
    "reward_end",
)


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """What became of a run.

    Attributes:
        outcome: "diverged" where a value was not finite or the guard stopped it.
        message: what it said last; empty if it finished.
        folder: of the run.
        seconds: that its last process ran.
    """

    outcome: Literal["finished", "diverged"]
    message: str
    folder: Path
    seconds: float


def judged_elsewhere(recipe: RunConfig, *, model: str) -> RunConfig:
    """The recipe for a run from another model, by whose items somebody else judges it.

    The run itself asks none but the one that every task holds out, and keeps no checkpoint that
    it does not need.

    Args:
        recipe: with evaluations and checkpoints of its own.
        model: folder of the model that it begins with.
    """
    quiet = {"every_rounds": 0, "few_shot": 0, "sampled": False, "items": 1, "skip_items": 0}
    keep = 2 if recipe.guard.mends else 1  # a roll-back needs one before the newest
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"name": model}),
            "evaluation": recipe.evaluation.model_copy(update=quiet),
            "checkpoint": recipe.checkpoint.model_copy(update={"keep": keep}),
        }
    )


def train_run(
    folder: Path,
    recipe: RunConfig,
    *,
    threads: int,
    should_stop: Callable[[], bool] = lambda: False,
    what: str = "the update",
) -> TrainedRun:
    """Train a recipe in FOLDER/run, or go on where a killed process left it.

    Args:
        folder: of the step; the run, its recipe and its log lie in it.
        recipe: that is trained.
        threads: CPU threads.
        should_stop: asked a few times a second; once it says so, the run saves and ends.
        what: is trained, for messages.

    Raises:
        ConfigError: the recipe or the data are refused; the run's message is named.
        RunStopped: `should_stop` said so.
        StudyError: the process died again and again.
    """
    run = folder / "run"
    for _ in range(MOST_TRIES):
        attempt = _one_process(
            folder, recipe, run, threads=threads, should_stop=should_stop, what=what
        )
        if attempt.outcome == "finished" or attempt.outcome == "diverged":
            return TrainedRun(
                outcome=attempt.outcome,
                message=attempt.message,
                folder=run,
                seconds=attempt.seconds,
            )
        if attempt.outcome == "refused":
            raise ConfigError(f"{what} cannot be trained: {attempt.message}")
        if attempt.outcome == "stopped":
            raise RunStopped(f"{what} was stopped; give the same command again to go on")
        said = death(attempt.exit_code)
    raise StudyError(
        f"the process of {what} died {MOST_TRIES} times, the last time of {said}; its output is in "
        f"{folder / 'logs'}; give the same command again to go on from its newest checkpoint"
    )


def _one_process(
    folder: Path,
    recipe: RunConfig,
    run: Path,
    *,
    threads: int,
    should_stop: Callable[[], bool],
    what: str,
) -> Attempt:
    while is_trained_in(run):
        # Left by a controller that was killed, where no leash ends it: let it finish.
        if should_stop():
            raise RunStopped(f"{what} is still trained by an earlier call, which goes on")
        time.sleep(_POLL_SECONDS)
    worker = RunProcess.start(folder, "update", recipe, run=run, threads=threads)
    try:
        while not worker.has_ended:
            if should_stop():
                worker.interrupt()
                worker.process.wait()
                if (attempt := worker.attempt()).outcome == "diverged":
                    return attempt  # it would go on past what ended it
                raise RunStopped(f"{what} was stopped; give the same command again to go on")
            time.sleep(_POLL_SECONDS)
    finally:
        if not worker.has_ended:
            worker.kill()
    return worker.attempt()


def trained_model(run: Path, *, merged: Path) -> Path:
    """Folder of the weights that a finished run ended with.

    Args:
        run: its folder.
        merged: where the whole model is written if the run trained adapters, whose base need not
            stay; a folder that a killed process left there is taken for whole, as it is renamed.

    Raises:
        CheckpointError: the newest checkpoint is damaged.
        ExportError: the whole model cannot be written.
    """
    from gmpo.checkpoint import checkpoint_model, latest_checkpoint, verified_content
    from gmpo.export import export_run
    from gmpo.policy.adapter_files import is_adapter_folder

    if merged.is_dir():
        return merged
    checkpoint = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None, "the last round writes a checkpoint"
    verified_content(checkpoint)
    model = checkpoint_model(checkpoint)
    if is_adapter_folder(model):
        export_run(run, merged)
        return merged
    return model


def stability_metrics(run: Path, recipe: RunConfig) -> dict[str, Any]:
    """How steadily a run learned: 0..1 as `gmpo tune` takes it, its parts, the guard's alarms.

    None stands for what was not measured, e.g. where no step had a gradient.

    Raises:
        DataError: a line of the run's files is damaged.
    """
    lines = list(read_lines(run, "metrics.jsonl"))
    training = recipe.training
    figures = run_figures(
        lines,
        held_out_end=None,
        target=None,
        rounds=training.rounds,
        steps_per_round=training.steps_per_round,
        diverged=False,
    )
    alarms = list(read_lines(run, "events.jsonl"))
    return {
        "stability": stability(
            lines,
            recipe=recipe,
            kind="meaningful",
            rounds=training.rounds,
            given_up=given_up_rounds(run),
        ),
        **{name: figures.values[name] for name in _FIGURES},
        "ratio_min": figures.ratio_min,
        "ratio_max": figures.ratio_max,
        "rounds": figures.rounds_done,
        "crash": figures.crash,
        "guard_events": len(alarms),
    }
