"""Write docs/commands.md from the command line itself: `python -m scripts.command_page`."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.core import TyperGroup
from typer.main import get_command

from gmpo.cli import app

PAGE = Path(__file__).resolve().parents[1] / "docs" / "commands.md"

GROUPS = {
    "Train": {
        "doctor": "first_steps.md",
        "models": "configuration.md#running-a-recipe",
        "train": "configuration.md",
        "federate": "federated.md",
        "inspect": "metrics.md",
        "sample": "decoding.md",
        "export": "configuration.md#lora",
    },
    "Judge": {
        "evaluate": "evaluation.md",
        "compare": "compare.md",
        "tune": "tune.md",
        "contamination": "evaluation.md#was-it-in-the-training-data",
        "gate": "gate.md",
    },
    "Release and serve": {
        "registry": "registry.md",
        "serve": "serving.md",
        "quality": "routing.md#quality",
        "ab": "abtest.md",
    },
    "Watch and learn": {
        "monitor": "monitoring.md",
        "dashboard": "dashboard.md",
        "data": "data.md",
        "learn": "continual.md",
    },
}
"""Every command under the heading where a reader looks for it, and the page that explains it."""

HEAD = """\
# Commands

Every command with its arguments and options, as `gmpo COMMAND --help` shows them; this page is
written by `python -m scripts.command_page`. In all commands:

* `MODEL` is a name that `gmpo models` lists, a hub name, a folder, or a run folder, which stands
  for its newest checkpoint.
* `RECIPE` is a bundled name or the path of a TOML file ([configuration.md](configuration.md)).
* `--set table.key=value` changes one key of the recipe (of the experiment in `ab start`, of the
  checks in `data check`, of the policy in `data collect`, of the plan in `federate run`, of its
  aggregation in `federate aggregate`), and can be repeated.
* `--store` is a SQLite file or a PostgreSQL URL ([store.md](store.md)). `serve`,
  `dashboard --serve`, `ab start` and `registry add` make the file; the others want it to be there.
* `gmpo --version` prints the releases of gmpo, torch, transformers and Python.
* What is refused is one line on stderr that begins with `error:`.

| exit code | |
| --- | --- |
| 0 | done |
| 1 | `compare`, `tune`: some runs did not end; `registry rollback`: servers did not follow |
| 2 | a mistake or a failure; the line says which and what to do |
| 3 | a run diverged or was stopped by its guard; `gate` did not pass; `data check` refused;\
 `federate run` changed nothing |
| 4 | `compare`, `tune`: other calls on the study hold what it waited for; the line says what |
| 5 | `train`: another process of the run ended (`training.processes`); `--resume` goes on |
| 130 | stopped by Ctrl-C, `train`, `compare`, `tune`, `learn`, `federate` by SIGTERM too;\
 the way on is told |
| 143 | `serve`: ended by a second SIGTERM, before requests were done |
"""


def page() -> str:
    """The whole page.

    Raises:
        SystemExit: a command has no heading, or a heading names one that is gone.
    """
    command = get_command(app)
    assert isinstance(command, TyperGroup)
    commands = command.commands
    grouped = [name for group in GROUPS.values() for name in group]
    if sorted(grouped) != sorted(commands):
        odd = sorted(set(grouped) ^ set(commands))
        raise SystemExit(f"GROUPS and the command line differ in {odd}; mend GROUPS")
    parts = [HEAD]
    for heading, members in GROUPS.items():
        parts.append(f"## {heading}\n")
        for name, where in members.items():
            parts += _sections(f"gmpo {name}", commands[name], where)
    return "\n".join(parts)


def _sections(name: str, command: Any, where: str) -> Iterator[str]:
    if isinstance(command, TyperGroup):
        for inner, one in command.commands.items():
            yield from _sections(f"{name} {inner}", one, where)
        return
    yield f"### {name}\n"
    yield f"{_plain(command.help)} More: [{where.partition('#')[0]}]({where}).\n"
    yield "| argument or option | default | what it is |"
    yield "| --- | --- | --- |"
    for parameter in command.params:
        if parameter.name != "help":
            yield f"| {_name(parameter)} | {_default(parameter)} | {_plain(parameter.help)} |"
    yield ""


def _name(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        name = f"`{parameter.name.upper()}`"
    else:
        name = ", ".join(f"`{option}`" for option in [*parameter.opts, *parameter.secondary_opts])
    return f"{name}, required" if parameter.required else name


def _default(parameter: Any) -> str:
    value = parameter.default
    if callable(value) or value is None or value is False or parameter.required:
        return ""
    if value is True:
        return "on"
    return f"`{value}`"


def _plain(text: str | None) -> str:
    """Help as one table cell; the help's own line breaks and markup of cells are taken out."""
    return re.sub(r"\s+", " ", text or "").strip().replace("|", "\\|")


def main() -> int:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
