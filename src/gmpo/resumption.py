"""Where a run stands: before its first round, or restored from its folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

import torch

from gmpo import __version__
from gmpo.assembly import TrainingParts
from gmpo.checkpoint import (
    TrainingState,
    beginning_of_attempt,
    checkpoint_round,
    checkpoints_newest_first,
    load_newest_checkpoint,
    remove_old_checkpoints,
)
from gmpo.config import RunConfig
from gmpo.errors import CheckpointError, RunFolderError
from gmpo.inputs import Given, RunInputs, read_inputs
from gmpo.policy.load import weights_digest
from gmpo.recipe import dump_recipe, load_recipe
from gmpo.saved_rounds import forget_rounds
from gmpo.tracking import RunFolder, provenance, read_lines

__all__ = ["begin_or_resume", "inputs_of_run", "restored", "tidy_checkpoints"]


def inputs_of_run(
    run: RunFolder,
    config: RunConfig,
    *,
    resume: bool,
    warn: Callable[[str], None],
    given: Given | None,
) -> RunInputs:
    """What the recipe reads, once the folder is known to fit what was asked."""
    traces = ("metrics.jsonl", "rounds", "checkpoints")
    if not resume and any((run.path / name).exists() for name in traces):
        raise RunFolderError(
            f"run folder {run.path} already holds a run; continue it with --resume or choose "
            "another with --run"
        )
    if resume and not (run.path / "recipe.toml").exists():
        raise CheckpointError(
            f"run folder {run.path} holds no run to resume; start it without --resume"
        )
    for note in config.notes():
        warn(note)
    return read_inputs(config, warn=warn, given=given)


def begin_or_resume(
    run: RunFolder,
    parts: TrainingParts,
    *,
    resume: bool,
    warn: Callable[[str], None],
) -> TrainingState:
    """Where the run stands: restored from a checkpoint, or before its first round."""
    recipe = dump_recipe(parts.config.deciding())
    if resume and dump_recipe(load_recipe(run.path / "recipe.toml").deciding()) != recipe:
        raise CheckpointError(
            f"run folder {run.path} was made with another recipe; resume with its own recipe.toml, "
            "or choose another run folder"
        )
    if resume:
        _warn_if_made_elsewhere(run, parts.config, warn=warn)
    digest = hashlib.blake2b(recipe.encode(), digest_size=8).hexdigest()
    state = restored(run, parts, recipe_digest=digest, warn=warn)
    run.write_text("recipe.toml", dump_recipe(parts.config))
    if state is not None:
        return state
    parts.weights_watch.note()
    _refuse_lost_checkpoints(run, parts.config.checkpoint.every_rounds)
    # A run that died before its first checkpoint left lines, but nothing to go on from.
    run.forget_after(-1)
    made_with = _made_with(parts.config)
    if not parts.policy.adapters:
        # What the run was named may be another model by the time that somebody asks.
        made_with["model"] = weights_digest(dict(parts.policy.named_weights()))
    run.write_text("run.json", json.dumps(made_with, indent=1))
    return TrainingState(
        round=0,
        step=0,
        prompts_taken=0,
        mismatch_is_small=None,
        recipe_digest=digest,
        version=__version__,
    )


def restored(
    run: RunFolder, parts: TrainingParts, *, recipe_digest: str, warn: Callable[[str], None]
) -> TrainingState | None:
    """The run as its newest checkpoint has it, lines and sampler included; None without one.

    Raises:
        CheckpointError: the checkpoints are damaged, or of another recipe or base model.
        RunFolderError: the folder cannot be written.
    """
    state = load_newest_checkpoint(
        run.checkpoints,
        policy=parts.policy,
        optimizer=parts.optimizer.adamw,
        recipe_digest=recipe_digest,
        warn=warn,
        base=parts.base,
    )
    if state is None:
        return None
    tidy_checkpoints(run, parts.config)
    parts.publish_weights(state.step)
    parts.weights_watch.note()
    run.forget_after(state.round, attempt=state.attempt)
    return state


def tidy_checkpoints(run: RunFolder, config: RunConfig) -> None:
    """Remove what newer checkpoints make needless, also where a killed run did not come to it.

    A run that mends keeps the checkpoint from before its first round, so that there is always one
    to go back to, and the one that its attempt began from: those are the newest weights known to be
    healthy, however slowly the trouble shows. In any other run the first checkpoint of a later
    round takes that one's place.
    """
    rounds = [checkpoint_round(each) for each in checkpoints_newest_first(run.checkpoints)]
    num_later, keep = sum(number > 0 for number in rounds), config.checkpoint.keep
    spared = [0, beginning_of_attempt(run.checkpoints) or 0] if config.guard.mends else []
    if num_later and not config.guard.mends:
        keep = min(keep, num_later)
    remove_old_checkpoints(run.checkpoints, keep=keep, spared=spared)
    oldest = checkpoints_newest_first(run.checkpoints)[:keep][-1]
    forget_rounds(run.rounds, up_to=checkpoint_round(oldest))


def _refuse_lost_checkpoints(run: RunFolder, every_rounds: int) -> None:
    """Starting over would drop the lines of a run whose checkpoints somebody took away."""
    rounds = [line["round"] for line in read_lines(run.path, "metrics.jsonl")]
    if rounds and max(rounds) > every_rounds:
        raise CheckpointError(
            f"run folder {run.path} has trained {max(rounds)} rounds, and {run.checkpoints} holds "
            "no checkpoint to go on from; bring one back, or choose another run folder"
        )


def _made_with(config: RunConfig) -> dict[str, str | int | None]:
    """All that decides a run's bits besides what of its recipe decides what is computed."""
    made_with = {**provenance(), "threads": torch.get_num_threads()}
    processes = config.training.processes
    return made_with | ({"processes": processes} if processes > 1 else {})


def _warn_if_made_elsewhere(
    run: RunFolder, config: RunConfig, *, warn: Callable[[str], None]
) -> None:
    """Rounding differs between versions, machines and thread counts: the user should know."""
    try:
        kept = json.loads((run.path / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        warn(f"{run.path / 'run.json'} cannot be read ({error}); what made the run is not known")
        return
    recorded = {"processes": 1} | kept
    changed = [
        f"{name} was {recorded.get(name)}, is {value}"
        for name, value in ({"processes": 1} | _made_with(config)).items()
        if recorded.get(name) != value
    ]
    if changed:
        newest = checkpoints_newest_first(run.checkpoints)[:1]
        is_finished = any(checkpoint_round(one) >= config.training.rounds for one in newest)
        what_follows = "the run goes on, but not bit for bit as it would have there"
        if is_finished:
            what_follows = "its rounds are done, and stay as they were"
        warn(f"this is not what made {run.path}: {'; '.join(changed)}; {what_follows}")
