"""`gmpo tune`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
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
from gmpo.tracking import fresh_folder

if TYPE_CHECKING:
    from gmpo.tuning.plan import TuningPlan
    from gmpo.tuning.search import Search

__all__ = ["Stability", "tune"]

_INCOMPLETE = 1
"""Exit code of a study that lacks runs, because their processes died again and again."""


_PruneOption = Annotated[
    bool | None,
    typer.Option(
        "--prune/--no-prune",
        help="End trials that are behind; done by default, but not with --pareto.",
    ),
]


class Stability(StrEnum):
    """Formulas of stability, as the command line takes them."""

    meaningful = "meaningful"
    article = "article"


@refuses_clearly
def tune(
    recipe: Annotated[
        str | None,
        typer.Argument(help="Bundled name or path of a TOML file; none goes on with --study."),
    ] = None,
    study: Annotated[
        str | None, typer.Option(help="Folder of the study; runs/NAME-tuning by default.")
    ] = None,
    trials: Annotated[
        int | None, typer.Option(help="Trials in all; 50 by default. More may be asked for later.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    pareto: Annotated[
        bool, typer.Option("--pareto", help="Search accuracy and stability as two objectives.")
    ] = False,
    stability: Annotated[
        Stability | None, typer.Option(help="Formula of stability; meaningful by default.")
    ] = None,
    prune: _PruneOption = None,
    space: Annotated[
        Path | None, typer.Option(help="TOML file that narrows or replaces the space.")
    ] = None,
    overrides: SetOption = None,
    seeds: Annotated[
        str | None,
        typer.Option(help="Fresh seeds of the last comparison, between commas; five by default."),
    ] = None,
    top: Annotated[
        int | None, typer.Option(help="Trials that are compared with the recipe; 3 by default.")
    ] = None,
    wait: WaitOption = 60,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print space and plan; train nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Search a recipe's hyper-parameters, then hold the best trials against it on unseen items."""
    console = Console(stderr=as_json)
    asked = _Asked(
        is_pareto=pareto, stability=stability, prune=prune, space=space, seeds=seeds, top=top
    )
    _require_trials(trials)
    require_wait(wait)
    folder, plan = _asked_plan(recipe, study, asked, overrides or [], processes=processes)
    if dry_run:
        _show_plan(console, folder, plan, trials, as_json=as_json)
        return
    from gmpo.tuning.plan import open_tuning
    from gmpo.tuning.search import Search

    plan, count = open_tuning(folder, plan, trials=trials, warn=warn)
    search = Search(folder, plan)
    given_up = _run(search, trials=count, processes=processes, wait=wait, console=console)
    _report(search, console, as_json=as_json)
    if given_up:
        warn(f"not run to an end: {', '.join(given_up)}; the same command tries them again")
        raise typer.Exit(_INCOMPLETE)


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """Options that are part of a study's plan, as they were given."""

    is_pareto: bool
    stability: Stability | None
    prune: bool | None
    space: Path | None
    seeds: str | None
    top: int | None

    def any_is_set(self) -> bool:
        rest = (self.stability, self.prune, self.space, self.seeds, self.top)
        return self.is_pareto or any(option is not None for option in rest)


def _asked_plan(
    recipe: str | None,
    study: str | None,
    asked: _Asked,
    overrides: list[str],
    *,
    processes: int,
) -> tuple[Path, TuningPlan | None]:
    """The study's folder, and the plan asked for; None goes on with the folder's own."""
    from gmpo.study.plan import parse_seeds
    from gmpo.tuning.plan import TuningOptions, make_tuning_plan

    if recipe is None and study is None:
        raise ConfigError("name a recipe, or with --study the study to go on with")
    folder = Path(study) if study else fresh_folder(f"{Path(recipe or '').stem}-tuning")
    if recipe is None:
        if overrides or asked.any_is_set():
            raise ConfigError(f"{folder} has its own plan; to change it, name the recipe as well")
        return folder, None
    options = TuningOptions(
        space=asked.space,
        stability=(asked.stability or Stability.meaningful).value,
        is_pareto=asked.is_pareto,
        prunes=asked.prune,
        seeds=None if asked.seeds is None else parse_seeds(asked.seeds),
        top=TuningOptions.top if asked.top is None else asked.top,
        threads=threads_of_each(processes),
    )
    return folder, make_tuning_plan(recipe, options, overrides=overrides, warn=warn)


def _require_trials(trials: int | None) -> None:
    if trials is not None and trials < 1:
        raise ConfigError(f"--trials {trials} must be at least 1; leave it out for 50")


def _show_plan(
    console: Console, folder: Path, plan: TuningPlan | None, trials: int | None, *, as_json: bool
) -> None:
    """What would be done, for a new study."""
    from gmpo.tuning.plan import DEFAULT_TRIALS
    from gmpo.tuning.tables import render_plan

    if plan is None:
        raise ConfigError(f"--dry-run shows what a new study in {folder} would do; name a recipe")
    count = DEFAULT_TRIALS if trials is None else trials
    if as_json:
        print(json.dumps({"plan": plan.as_dict(), "trials": count}))
        return
    console.print(render_plan(plan, count))


def _run(
    search: Search, *, trials: int, processes: int, wait: float, console: Console
) -> list[str]:
    """Trials, then the last comparison; names of the runs that could not be brought to an end."""
    from gmpo.terminal import asked_to_stop
    from gmpo.tuning.tables import plan_sentences
    from gmpo.tuning.trials import candidates, judge, run_trials

    say = _printer(console)
    for sentence in [*plan_sentences(search.plan, trials), f"study folder {search.folder}"]:
        say(sentence)
    with asked_to_stop(warn, mended_by="the next call") as should_stop:
        given_up = run_trials(
            search,
            trials=trials,
            processes=processes,
            wait_minutes=wait,
            say=say,
            should_stop=should_stop,
        )
        chosen = candidates(search)
        if chosen:
            names = ", ".join(str(record.number) for record in chosen)
            noun = "trial" if len(chosen) == 1 else "trials"
            say(f"{noun} {names} against the recipe, on items that no trial asked")
            given_up += judge(
                search,
                chosen,
                processes=processes,
                wait_minutes=wait,
                say=say,
                should_stop=should_stop,
            )
    return given_up


def _printer(console: Console) -> Callable[[str], None]:
    return lambda sentence: console.print(Text(sentence), soft_wrap=True)


def _report(search: Search, console: Console, *, as_json: bool) -> None:
    """Write the report, the winner's recipe and the plots, and show the report."""
    from gmpo.tuning.plots import plot_tuning
    from gmpo.tuning.report import build_tuning_report, write_report
    from gmpo.tuning.tables import render_tuning

    report = build_tuning_report(search)
    plot_tuning(report, report.folder / "plots")
    write_report(report)
    if as_json:
        print(json.dumps(report.as_dict()))
        return
    console.print(render_tuning(report))
    for what in ("winner.toml", "report.json", "plots"):
        console.print(Text(f"{what:12} {report.folder / what}"), soft_wrap=True)
