"""`gmpo train`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from gmpo.cli.conventions import JsonOption, SetOption, refuses_clearly, warn
from gmpo.errors import ConfigError, RunStopped
from gmpo.recipe import bundled_recipes, dump_recipe, load_recipe
from gmpo.tracking import fresh_folder

if TYPE_CHECKING:
    from gmpo.config import RunConfig
    from gmpo.inspection import RunSummary
    from gmpo.training import TrainingResult

__all__ = ["train"]


@refuses_clearly
def train(
    recipe: Annotated[
        str | None, typer.Argument(help="Bundled name (`gmpo models`) or path of a TOML file.")
    ] = None,
    run: Annotated[str | None, typer.Option("--run", help="Folder of the run.")] = None,
    overrides: SetOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint of --run.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print recipe and forecast, and whether the run would be refused; train nothing.",
        ),
    ] = False,
    plots: Annotated[bool, typer.Option(help="Draw PNG plots into RUN/plots.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Train a model by a recipe and show what it learned on held-out items."""
    from gmpo.inspection import summarize_run

    source = _recipe_source(recipe, run, resume=resume)
    config = load_recipe(source, overrides or ())
    if dry_run:
        _show_dry_run(config, as_json=as_json)
        return
    folder = Path(run) if run else fresh_folder(Path(source).stem)
    console = Console(stderr=as_json)
    started = time.perf_counter()
    result = _train_with_display(config, folder, resume=resume, console=console)
    summary = summarize_run(result.folder)
    drawn = _draw(result.folder) if plots else []
    seconds = time.perf_counter() - started
    outcome = {
        "run": str(result.folder),
        "checkpoint": str(result.checkpoint),
        "seconds": seconds,
        "before": [evaluation.as_dict() for evaluation in result.before],
        "after": [evaluation.as_dict() for evaluation in result.after],
        "summary": summary.as_dict(),
        "plots": [str(plot) for plot in drawn],
    }
    if as_json:
        print(json.dumps(outcome))
        return
    _show_outcome(console, result, summary, seconds=seconds, has_plots=plots)


def _recipe_source(recipe: str | None, run: str | None, *, resume: bool) -> str | Path:
    """The recipe asked for; a resumed run's own by default."""
    if resume and run is None:
        raise ConfigError("--resume needs the run to go on with: --run FOLDER")
    if recipe is not None:
        return recipe
    own = Path(run or "") / "recipe.toml"
    if resume and own.is_file():
        return own
    if resume:
        raise ConfigError(f"{run} holds no recipe.toml, so there is no run to resume there")
    raise ConfigError(f"name a recipe: a path, or one of {', '.join(bundled_recipes())}")


def _train_with_display(
    config: RunConfig, folder: Path, *, resume: bool, console: Console
) -> TrainingResult:
    from gmpo.terminal import TrainingDisplay, asked_to_stop
    from gmpo.training import train as run_training

    objective = f"{config.objective.name} ({config.objective.clip_description()})"
    sentence = (
        f"{objective} trains {config.model.name} for {config.training.rounds} rounds; "
        f"run folder {folder}"
    )
    console.print(Text(sentence), soft_wrap=True)
    rounds = config.training.rounds
    with TrainingDisplay(console, rounds=rounds) as display, asked_to_stop(warn) as should_stop:
        try:
            return run_training(
                config,
                folder=folder,
                resume=resume,
                report=display.report,
                warn=warn,
                should_stop=should_stop,
            )
        except KeyboardInterrupt:
            if not (folder / "recipe.toml").exists():
                raise RunStopped("stopped before the run began; nothing of it is kept") from None
            raise RunStopped(f"{folder} goes on with: gmpo train --run {folder} --resume") from None


def _show_outcome(
    console: Console,
    result: TrainingResult,
    summary: RunSummary,
    *,
    seconds: float,
    has_plots: bool,
) -> None:
    from gmpo.run_tables import render_summary

    console.print(render_summary(summary))
    console.print(f"{seconds / 60:.1f} minutes in all")
    for line in (
        *([f"plots:      {result.folder / 'plots'}"] if has_plots else []),
        f"checkpoint: {result.checkpoint}",
        f"next:       gmpo inspect {result.folder} --group 1",
    ):
        console.print(Text(line), soft_wrap=True)
    if result.before:
        best = max(evaluation.mean for evaluation in result.before)
        measure = result.after[0].measure
        print(f"held-out {measure}: before {best:.3f}, after {result.after[0].mean:.3f}")


def _draw(folder: Path) -> list[Path]:
    from gmpo.plots import plot_run

    return plot_run(folder, folder / "plots")


def _show_dry_run(config: RunConfig, *, as_json: bool) -> None:
    """Print what a run would do.

    Raises:
        ConfigError: it would be refused for want of memory; all has been printed by then.
    """
    from gmpo.forecast import forecast_inputs
    from gmpo.headroom import free_bytes, refusal_beyond_memory
    from gmpo.inputs import read_inputs
    from gmpo.policy.load import choose_device
    from gmpo.terminal import forecast_table

    for note in config.notes():
        warn(note)
    inputs = read_inputs(config)
    needs = forecast_inputs(inputs)
    free = free_bytes(choose_device(inputs.config.model.device))
    refusal = refusal_beyond_memory(inputs, needs, free=free)
    if as_json:
        recipe = config.model_dump(mode="json")
        print(json.dumps({"recipe": recipe, "forecast": needs.as_dict(), "refusal": refusal}))
    else:
        print(dump_recipe(config))  # as it is: a wrapped line would be no TOML
        for line in (config.objective.clip_description(), *config.adaptive.descriptions(config)):
            print(f"# {line}")
        Console().print(forecast_table(needs))
    if refusal is not None:
        raise ConfigError(f"the run would be refused: {refusal}")
