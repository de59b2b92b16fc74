"""`gmpo doctor`."""

from __future__ import annotations

import json

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gmpo.cli.conventions import JsonOption, refuses_clearly

__all__ = ["doctor"]

_NOT_READY = 2
"""Exit code where something is missing without which the quick start does not run."""


@refuses_clearly
def doctor(as_json: JsonOption = False) -> None:
    """Say what this machine offers and what is missing: packages, device, memory, model, extras."""
    from gmpo.environment import findings

    found = list(findings())
    missing = [one for one in found if one.state == "missing"]
    if as_json:
        print(json.dumps([one.as_dict() for one in found]))
    else:
        table = Table("what", "", "found", box=None)
        for one in found:
            said = f"{one.said}: {one.remedy}" if one.remedy else one.said
            table.add_row(one.what, one.state, Text(said, overflow="fold"))
        console = Console()
        console.print(table)
        sentence = "ready: gmpo train quickstart"
        if missing:
            sentence = f"not ready: {', '.join(one.what for one in missing)}"
        console.print(Text(sentence), soft_wrap=True)
    if missing:
        raise typer.Exit(_NOT_READY)
