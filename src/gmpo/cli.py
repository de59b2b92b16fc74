"""The `gmpo` command: train, evaluate, sample, export, inspect, models."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from gmpo.config import ModelConfig
from gmpo.errors import ConfigError, GmpoError, RunStopped
from gmpo.recipe import bundled_recipes, dump_recipe, load_recipe
from gmpo.tracking import fresh_folder

if TYPE_CHECKING:
    from gmpo.config import RunConfig
    from gmpo.evaluation import Evaluation
    from gmpo.inspection import RunSummary
    from gmpo.training import TrainingResult

__all__ = ["app", "evaluate", "export", "inspect", "main", "models", "sample", "train"]

app = typer.Typer(
    help="Geometric-Mean Policy Optimization of language models from verifiable rewards.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")

_STOPPED = 130
"""Exit code of a run that was asked to stop, as shells give it for Ctrl-C."""

_JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]
_SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override: table.key=value; repeatable.")
]


def main() -> None:
    """Run the command line."""
    # Loading bars of libraries would tear the output; HF reads the variable when it is imported.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    app()


def _refuses_clearly(command: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Print the project's own errors as one line and exit with 2, or 130 for a stop asked for."""

    @wraps(command)
    def wrapped(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        try:
            return command(*args, **kwargs)
        except RunStopped as error:
            _say("stopped", str(error), style="yellow")
            raise typer.Exit(_STOPPED) from None
        except GmpoError as error:
            _say("error", str(error), style="red")
            raise typer.Exit(2) from None

    return wrapped


@app.command()
@_refuses_clearly
def train(
    recipe: Annotated[
        str | None, typer.Argument(help="Bundled name (`gmpo models`) or path of a TOML file.")
    ] = None,
    run: Annotated[str | None, typer.Option("--run", help="Folder of the run.")] = None,
    overrides: _SetOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint of --run.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print recipe and estimate; train nothing.")
    ] = False,
    as_json: _JsonOption = False,
) -> None:
    """Train a model by a recipe and show what it learned on held-out items."""
    source = _recipe_source(recipe, run, resume=resume)
    config = load_recipe(source, overrides or ())
    if dry_run:
        _show_dry_run(config, as_json=as_json)
        return
    folder = Path(run) if run else fresh_folder(Path(source).stem)
    console = Console(stderr=as_json)
    started = time.perf_counter()
    result = _train_with_display(config, folder, resume=resume, console=console)
    summary, plots = _summary_and_plots(result.folder)
    seconds = time.perf_counter() - started
    outcome = {
        "run": str(result.folder),
        "checkpoint": str(result.checkpoint),
        "seconds": seconds,
        "before": [evaluation.as_dict() for evaluation in result.before],
        "after": [evaluation.as_dict() for evaluation in result.after],
        "summary": summary.as_dict(),
        "plots": [str(plot) for plot in plots],
    }
    if as_json:
        print(json.dumps(outcome))
        return
    _show_outcome(console, result, summary, seconds=seconds)


@app.command()
@_refuses_clearly
def evaluate(
    model: Annotated[str, typer.Argument(help="Model name, model folder, or run folder.")],
    recipe: Annotated[
        str | None, typer.Option(help="Recipe whose task is asked; a run's own by default.")
    ] = None,
    items: Annotated[int | None, typer.Option(help="Held-out items; all by default.")] = None,
    overrides: _SetOption = None,
    as_json: _JsonOption = False,
) -> None:
    """Measure greedy, few-shot and sampled accuracy (or reward) on a recipe's held-out items."""
    from gmpo.terminal import evaluation_table

    config = _evaluation_config(model, recipe, items, overrides or [])
    console = Console(stderr=as_json)
    results = _evaluate(config, console)
    if as_json:
        rows = [evaluation.as_dict() for evaluation in results]
        print(json.dumps({"model": config.model.name, "results": rows}))
        return
    console.print(evaluation_table(results, title=f"{config.model.name} on held-out items"))


@app.command()
@_refuses_clearly
def sample(
    model: Annotated[str, typer.Argument(help="Model name, model folder, or run folder.")],
    prompt: Annotated[str, typer.Argument(help="The user's turn, or '-' to read it from stdin.")],
    count: Annotated[int, typer.Option("-n", "--count", help="Completions.")] = 1,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Smallest set of this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="The k likeliest tokens; 0 is all.")] = 0,
    max_tokens: Annotated[int, typer.Option(help="Longest completion.")] = 128,
    system: Annotated[str | None, typer.Option(help="System turn; default: the run's own.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends it; repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="Same seed and precision, same completions.")] = 0,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or auto; default: the run's own, or auto.")
    ] = None,
    as_json: _JsonOption = False,
) -> None:
    """Complete one prompt."""
    from gmpo.generation import GenerationSettings, generate
    from gmpo.inspection import visible

    text = sys.stdin.read() if prompt == "-" else prompt
    settings = GenerationSettings(
        num_completions=count,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        max_tokens=max_tokens,
        stop_strings=tuple(stop or ()),
        seed=seed,
    )
    generated = generate(_model_config(model, system, dtype), text, settings=settings, warn=_warn)
    if as_json:
        print(json.dumps({"completions": [completion.as_dict() for completion in generated]}))
        return
    console = Console()
    for completion in generated:
        console.print(Text(visible(completion.text)), soft_wrap=True)
        reason = "" if completion.finish_reason == "stop" else ", cut by --max-tokens"
        console.print(f"[dim]({completion.num_tokens} tokens{reason})[/dim]")


@app.command()
@_refuses_clearly
def export(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    destination: Annotated[Path, typer.Argument(help="New folder; never overwritten.")],
    form: Annotated[
        str,
        typer.Option(
            "--format", help="transformers: the whole model; peft: a LoRA run's adapters."
        ),
    ] = "transformers",
    dtype: Annotated[str, typer.Option(help="Precision of the files: fp32 or bf16.")] = "fp32",
    checkpoint: Annotated[
        int | None, typer.Option(help="Round of the checkpoint; the newest by default.")
    ] = None,
    as_json: _JsonOption = False,
) -> None:
    """Write a run's model as a folder for transformers, or its adapters as one for PEFT."""
    from gmpo.export import export_run

    exported = export_run(run, destination, form=form, precision=dtype, round_number=checkpoint)
    if as_json:
        print(json.dumps(exported.as_dict()))
        return
    sentence = (
        f"{exported.destination} holds {exported.checkpoint} for {form}, in {exported.precision}"
    )
    Console().print(Text(sentence), soft_wrap=True)


@app.command()
@_refuses_clearly
def inspect(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    group: Annotated[int | None, typer.Option(help="Show the texts of the N-th group.")] = None,
    plots: Annotated[bool, typer.Option(help="Draw PNG plots into RUN/plots.")] = True,
    as_json: _JsonOption = False,
) -> None:
    """Summarise a run in the terminal and draw its plots; or show one group's completions."""
    from gmpo.inspection import load_groups, render_group, render_summary, summarize_run
    from gmpo.plots import plot_run

    console = Console()
    if group is not None:
        records = load_groups(run)
        if not 1 <= group <= len(records):
            raise ConfigError(f"--group {group}: the run kept groups 1 to {len(records)}")
        record = records[group - 1]
        if as_json:
            print(json.dumps(record))
        else:
            console.print(render_group(record))
        return
    summary = summarize_run(run)
    if as_json:
        print(json.dumps(summary.as_dict()))
        return
    console.print(render_summary(summary))
    if plots:
        drawn = plot_run(run, run / "plots")
        paths = ", ".join(str(path) for path in drawn)
        console.print(Text(f"plots: {paths}"), soft_wrap=True)


@app.command()
@_refuses_clearly
def models(as_json: _JsonOption = False) -> None:
    """List the models that can be used by name here, and the bundled recipes."""
    from gmpo.policy.load import known_models

    known = known_models()
    if as_json:
        rows = [model.as_dict() for model in known]
        print(json.dumps({"models": rows, "recipes": list(bundled_recipes())}))
        return
    console = Console()
    for model in known:
        console.print(f"{model.name:24} {model.state}", soft_wrap=True)
    console.print("any hub name or folder with a decoder-only causal language model works too")
    console.print(f"recipes: {', '.join(bundled_recipes())}")


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
    with TrainingDisplay(console, rounds=rounds) as display, asked_to_stop(_warn) as should_stop:
        try:
            return run_training(
                config,
                folder=folder,
                resume=resume,
                report=display.report,
                warn=_warn,
                should_stop=should_stop,
            )
        except KeyboardInterrupt:
            raise RunStopped(f"{folder} goes on with: gmpo train --run {folder} --resume") from None


def _show_outcome(
    console: Console, result: TrainingResult, summary: RunSummary, *, seconds: float
) -> None:
    from gmpo.inspection import render_summary

    console.print(render_summary(summary))
    console.print(f"{seconds / 60:.1f} minutes in all")
    for line in (
        f"plots:      {result.folder / 'plots'}",
        f"checkpoint: {result.checkpoint}",
        f"next:       gmpo inspect {result.folder} --group 1",
    ):
        console.print(Text(line), soft_wrap=True)
    if result.before:
        best = max(evaluation.mean for evaluation in result.before)
        measure = result.after[0].measure
        print(f"held-out {measure}: before {best:.3f}, after {result.after[0].mean:.3f}")


def _summary_and_plots(folder: Path) -> tuple[RunSummary, list[Path]]:
    from gmpo.inspection import summarize_run
    from gmpo.plots import plot_run

    return summarize_run(folder), plot_run(folder, folder / "plots")


def _show_dry_run(config: RunConfig, *, as_json: bool) -> None:
    from gmpo.forecast import forecast
    from gmpo.terminal import forecast_table

    needs = forecast(config)
    if as_json:
        recipe = config.model_dump(mode="json")
        print(json.dumps({"recipe": recipe, "estimate": needs.as_dict()}))
        return
    print(dump_recipe(config))  # as it is: a wrapped line would be no TOML
    print(f"# {config.objective.clip_description()}")
    Console().print(forecast_table(needs))


def _evaluate(config: RunConfig, console: Console) -> list[Evaluation]:
    from gmpo.assembly import build_evaluator

    key = (config.training.seed, "after") if config.evaluation.sampled else None
    with build_evaluator(config, warn=_warn) as (evaluator, prompts):
        results = []
        with console.status(f"asking {len(prompts)} held-out items") as status:
            for result in evaluator.every_way(prompts, sampled_key=key):
                results.append(result)
                status.update(f"{result.name} {result.mean:.3f}, going on")
    return results


def _evaluation_config(
    model: str, recipe: str | None, items: int | None, overrides: list[str]
) -> RunConfig:
    own_recipe = Path(model) / "recipe.toml"
    if recipe is None and not own_recipe.is_file():
        raise ConfigError(
            f"{model!r} is no run folder, so --recipe must say whose task is asked; "
            f"bundled: {', '.join(bundled_recipes())}"
        )
    if items is not None:
        overrides = [*overrides, f"evaluation.items={items}"]
    config = load_recipe(recipe or own_recipe, overrides)
    named = config.model.model_copy(update={"name": _model_name(model)})
    return config.model_copy(update={"model": named})


def _model_config(model: str, system: str | None, dtype: str | None) -> ModelConfig:
    """A model as it was trained, if it is a run folder; prompts must look as they did then."""
    if dtype not in (None, "auto", "fp32", "bf16"):
        raise ConfigError(f"--dtype is {dtype!r}; allowed: fp32, bf16, auto")
    recipe = Path(model) / "recipe.toml"
    trained = load_recipe(recipe).model if recipe.is_file() else ModelConfig()
    asked = {"name": _model_name(model), "system": system, "dtype": dtype}
    return trained.model_copy(update={key: v for key, v in asked.items() if v is not None})


def _model_name(model: str) -> str:
    """A run folder stands for its newest checkpoint's model."""
    if not (Path(model) / "recipe.toml").is_file():
        return model
    from gmpo.checkpoint import checkpoint_model, latest_checkpoint

    checkpoint = latest_checkpoint(Path(model) / "checkpoints")
    if checkpoint is None:
        raise ConfigError(f"run {model} has no checkpoint yet; wait for one or name a model")
    return str(checkpoint_model(checkpoint))


def _warn(message: str) -> None:
    _say("note", message, style="yellow")


def _say(what: str, message: str, *, style: str) -> None:
    text = Text.assemble((f"{what}:", style), " ", message)  # markup would eat a path's brackets
    Console(stderr=True).print(text, soft_wrap=True)
