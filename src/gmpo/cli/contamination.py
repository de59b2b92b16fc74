"""`gmpo contamination`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from gmpo.cli.conventions import JsonOption, SetOption, refuses_clearly, warn
from gmpo.contamination import Contamination, TrainingText, find_contamination
from gmpo.errors import ConfigError, RunFolderError
from gmpo.recipe import bundled_recipes, load_recipe
from gmpo.suites import SUITES, check_folder_is_read, known_suites, suite_items
from gmpo.tracking import provenance

__all__ = ["contamination"]

_SHOWN = 10  # items a suite listed on a terminal; --json and --out have all


@refuses_clearly
def contamination(
    training: Annotated[
        list[str],
        typer.Argument(
            help="Training data: JSON Lines files or folders of them, a recipe, or a run folder."
        ),
    ],
    suites: Annotated[
        list[str] | None, typer.Option("--suite", help="Suite; repeatable; all by default.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of SUITE.jsonl files, in place of the hub.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File for all findings, as JSON.")] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Look for items of suites in training data, by runs of 13 words (8 for short items)."""
    from gmpo.suites.tables import contamination_table

    wanted = known_suites(suites or [*SUITES])
    if data is not None:
        check_folder_is_read(wanted, warn=warn)
    asked = [suite_items(suite, folder=data, instruction="") for suite in wanted]
    found = find_contamination(
        [(suite.name, suite.title, suite.prompts) for suite in asked],
        _training_texts(training, overrides or []),
    )
    result = {
        "made_with": provenance(),
        "training": training,
        "suites": [one.as_dict() for one in found],
    }
    if out is not None:
        _write(out, result)
    if as_json:
        print(json.dumps(result))
        return
    console = Console()
    console.print(contamination_table(found))
    for one in found:
        _show_items(console, one)


def _training_texts(training: list[str], overrides: list[str]) -> Iterator[TrainingText]:
    """All texts of each row, and the training prompts of each recipe."""
    from gmpo.task_table import build_task
    from gmpo.tasks import jsonl_rows

    recipes = [source for source in training if _recipe(source) is not None]
    if overrides and not recipes:
        raise ConfigError(f"--set changes a recipe, and {training} names none; leave it out")
    for source in training:
        recipe = _recipe(source)
        if recipe is None:
            for row in jsonl_rows(source):
                yield TrainingText(id=row.place, text="\n".join(_texts(row.columns)))
            continue
        task = build_task(load_recipe(recipe, overrides).task)
        for prompt in task.train:
            turns = [message.content for message in prompt.messages or ()]
            yield TrainingText(id=prompt.id, text="\n".join(turns) or prompt.text or "")


def _recipe(source: str) -> str | Path | None:
    """The recipe that a source names: a bundled one, a TOML file, or a run's own."""
    own = Path(source) / "recipe.toml"
    if own.is_file():
        return own
    return source if source in bundled_recipes() or source.endswith(".toml") else None


def _texts(value: object) -> Iterator[str]:
    """Every text in a row, chats and lists included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)


def _write(out: Path, result: dict[str, Any]) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1), encoding="utf-8")
    except OSError as error:
        raise RunFolderError(f"{out} cannot be written: {error.strerror}") from None


def _show_items(console: Console, found: Contamination) -> None:
    if found.template:
        sentence = (
            f"not looked for: {len(found.template)} runs of words that more than a fifth of "
            f'{found.title}\'s items have, as "{found.template[0]}"'
        )
        console.print(Text(sentence), soft_wrap=True)
    for match in found.matches[:_SHOWN]:
        sentence = (
            f"{match.item_id}: {100 * match.coverage:.0f} % in {match.training_id}"
            f"{f' and {match.num_rows - 1} more' if match.num_rows > 1 else ''}: "
            f'"{match.excerpt}"'
        )
        console.print(Text(sentence), soft_wrap=True)
    if len(found.matches) > _SHOWN:
        rest = len(found.matches) - _SHOWN
        console.print(f"and {rest} more of {found.title}; all with --json or --out")
