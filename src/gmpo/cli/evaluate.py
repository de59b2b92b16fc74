"""`gmpo evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from gmpo.cli.conventions import JsonOption, SetOption, model_name, refuses_clearly, warn
from gmpo.cli.suite_scores import SuiteOptions, evaluate_suites
from gmpo.errors import ConfigError
from gmpo.recipe import bundled_recipes, load_recipe

if TYPE_CHECKING:
    from gmpo.config import RunConfig
    from gmpo.evaluation import Evaluation

__all__ = ["evaluate"]

_Models = Annotated[
    list[str],
    typer.Argument(
        help="Model name, model folder, run folder, or folder that --out wrote; LABEL=MODEL "
        "names it in tables. The first is the baseline of the others."
    ),
]
_Suites = Annotated[
    list[str] | None,
    typer.Option(
        "--suite",
        help="aime24, amc, math500, minerva, olympiadbench, gsm8k, svamp, or task: the "
        "recipe's held-out items; repeatable.",
    ),
]
_Samples = Annotated[
    int | None, typer.Option(help="Sampled completions an item, beside the greedy one.")
]
_Instruction = Annotated[
    str | None,
    typer.Option(help="After each problem of a suite; steps and \\boxed by default."),
]
_Ks = Annotated[
    list[int] | None, typer.Option("--k", help="k of pass@k; --samples by default; repeatable.")
]

_BestOf = Annotated[
    int | None,
    typer.Option(help="Draws a sampled completion is chosen from, by its tokens' probability."),
]
_Mix = Annotated[
    str | None,
    typer.Option(
        help="OTHER=WEIGHT: ask the geometric mean of each model and OTHER; 0 to 1 of OTHER."
    ),
]


@refuses_clearly
def evaluate(
    models: _Models,
    recipe: Annotated[
        str | None, typer.Option(help="Recipe whose task is asked; a run's own by default.")
    ] = None,
    suites: _Suites = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of SUITE.jsonl files, in place of the hub.")
    ] = None,
    items: Annotated[int | None, typer.Option(help="Items of each suite; all by default.")] = None,
    samples: _Samples = None,
    temperature: Annotated[
        float | None, typer.Option(help="Temperature of sampled completions; 1 by default.")
    ] = None,
    k: _Ks = None,
    best_of: _BestOf = None,
    mix: _Mix = None,
    greedy: Annotated[
        bool, typer.Option("--greedy/--no-greedy", help="Whether to ask greedily too.")
    ] = True,
    max_tokens: Annotated[
        int | None, typer.Option(help="Longest completion; the suite's own by default.")
    ] = None,
    instruction: _Instruction = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of sampled completions; 0 by default.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="New folder: every item's outcome, results.json, plot.")
    ] = None,
    keep_texts: Annotated[
        bool, typer.Option("--keep-texts", help="Store the completions' texts under --out too.")
    ] = False,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure models on a recipe's held-out items or on suites, side by side and item by item."""
    options = SuiteOptions(
        suites=tuple(suites or ()),
        data=data,
        items=items,
        samples=samples,
        temperature=temperature,
        ks=tuple(k or ()),
        best_of=best_of,
        mix=mix,
        greedy=greedy,
        max_tokens=max_tokens,
        instruction=instruction,
        seed=seed,
        out=out,
        keep_texts=keep_texts,
        recipe=recipe,
        overrides=tuple(overrides or ()),
    )
    if options.any_is_set() or len(models) > 1 or _is_stored(models[0]):
        evaluate_suites(models, options, as_json=as_json)
    else:
        _evaluate_by_recipe(models[0], recipe, items, overrides or [], as_json=as_json)


def _is_stored(model: str) -> bool:
    from gmpo.cli.suite_scores import named_model

    return bool(named_model(model).stored)


def _evaluate_by_recipe(
    model: str, recipe: str | None, items: int | None, overrides: list[str], *, as_json: bool
) -> None:
    """The passes that the recipe's `[evaluation]` table wants."""
    from gmpo.terminal import evaluation_table

    config = _evaluation_config(model, recipe, items, overrides)
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
    from gmpo.policy.load import model_folder

    model_folder(model)  # a mistyped name needs no recipe
    own_recipe = Path(model) / "recipe.toml"
    if recipe is None and not own_recipe.is_file():
        raise ConfigError(
            f"{model!r} is no run folder, so --recipe must say whose task is asked, or --suite "
            f"name a suite; bundled recipes: {', '.join(bundled_recipes())}"
        )
    if items is not None:
        overrides = [*overrides, f"evaluation.items={items}"]
    config = load_recipe(recipe or own_recipe, overrides)
    named = config.model.model_copy(update={"name": model_name(model)})
    return config.model_copy(update={"model": named})
