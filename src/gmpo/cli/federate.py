"""`gmpo federate`: clients train where their data are, a server puts their updates together."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from gmpo.cli.conventions import (
    JsonOption,
    refuses_clearly,
    say,
    threads_of_each,
    warn,
)
from gmpo.errors import ConfigError

if TYPE_CHECKING:
    from gmpo.federated.folder import FederationFolder
    from gmpo.federated.plan import Federation
    from gmpo.federated.records import RoundReport

__all__ = ["aggregate", "begin", "federate", "run", "update"]

federate = typer.Typer(help="Federated training: run, begin, update, aggregate.")

_NOTHING_CHANGED = 3
"""Exit code of a federation all of whose rounds left the model as it was."""


@federate.command()
@refuses_clearly
def run(
    plan: Annotated[
        Path | None, typer.Argument(help="TOML plan; left out, the folder's own goes on.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Of the federation; runs/NAME of the plan by default.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override of the plan: key=value, e.g. rounds=2; repeatable."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check plan, recipes, data and model; train nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Run a federation on this machine, client by client, or go on with it.

    Exit code 3: every round left the model as it was.
    """
    from gmpo.federated import Coordinator, load_federated_plan, open_federation, resolve_federation
    from gmpo.terminal import asked_to_stop

    if plan is None and folder is None:
        raise ConfigError("name a plan, or with --folder a federation to go on with")
    if plan is None and overrides:
        raise ConfigError("--set changes a plan; name the plan, or go on with the folder's own")
    asked = None if plan is None else resolve_federation(load_federated_plan(plan, overrides or ()))
    if dry_run:
        if asked is None:
            raise ConfigError("--dry-run checks a plan; name one")
        _show_plan(asked, as_json=as_json)
        return
    place = Path("runs") / plan.stem if folder is None and plan is not None else folder
    assert place is not None, "one of the two is named"
    opened, federation = open_federation(place, asked, warn=warn)
    with opened.locked(), asked_to_stop(warn, mended_by="the next call") as should_stop:
        coordinator = Coordinator.open(
            opened,
            federation,
            threads=threads_of_each(1),
            warn=warn,
            say=_say,
            should_stop=should_stop,
        )
        reports = coordinator.run()
    _show_rounds(opened, reports, as_json=as_json)
    if all(report.outcome == "kept" for report in reports):
        raise typer.Exit(_NOTHING_CHANGED)


@federate.command()
@refuses_clearly
def begin(
    model: Annotated[str, typer.Argument(help="Model name, or folder of a model or adapter.")],
    to: Annotated[Path, typer.Option(help="New folder.")],
) -> None:
    """Write a model as the folder that clients on machines of their own begin with, in fp32."""
    from gmpo.export import copy_model
    from gmpo.model_files import weights_version

    copy_model(model, to)
    print(f"{to}: version {weights_version(to)}; clients train with --set model.name={to}")


@federate.command()
@refuses_clearly
def update(
    run: Annotated[Path, typer.Argument(help="Folder of a client's run.")],
    client: Annotated[str, typer.Option(help="Its name.")],
    to: Annotated[Path, typer.Option(help="New file of the update.")],
    base: Annotated[
        Path | None,
        typer.Option(help="Folder of the model that the run began with, if its recipe names none."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write what a client's run changed, which the server aggregates; no row is in it."""
    from gmpo.federated.clients import update_of_run
    from gmpo.federated.settings import CLIENT_NAME

    if not CLIENT_NAME.fullmatch(client):
        raise ConfigError(
            f"--client is {client!r}; begin with a letter or digit and go on with letters, digits, "
            "'.', '_' or '-', 64 at most"
        )
    if to.exists():
        raise ConfigError(f"--to {to} exists and is not overwritten; name a new file")
    with TemporaryDirectory(prefix="gmpo-federate-") as apart:
        written = update_of_run(
            run, client=client, base=base, file=to, merged=Path(apart) / "merged"
        )
    told = {
        "file": str(to),
        "client": client,
        "base": written.base,
        "model": written.model,
        "sequences": written.sequences,
    }
    if as_json:
        print(json.dumps(told))
        return
    print(f"{to}: {client} from {written.base} to {written.model}, {written.sequences} sequences")


@federate.command()
@refuses_clearly
def aggregate(
    base: Annotated[Path, typer.Argument(help="Folder of the model that the clients began with.")],
    updates: Annotated[list[Path], typer.Argument(help="Their updates' files.")],
    to: Annotated[Path, typer.Option(help="New folder of the next model.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="KEY=VALUE of the aggregation, e.g. rule=geometric_median; repeatable.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Put clients' updates together to the next model; ask `gmpo gate` before it is used."""
    from gmpo.federated import AggregationSettings, read_update, write_aggregate
    from gmpo.federated import aggregate as aggregated
    from gmpo.federated.aggregation import require_aggregable
    from gmpo.federated.folder import disk_errors
    from gmpo.federated.report import shares_table
    from gmpo.recipe import apply_override, settings_of
    from gmpo.tracking import provenance

    table: dict[str, object] = {}
    for override in overrides or ():
        apply_override(table, override)
    settings = settings_of(AggregationSettings, table, of="aggregation")
    if "accuracy" in settings.score_exponents:
        raise ConfigError(
            "score_exponents has accuracy, for which gmpo federate run asks the clients' models; "
            "here agreement alone is known"
        )
    read = [read_update(file) for file in updates]
    require_aggregable(to, base=base, updates=read)  # before all of them are read
    made = aggregated(read, settings)
    origin = {"base": read[0].base, "aggregation": made.as_dict(), **provenance()}
    with disk_errors(to):
        version = write_aggregate(to, base=base, updates=read, aggregation=made, origin=origin)
    if as_json:
        print(json.dumps({"folder": str(to), "version": version, **made.as_dict()}))
        return
    console = Console()
    console.print(shares_table(made))
    said = f"version {version} in {to}; decide with: gmpo gate {base} {to}"
    console.print(Text(said), soft_wrap=True)


def _say(sentence: str) -> None:
    say("federate", sentence, style="cyan")


def _show_plan(federation: Federation, *, as_json: bool) -> None:
    from gmpo.federated.clients import training_rows
    from gmpo.federated.rounds import check_federation

    suites = check_federation(federation)
    told: dict[str, Any] = {
        "rounds": federation.plan.rounds,
        "local_rounds": {
            name: recipe.training.rounds for name, recipe in federation.clients.items()
        },
        "clients": {name: len(training_rows(federation, name)) for name in federation.clients},
        "suites": {name: len(items) for name, items in suites.items()},
        "rule": federation.plan.aggregation.rule,
    }
    if as_json:
        print(json.dumps(told))
        return
    for name, rows in told["clients"].items():
        print(f"client {name}: {rows} training rows, {told['local_rounds'][name]} local rounds")
    for name, items in told["suites"].items():
        print(f"suite {name}: {items} items")
    print(f"{told['rounds']} rounds, {told['rule'].replace('_', ' ')}; nothing was trained")


def _show_rounds(folder: FederationFolder, reports: list[RoundReport], *, as_json: bool) -> None:
    model = folder.path / reports[-1].folder
    if as_json:
        told = [report.as_dict() for report in reports]
        print(json.dumps({"model": str(model), "version": reports[-1].model, "rounds": told}))
        return
    from gmpo.federated.report import clients_table, rounds_table

    console = Console()
    console.print(rounds_table(reports))
    console.print(clients_table(reports))
    console.print(Text(f"model {reports[-1].model} in {model}"), soft_wrap=True)
