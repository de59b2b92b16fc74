"""A run taken back to a healthy checkpoint, and what its next attempt trains with.

The order of the steps is what makes a process that is killed between two of them end like one that
was not: until the checkpoint that is gone back to begins the next attempt, and the newer ones are
gone, the run resumes before the alarm, comes to it again from the same rollouts, and rolls back
again.
"""

from __future__ import annotations

from collections.abc import Callable

from gmpo.assembly import TrainingParts
from gmpo.checkpoint import (
    TrainingState,
    begin_attempt,
    checkpoint_round,
    checkpoints_newest_first,
    remove_newer_checkpoints,
)
from gmpo.config import RunConfig
from gmpo.resumption import restored
from gmpo.tracking import RunFolder

__all__ = ["mended", "mended_recipe", "roll_back"]


def mended_recipe(config: RunConfig, *, attempt: int) -> RunConfig:
    """The recipe after so many roll-backs: a smaller step size, a narrower clip.

    Roll-back k multiplies the step size by `learning_rate_factor` to the power of k, so that a few
    of them reach a step size that was many times too large; the clip by `clip_factor` each time.
    """
    if not attempt:
        return config
    lowered = config.guard.learning_rate_factor ** (attempt * (attempt + 1) // 2)
    rate = config.training.learning_rate * lowered
    clips = {
        name: width * config.guard.clip_factor**attempt
        for name, width in config.objective.clips().items()
    }
    narrower = clips if config.guard.clip_factor != 1 else {}
    return config.model_copy(
        update={
            "training": config.training.model_copy(update={"learning_rate": rate}),
            "objective": config.objective.model_copy(update=narrower),
        }
    )


def mended(parts: TrainingParts, *, attempt: int) -> TrainingParts:
    """What the attempt after so many roll-backs trains with; the model is the same one."""
    if not attempt:
        return parts
    return parts.under(mended_recipe(parts.config, attempt=attempt))


def roll_back(
    run: RunFolder,
    parts: TrainingParts,
    state: TrainingState,
    *,
    to_round: int,
    warn: Callable[[str], None],
) -> TrainingState:
    """The run at the checkpoint of `to_round`, whence its next attempt begins.

    The alarm is in `events.jsonl` already. The lines of the rounds that are given up go to
    `abandoned/`; the next attempt's rollouts are drawn anew.

    Raises:
        CheckpointError: there is no whole checkpoint left.
        RunFolderError: the folder cannot be written.
    """
    attempt = state.attempt + 1
    run.set_aside(after=to_round, attempt=state.attempt)
    for path in checkpoints_newest_first(run.checkpoints):
        if checkpoint_round(path) == to_round:
            begin_attempt(path, attempt=attempt)
    remove_newer_checkpoints(run.checkpoints, than=to_round)
    # A value that is not finite stops a round anywhere, with half of a gradient or of its rollouts.
    parts.optimizer.zero_gradients()
    parts.sampler.forget()
    back = restored(run, parts, recipe_digest=state.recipe_digest, warn=warn)
    assert back is not None, "a run that mends keeps the checkpoint from before its first round"
    config = mended_recipe(parts.config, attempt=attempt)
    warn(
        f"guard: back to round {back.round}, roll-back {attempt} of at most "
        f"{config.guard.most_rollbacks}; on with step size {config.training.learning_rate:.3g} and "
        f"{config.objective.clip_description()}"
    )
    return back
