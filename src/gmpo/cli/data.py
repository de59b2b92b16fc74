"""`gmpo data`: new rows checked before anything is trained on them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

from gmpo.cli.conventions import JsonOption, existing_store, refuses_clearly, warn
from gmpo.cli.suite_scores import SuiteOptions, asked_model
from gmpo.errors import ConfigError
from gmpo.recipe import apply_override
from gmpo.suites import check_folder_is_read, known_suites, suite_items

if TYPE_CHECKING:
    from gmpo.data_checks.quality import BatchReport
    from gmpo.data_checks.samples import Sampler

__all__ = ["check", "collect", "data", "purge"]

data = typer.Typer(help="New training rows: check, collect, purge.")

_REFUSED = 3
"""Exit code of a batch that was checked and is not to be trained on."""

_DAY = 86_400.0

_StoreUrl = Annotated[
    str, typer.Option("--store", help="The gateway's store: a SQLite file or a PostgreSQL URL.")
]
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
    from gmpo.data_checks.files import new_folder, read_batch, read_earlier, write_report
    from gmpo.data_checks.quality import checks_of, validate_batch

    checks = checks_of(_checks_table(settings or [], has_model=model is not None))
    status = Console(stderr=True).status("checking")
    sampler = None
    if model is not None:
        sampler = _sampler(model, samples, max_tokens, instruction, settings or [], status)
    wanted = known_suites(suites or [])
    if folder is not None:
        check_folder_is_read(wanted, warn=warn)
    with new_folder(out), status:
        report = validate_batch(
            read_batch(batch),
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


@data.command()
@refuses_clearly
def collect(
    store: _StoreUrl,
    out: Annotated[Path, typer.Option(help="New file for the rows, JSON Lines.")],
    days: Annotated[
        float | None, typer.Option(help="Of the last so many days; all that are kept by default.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE of the policy, e.g. least_votes=3; repeatable."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make rows of served answers that users or a verifier confirmed; then check them."""
    from gmpo.data_checks.files import write_rows
    from gmpo.feedback import policy_of, training_rows
    from gmpo.store import open_store

    table: dict[str, Any] = {}
    for setting in settings or []:
        apply_override(table, setting)
    policy = policy_of(table)
    _refuse_negative("days", days)
    now = time.time()
    with open_store(store, read_only=True) as opened:
        found = training_rows(
            opened, since=None if days is None else now - days * _DAY, policy=policy, now=now
        )
    write_rows(found.rows, out)
    if as_json:
        print(json.dumps(found.as_dict()))
        return
    if not found.num_texts:
        warn(
            "the store holds no texts of answers: they are kept where the gateway runs with "
            '--record-texts and the request says "store": true'
        )
    reasons = ", ".join(f"{count} {reason}" for reason, count in found.left_out.items())
    Console().print(
        Text(
            f"{len(found.rows)} rows of {found.num_texts} recorded answers written to {out}"
            f"{f'; left out: {reasons}' if reasons else ''}"
        ),
        soft_wrap=True,
    )


@data.command()
@refuses_clearly
def purge(
    store: _StoreUrl,
    days: Annotated[
        float | None, typer.Option("--older-than-days", help="Texts recorded before that.")
    ] = None,
    unit: Annotated[str | None, typer.Option(help="Texts of this user.")] = None,
    request: Annotated[str | None, typer.Option(help="Texts of this request.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete recorded texts and verdicts from a store; figures of the answers stay."""
    from gmpo.feedback import purge_texts
    from gmpo.store import open_store

    _refuse_negative("older-than-days", days)
    with open_store(store, read_only=True) if dry_run else existing_store(store) as opened:
        count = purge_texts(
            opened,
            before=None if days is None else time.time() - days * _DAY,
            unit=unit,
            request_id=request,
            dry_run=dry_run,
        )
    if as_json:
        print(json.dumps({"events": count, "dry_run": dry_run}))
        return
    done = "would be deleted" if dry_run else "deleted"
    Console().print(f"{count} recorded texts and verdicts {done}")


def _refuse_negative(name: str, days: float | None) -> None:
    if days is not None and not days >= 0:
        raise ConfigError(f"--{name} is {days}; it must be 0 or more")


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
    from gmpo.data_checks.model import model_sampler

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
