"""`gmpo compare`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from gmpo.cli.conventions import (
    JsonOption,
    SetOption,
    WaitOption,
    refuses_clearly,
    require_wait,
    threads_of_each,
    warn,
)
from gmpo.errors import ConfigError
from gmpo.tracking import RunFolder, fresh_folder

if TYPE_CHECKING:
    from gmpo.study.plan import StudyPlan
    from gmpo.study.report import StudyReport

__all__ = ["compare"]

_INCOMPLETE = 1
"""Exit code of a study whose report lacks runs, because their processes died again and again."""

_OBJECTIVES = ("grpo", "gmpo")
_SEEDS = (0, 1, 2)

_Recipe = Annotated[
    str | None,
    typer.Argument(help="Bundled name or path of a TOML file; none goes on with --study."),
]
_ArmOverrides = Annotated[
    list[str] | None,
    typer.Option("--set-for", help="Override of one arm: LABEL:table.key=value; repeatable."),
]


@refuses_clearly
def compare(
    recipe: _Recipe = None,
    objectives: Annotated[
        str | None,
        typer.Option(
            help="Arms between commas, each OBJECTIVE or LABEL=OBJECTIVE; grpo,gmpo by default."
        ),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            help="At least two, between commas; 0,1,2 by default. More may be added later."
        ),
    ] = None,
    study: Annotated[
        str | None, typer.Option(help="Folder of the study; runs/NAME-study by default.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few rounds, to see what a report looks like.")
    ] = False,
    overrides: SetOption = None,
    arm_overrides: _ArmOverrides = None,
    target_reward: Annotated[
        float | None, typer.Option(help="Reward that 'rounds to target' waits for.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    keep_checkpoints: Annotated[
        bool, typer.Option("--keep-checkpoints", help="Keep the weights of finished runs.")
    ] = False,
    wait: WaitOption = 60,
    as_json: JsonOption = False,
) -> None:
    """Train with several objectives on the same prompts and seeds, and report what differs."""
    from gmpo.study import open_study
    from gmpo.study.report import build_report

    require_wait(wait)
    if recipe is None and study is None:
        raise ConfigError("name a recipe, or with --study the study to go on with")
    folder = Path(study) if study else fresh_folder(f"{Path(recipe or '').stem}-study")
    asked = _Asked(
        objectives=None if objectives is None else objectives.split(","),
        seeds=seeds,
        overrides=overrides or [],
        arm_overrides=arm_overrides or [],
        quick=quick,
        target_reward=target_reward,
    )
    plan = _asked_plan(folder, recipe, asked, jobs=jobs)
    console = Console(stderr=as_json)
    plan = open_study(folder, plan, warn=warn)
    _announce(console, folder, plan)
    given_up = _run(
        folder, plan, jobs=jobs, keep_checkpoints=keep_checkpoints, wait=wait, console=console
    )
    report = build_report(folder, plan)
    _write(report)
    _show(console, report, as_json=as_json)
    if given_up:
        warn(f"not run to an end: {', '.join(given_up)}; the same command tries them again")
        raise typer.Exit(_INCOMPLETE)


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """Options that are part of a study's plan, as they were given."""

    objectives: list[str] | None
    seeds: str | None
    overrides: list[str]
    arm_overrides: list[str]
    quick: bool
    target_reward: float | None


def _asked_plan(folder: Path, recipe: str | None, asked: _Asked, *, jobs: int) -> StudyPlan | None:
    """What is asked of the folder; None where a study goes on that it does not hold.

    Objectives and seeds that are not named are those of its study.
    """
    from gmpo.study.plan import load_plan, make_plan, named_arms, own_plan_as_asked, parse_seeds

    there = load_plan(folder)
    seeds = None if asked.seeds is None else parse_seeds(asked.seeds)
    if recipe is None:
        if asked.overrides or asked.arm_overrides or asked.quick or asked.target_reward is not None:
            raise ConfigError(
                f"{folder} has its own plan, to which --seeds can add and nothing else; for "
                "another one name the recipe and another --study folder"
            )
        if there is None:
            return None
        return own_plan_as_asked(folder, there, objectives=asked.objectives, seeds=seeds)
    return make_plan(
        recipe,
        objectives=asked.objectives or (named_arms(there) if there else _OBJECTIVES),
        seeds=seeds or (there.seeds if there else _SEEDS),
        overrides=asked.overrides,
        arm_overrides=asked.arm_overrides,
        quick=asked.quick,
        target_reward=asked.target_reward,
        threads=threads_of_each(jobs),
    )


def _run(
    folder: Path,
    plan: StudyPlan,
    *,
    jobs: int,
    keep_checkpoints: bool,
    wait: float,
    console: Console,
) -> list[str]:
    """Names of the runs that could not be brought to an end."""
    from gmpo.study import patience_of, run_study
    from gmpo.terminal import asked_to_stop

    def say(sentence: str) -> None:
        console.print(Text(sentence), soft_wrap=True)

    with asked_to_stop(warn, mended_by="the next call") as should_stop:
        return run_study(
            folder,
            plan,
            jobs=jobs,
            keep_checkpoints=keep_checkpoints,
            patience=patience_of(folder, minutes=wait, say=say),
            say=say,
            should_stop=should_stop,
        )


def _announce(console: Console, folder: Path, plan: StudyPlan) -> None:
    recipe = plan.recipe
    arms = "; ".join(
        f"{arm.label}: {arm.recipe.objective.name}, {arm.recipe.objective.clip_description()}"
        for arm in plan.arms
    )
    first = f" ({plan.num_seeds_before[0]} at first)" if plan.num_seeds_before else ""
    text = (
        f"{arms}\n{len(plan.seeds)} seeds each{first}, {recipe.training.rounds} rounds of "
        f"{recipe.training.steps_per_round} steps, {recipe.model.name}, "
        f"{recipe.model.device}, {recipe.model.dtype}; study folder {folder}"
    )
    console.print(Text(text), soft_wrap=True)


def _write(report: StudyReport) -> None:
    """`report.json`, `report.html` and `plots/` in the study folder."""
    from gmpo.study.html import study_html
    from gmpo.study.plots import plot_study

    folder = RunFolder(report.folder)
    plots = plot_study(report, report.folder / "plots")
    folder.write_text("report.json", json.dumps(report.as_dict(), indent=1) + "\n")
    folder.write_text("report.html", study_html(report, plots))


def _show(console: Console, report: StudyReport, *, as_json: bool) -> None:
    from gmpo.study.tables import render_report

    if as_json:
        print(json.dumps(report.as_dict()))
        return
    console.print(render_report(report))
    for what in ("report.html", "report.json", "plots"):
        console.print(Text(f"{what:12} {report.folder / what}"), soft_wrap=True)
