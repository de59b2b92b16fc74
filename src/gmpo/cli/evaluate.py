"""`gmpo evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from gmpo.cli.conventions import JsonOption, SetOption, model_name, refuses_clearly, warn
from gmpo.errors import ConfigError
from gmpo.recipe import bundled_recipes, load_recipe

if TYPE_CHECKING:
    from gmpo.config import RunConfig
    from gmpo.evaluation import Evaluation

__all__ = ["evaluate"]


@refuses_clearly
def evaluate(
    model: Annotated[str, typer.Argument(help="Model name, model folder, or run folder.")],
    recipe: Annotated[
        str | None, typer.Option(help="Recipe whose task is asked; a run's own by default.")
    ] = None,
    items: Annotated[int | None, typer.Option(help="Held-out items; all by default.")] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
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


def _evaluate(config: RunConfig, console: Console) -> list[Evaluation]:
    from gmpo.assembly import build_evaluator

    key = (config.training.seed, "after") if config.evaluation.sampled else None
    with build_evaluator(config, warn=warn) as (evaluator, prompts):
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
    named = config.model.model_copy(update={"name": model_name(model)})
    return config.model_copy(update={"model": named})
