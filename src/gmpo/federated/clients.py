"""Clients' training in a round: each an ordinary run from the round's model on its own task."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path

import numpy as np

from gmpo.config import RunConfig
from gmpo.continual.training import judged_elsewhere, train_run, trained_model
from gmpo.errors import (
    CheckpointError,
    DataError,
    FederationError,
    GmpoError,
    RunFolderError,
)
from gmpo.federated.folder import FederationFolder, disk_errors
from gmpo.federated.plan import Federation
from gmpo.federated.records import ClientRow
from gmpo.federated.updates import ClientUpdate, read_update, write_update
from gmpo.model_files import weights_version
from gmpo.recipe import load_recipe
from gmpo.records import Prompt
from gmpo.run_process import drop_weights
from gmpo.task_config import DatasetTask, GivenTask, JsonlTask, TaskConfig
from gmpo.task_table import build_task
from gmpo.tasks.splits import normalized_text, question_text
from gmpo.tracking import no_checkpoint, read_lines

__all__ = [
    "client_recipe",
    "refuse_leaks",
    "sequences_trained_on",
    "train_client",
    "training_rows",
    "update_of_run",
]

_DROPPED = "a federation keeps a client's update and drops its weights"


def train_client(  # noqa: PLR0913 - all by keyword but three, and each is its own concern
    folder: FederationFolder,
    federation: Federation,
    name: str,
    *,
    number: int,
    base: Path,
    threads: int,
    accuracy_of: Callable[[Path], float] | None,
    should_stop: Callable[[], bool],
) -> tuple[ClientRow, ClientUpdate | None]:
    """Train one client, or find what it did before; its update, unless it diverged.

    Args:
        folder: of the federation.
        federation: with the client's recipe.
        name: of the client.
        number: of the round.
        base: folder of the model that the round begins with.
        threads: CPU threads.
        accuracy_of: asks the client's model the server's items; None does not.
        should_stop: asked while it trains.

    Raises:
        ConfigError: the client's recipe or data are refused.
        RunStopped: `should_stop` said so; what is done is kept.
        RunFolderError: the disk does not take it.
    """
    place, file = folder.client(number, name), folder.update(number, name)
    row = folder.client_row(number, name)
    if row is not None:
        _drop_model(place)
        return row, read_update(file) if row.outcome == "trained" else None
    with disk_errors(place):
        place.mkdir(parents=True, exist_ok=True)
        file.parent.mkdir(parents=True, exist_ok=True)
    recipe = client_recipe(federation, name, number=number, base=base)
    run = train_run(
        place,
        recipe,
        threads=threads,
        should_stop=should_stop,
        what=f"client {name}'s run of round {number}",
    )
    rewards = _rewards(run.folder)
    update, accuracy = None, None
    if run.outcome == "finished":
        model = trained_model(run.folder, merged=place / "merged")
        accuracy = None if accuracy_of is None else accuracy_of(model)
        with disk_errors(file):
            update = write_update(
                file,
                client=name,
                base=base,
                model=model,
                sequences=sequences_trained_on(
                    run.folder, recipe, last_round=recipe.training.rounds
                ),
            )
    row = ClientRow(
        client=name,
        outcome="trained" if update is not None else "diverged",
        message=run.message,
        sequences=0 if update is None else update.sequences,
        reward_start=rewards[0] if rewards else None,
        reward_end=rewards[-1] if rewards else None,
        accuracy=accuracy,
        seconds=run.seconds,
    )
    folder.keep_client_row(number, row)
    _drop_model(place)
    return row, update


def client_recipe(federation: Federation, name: str, *, number: int, base: Path) -> RunConfig:
    """The recipe of a client's run in a round.

    The server asks the items, so the run asks none but the one that every task holds out. Each
    round draws with a seed of its own.

    Args:
        federation: with the client's own recipe.
        name: of the client.
        number: of the round.
        base: folder of the round's model.
    """
    recipe = federation.clients[name]
    training = recipe.training
    drawn = np.random.SeedSequence([training.seed, number, *name.encode()]).generate_state(1)
    tracking = recipe.tracking
    if tracking.name is None:
        tracking = tracking.model_copy(update={"name": f"{name}-round-{number}"})
    return judged_elsewhere(recipe, model=str(base.resolve())).model_copy(
        update={
            "tracking": tracking,
            "task": _own_task(recipe),
            "training": training.model_copy(update={"seed": int(drawn[0])}),
        }
    )


def update_of_run(
    run: Path, *, client: str, base: Path | None, file: Path, merged: Path
) -> ClientUpdate:
    """Write the update of a run that a client made by itself.

    Args:
        run: its folder; the newest checkpoint counts.
        client: its name.
        base: folder of the model that the run began with; None is the one that its recipe names.
        file: of the update.
        merged: where the whole model is written if the run trained adapters.

    Raises:
        FederationError: there is no folder of the starting model, or `base` is another one.
        RunFolderError: there is no such run, or the disk does not take the file.
        CheckpointError: it has no checkpoint, or a damaged one.
    """
    from gmpo.checkpoint import checkpoint_round, latest_checkpoint

    if not (run / "recipe.toml").is_file():
        raise RunFolderError(
            f"{run} is no run folder: it holds no recipe.toml; name a run's folder"
        )
    recipe = load_recipe(run / "recipe.toml")
    named = Path(recipe.model.name)
    if base is None and not (named / "config.json").is_file():
        raise FederationError(
            f"the run began with {recipe.model.name!r}, which is no folder of a whole model; name "
            "the folder that the server gave (gmpo federate begin writes it) with --base"
        )
    begun = named if base is None else base
    started = _started_with(run, recipe)
    if (version := weights_version(begun)) != started:
        raise FederationError(
            f"the run began with version {started} of {recipe.model.name!r}, and {begun} is "
            f"version {version}; name the folder that it began with, as it was, with --base"
        )
    checkpoint = latest_checkpoint(run / "checkpoints")
    if checkpoint is None:
        raise CheckpointError(no_checkpoint(run))
    last = checkpoint_round(checkpoint)
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        return write_update(
            file,
            client=client,
            base=begun,
            model=trained_model(run, merged=merged),
            sequences=sequences_trained_on(run, recipe, last_round=last),
        )


def _started_with(run: Path, recipe: RunConfig) -> str:
    """Version of the weights that a run began with.

    Runs of adapters, and of before it was kept, say no version: what they name counts as it is now.
    """
    from gmpo.policy.load import load_model, model_version

    try:
        kept = json.loads((run / "run.json").read_text(encoding="utf-8")).get("model")
    except (OSError, ValueError, AttributeError) as error:
        raise RunFolderError(f"{run / 'run.json'} cannot be read: {error}; bring it back") from None
    if kept is not None:
        return str(kept)
    return model_version(load_model(recipe.model.name, device="cpu", dtype="fp32"))


def sequences_trained_on(run: Path, recipe: RunConfig, *, last_round: int) -> int:
    """Rewarded completions of a run's rounds; those of equal rewards count, as in the objective.

    Args:
        run: its folder.
        recipe: of it.
        last_round: that counts.

    Raises:
        DataError: a line of the run's figures is damaged.
    """
    rounds = {
        line["round"]: line["rollout/errors_total"]
        for line in read_lines(run, "metrics.jsonl")
        if line["kind"] == "round" and line["round"] <= last_round
    }
    drawn = recipe.sampling.prompts_per_round * recipe.sampling.group_size
    # Dynamic sampling draws more groups than it trains on, and counts the errors of all.
    return sum(max(drawn - int(errors), 0) for errors in rounds.values())


def refuse_leaks(federation: Federation, suites: Mapping[str, Sequence[Prompt]]) -> None:
    """Refuse a client that trains on what the server asks, which would flatter every model.

    Raises:
        DataError: a question of a suite is among a client's training rows, or a client's task
            cannot be read.
    """
    instructions = {_instruction(federation.recipe), ""}
    asked = {
        text: (name, item.id)
        for name, items in suites.items()
        for item in items
        for text in _questions(item, instructions)
    }
    for client, recipe in federation.clients.items():
        instructions = {_instruction(recipe), ""}
        found = [
            asked[texts.pop()]
            for row in training_rows(federation, client)
            if (texts := _questions(row, instructions) & asked.keys())
        ]
        if found:
            suite, item = found[0]
            raise DataError(
                f"{len(found)} training rows of client {client} are items of the server's suites "
                f"(e.g. item {item!r} of {suite}); take them out of the client's data, or name "
                "other items with judging.suites"
            )


def _instruction(recipe: RunConfig) -> str:
    return "" if isinstance(recipe.task, GivenTask) else recipe.task.instruction


def _questions(prompt: Prompt, instructions: Set[str]) -> set[str]:
    """What a prompt asks, with and without the sentence that is put after every question."""
    text = question_text(prompt)
    return {text.removesuffix(normalized_text(one)).strip() for one in instructions}


def training_rows(federation: Federation, client: str) -> tuple[Prompt, ...]:
    """What a client trains on.

    Raises:
        DataError: its task cannot be read.
    """
    try:
        return build_task(_own_task(federation.clients[client])).train
    except GmpoError as error:
        raise DataError(f"client {client}: {error}") from None


def _own_task(recipe: RunConfig) -> TaskConfig:
    """A client's rows are there to be trained on, so of a file alone one is held out, not 500."""
    task = recipe.task
    apart: object = True
    if isinstance(task, JsonlTask):
        apart = task.held_out_path or task.held_out_items
    elif isinstance(task, DatasetTask):
        apart = task.held_out_split or task.held_out_items
    return task if apart else task.model_copy(update={"held_out_items": 1})


def _drop_model(place: Path) -> None:
    drop_weights(place / "run", why=_DROPPED)
    for merged in (place / "merged", *place.glob(".merged.partial-*")):
        shutil.rmtree(merged, ignore_errors=True)


def _rewards(run: Path) -> list[float]:
    lines = [line for line in read_lines(run, "metrics.jsonl") if line["kind"] == "round"]
    return [line["rollout/reward"] for line in lines if line["rollout/reward"] is not None]
