"""`gmpo models`, `gmpo sample` and `gmpo export`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from gmpo.cli.conventions import JsonOption, model_name, refuses_clearly, warn
from gmpo.config import ModelConfig
from gmpo.errors import ConfigError
from gmpo.recipe import bundled_recipes, load_recipe

__all__ = ["export", "models", "sample"]


@refuses_clearly
def models(as_json: JsonOption = False) -> None:
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


@refuses_clearly
def sample(
    model: Annotated[str, typer.Argument(help="Model name, model folder, or run folder.")],
    prompt: Annotated[str, typer.Argument(help="The user's turn, or '-' to read it from stdin.")],
    count: Annotated[int, typer.Option("-n", "--count", help="Completions.")] = 1,
    best_of: Annotated[
        int, typer.Option(help="Draws a completion is chosen from, by its tokens' probability.")
    ] = 1,
    mix: Annotated[
        str | None, typer.Option(help="Second model: draw from the geometric mean of both.")
    ] = None,
    weight: Annotated[
        float | None, typer.Option(help="Of --mix in the mean, 0 to 1; 0.5 by default.")
    ] = None,
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
    as_json: JsonOption = False,
) -> None:
    """Complete one prompt, with one model or with the geometric mean of two."""
    from gmpo.generation import GenerationSettings, generate
    from gmpo.outcomes import Mix
    from gmpo.run_tables import visible

    text = sys.stdin.read() if prompt == "-" else prompt
    settings = GenerationSettings(
        num_completions=count,
        best_of=best_of,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        max_tokens=max_tokens,
        stop_strings=tuple(stop or ()),
        seed=seed,
    )
    if weight is not None and mix is None:
        raise ConfigError(f"--weight {weight:g} is that of a second model; name it with --mix")
    config = _model_config(model, system, dtype)
    share = 0.5 if weight is None else weight
    second = None if mix is None else Mix(name=model_name(mix), weight=share)
    generated = generate(config, text, settings=settings, mix=second, warn=warn)
    if as_json:
        print(json.dumps({"completions": [completion.as_dict() for completion in generated]}))
        return
    console = Console()
    for completion in generated:
        console.print(Text(visible(completion.text)), soft_wrap=True)
        reason = "" if completion.finish_reason == "stop" else ", cut by --max-tokens"
        console.print(f"[dim]({completion.num_tokens} tokens{reason})[/dim]")


@refuses_clearly
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
    as_json: JsonOption = False,
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


def _model_config(model: str, system: str | None, dtype: str | None) -> ModelConfig:
    """A model as it was trained, if it is a run folder; prompts must look as they did then."""
    if dtype not in (None, "auto", "fp32", "bf16"):
        raise ConfigError(f"--dtype is {dtype!r}; allowed: fp32, bf16, auto")
    recipe = Path(model) / "recipe.toml"
    trained = load_recipe(recipe).model if recipe.is_file() else ModelConfig()
    asked = {"name": model_name(model), "system": system, "dtype": dtype}
    return trained.model_copy(update={key: v for key, v in asked.items() if v is not None})
