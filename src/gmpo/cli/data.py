"""`gmpo data`: new rows checked before anything is trained on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

from gmpo.cli.conventions import JsonOption, refuses_clearly, warn
from gmpo.cli.suite_scores import SuiteOptions, asked_model
from gmpo.errors import ConfigError
from gmpo.recipe import apply_override
from gmpo.suites import check_folder_is_read, known_suites, suite_items

if TYPE_CHECKING:
    from gmpo.data_quality import BatchReport
    from gmpo.data_samples import Sampler

__all__ = ["check", "data"]

data = typer.Typer(help="New training rows: check.")

_REFUSED = 3
"""Exit code of a batch that was checked and is not to be trained on."""

_Suites = Annotated[
    list[str] | None,
    typer.Option("--suite", help="Suite whose items must not be trained on; repeatable."),
]
_Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="KEY=VALUE of the checks, e.g. near_overlap=0.8, or of the model, e.g. "
        "model.dtype=fp32; repeatable.",
    ),
]


@data.callback()
def _commands() -> None:
    """Keep `check` a command of its own while it is the only one."""


@data.command()
@refuses_clearly
def check(
    batch: Annotated[Path, typer.Argument(help="JSON Lines of new rows, or a folder of them.")],
    out: Annotated[
        Path, typer.Option(help="New folder: accepted and rejected rows, report, profile.")
    ],
    suites: _Suites = None,
    folder: Annotated[
        Path | None, typer.Option("--data", help="Folder of SUITE.jsonl files.")
    ] = None,
    earlier: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of a batch checked before, or trusted rows; repeatable."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Current model: name, folder or run folder.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Completions a row that the model gives.")] = 8,
    max_tokens: Annotated[int, typer.Option(help="Longest completion.")] = 512,
    instruction: Annotated[str, typer.Option(help="After each problem, as in training.")] = "",
    settings: _Settings = None,
    as_json: JsonOption = False,
) -> None:
    """Check new rows before training: each by itself, against earlier data, and as a whole."""
    from gmpo.data_files import prepare_folder, read_batch, read_earlier, write_report
    from gmpo.data_quality import checks_of, validate_batch

    checks = checks_of(_checks_table(settings or [], has_model=model is not None))
    status = Console(stderr=True).status("checking")
    sampler = None
    if model is not None:
        sampler = _sampler(model, samples, max_tokens, instruction, settings or [], status)
    wanted = known_suites(suites or [])
    if folder is not None:
        check_folder_is_read(wanted, warn=warn)
    rows = read_batch(batch)
    prepare_folder(out)
    with status:
        report = validate_batch(
            rows,
            checks=checks,
            earlier=read_earlier(earlier or [], checks=checks, sampler=sampler),
            suites=[suite_items(suite, folder=folder, instruction="") for suite in wanted],
            sampler=sampler,
        )
    write_report(report, out)
    if as_json:
        print(json.dumps(report.as_dict()))
    else:
        _show(report, out)
    if not report.passed:
        raise typer.Exit(_REFUSED)


def _checks_table(settings: list[str], *, has_model: bool) -> dict[str, Any]:
    """The settings of the checks; those with a dot are the model's."""
    table: dict[str, Any] = {}
    for setting in settings:
        if "." not in setting.partition("=")[0]:
            apply_override(table, setting)
        elif not has_model:
            raise ConfigError(f"--set {setting} is of a model; name one with --model")
    return table


def _sampler(
    model: str,
    samples: int,
    max_tokens: int,
    instruction: str,
    settings: list[str],
    status: Status,
) -> Sampler:
    from gmpo.data_model import model_sampler

    for name, value in (("samples", samples), ("max-tokens", max_tokens)):
        if value < 1:
            raise ConfigError(f"--{name} is {value}; it must be at least 1")
    overrides = [setting for setting in settings if "." in setting.partition("=")[0]]
    config = asked_model(model, SuiteOptions(suites=("batch",), overrides=tuple(overrides)))
    return model_sampler(
        config,
        num_samples=samples,
        max_tokens=max_tokens,
        instruction=instruction,
        warn=warn,
        progress=lambda done, of: status.update(f"asking {model}: {done} of {of} rows"),
    )


def _show(report: BatchReport, out: Path) -> None:
    console = Console()
    table = Table("rows", "number", title="The batch")
    for name, count in report.counts.items():
        table.add_row(name.replace("_", " "), str(count))
    console.print(table)
    if report.shift:
        figures = Table("against earlier data", "PSI", "p", "shift", title="Shift")
        for figure in report.shift:
            figures.add_row(
                figure.name,
                f"{figure.psi:.3f}",
                f"{figure.p_value:.2g}",
                "yes" if figure.is_alarm else "no",
            )
        console.print(figures)
    for note in report.not_checked:
        warn(f"not checked: {note}")
    console.print(Text(f"{report.sentence}; written to {out}"), soft_wrap=True)
