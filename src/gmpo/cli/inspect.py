"""`gmpo inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from gmpo.cli.conventions import JsonOption, refuses_clearly
from gmpo.errors import ConfigError

__all__ = ["inspect"]


@refuses_clearly
def inspect(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    group: Annotated[int | None, typer.Option(help="Show the texts of the N-th group.")] = None,
    plots: Annotated[bool, typer.Option(help="Draw PNG plots into RUN/plots.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Summarise a run in the terminal and draw its plots; or show one group's completions."""
    from gmpo.inspection import load_groups, summarize_run
    from gmpo.plots import plot_run
    from gmpo.run_tables import render_group, render_summary

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
