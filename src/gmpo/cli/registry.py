"""`gmpo registry`: versions of models, who serves, and how that changes."""

from __future__ import annotations

import getpass
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gmpo.cli.conventions import (
    JsonOption,
    existing_store,
    refuses_clearly,
    say,
    warn,
)
from gmpo.cli.registry_rows import (
    clock,
    cycle_row,
    found_folder,
    lineage_of,
    metric_of,
    read_evidence,
    version_row,
    why_serving,
)
from gmpo.errors import ConfigError, DataError, ServersBehind

if TYPE_CHECKING:
    from gmpo.fleet import Fleet
    from gmpo.registry import Registry
    from gmpo.store import Champion, ModelVersion, Store

__all__ = [
    "add",
    "adopt",
    "gc",
    "mirror",
    "promote",
    "registry",
    "rollback",
    "show",
    "verify",
    "versions",
]

registry = typer.Typer(
    help="Versions of models: list, show, add, adopt, promote, rollback, verify, gc, mirror."
)

_Name = Annotated[str, typer.Argument(help="Name of the model.")]
_Version = Annotated[str, typer.Argument(help="The version; its first digits are enough.")]
_StoreUrl = Annotated[
    str, typer.Option("--store", help="The store: a SQLite file or a PostgreSQL URL.")
]
_Folder = Annotated[
    Path | None,
    typer.Option("--folder", help="Where versions lie; default: models/ beside a SQLite store."),
]
_Mlflow = Annotated[
    str | None, typer.Option("--mlflow", help="MLflow's address, to be told of the change too.")
]
_Gateways = Annotated[
    list[str] | None,
    typer.Option("--gateway", help="gmpo serve --follow at http://HOST:PORT/v1; repeatable."),
]
_Vllm = Annotated[
    list[str] | None,
    typer.Option("--vllm", help="vLLM that takes adapters, at .../v1; repeatable."),
]
_Patience = Annotated[
    float, typer.Option(min=0.0, help="Seconds that a server may take to load it.")
]


@registry.command("list")
@refuses_clearly
def versions(
    store: _StoreUrl,
    name: Annotated[str | None, typer.Argument(help="Name of the model; all by default.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Every version: whether it serves, served, waits for a person, and since when it is there."""
    with _opened(store, read_only=True) as opened:
        if name is not None:
            _require_known(opened, name)
        rows = [version_row(opened, version) for version in opened.model_versions(name)]
    if as_json:
        print(json.dumps(rows))
        return
    console = Console()
    if not rows:
        console.print("no version yet; register one with gmpo registry add")
        return
    table = Table("model", "version", "role", "registered", "parent", "metrics")
    for column in table.columns[1:4]:
        column.no_wrap = True  # a digest in two lines cannot be copied
    for row in rows:
        metrics = ", ".join(f"{key} {value:.4g}" for key, value in row["metrics"].items())
        table.add_row(
            *map(Text, (row["name"], row["version"], row["role"], clock(row["created"])[:10])),
            Text((row["parent"] or "")[:8]),
            Text(metrics),
        )
    console.print(table)


@registry.command()
@refuses_clearly
def show(name: _Name, store: _StoreUrl, as_json: JsonOption = False) -> None:
    """A model's history: champions with the reason of each, candidates that wait, and cycles."""
    from gmpo.registry import Registry

    with _opened(store, read_only=True) as opened:
        _require_known(opened, name)
        found = Registry(opened, _folder(opened, None, needed=False))
        history, candidates = found.history(name), found.candidates(name)
        cycles = [cycle_row(cycle) for cycle in opened.cycles(name)]
    if as_json:
        told = {
            "history": [vars(champion) for champion in history],
            "candidates": [vars(candidate) for candidate in candidates],
            "cycles": cycles,
        }
        print(json.dumps(told))
        return
    if not history:
        _say(f"{name} has no champion; gmpo registry adopt makes the first one")
    for champion in history:
        why = why_serving(champion.reason)
        _say(f"{champion.revision}. {champion.version} since {clock(champion.since)}: {why}")
    for candidate in candidates:
        _say(f"candidate {candidate.version}: {candidate.evidence['sentence']}")
    for row in cycles:
        state = row["state"] if row["ended"] else f"goes on at {row['state']}"
        why = f": {row['reason']}" if row["reason"] else ""
        said = f" ({row['step']}: {row['sentence']})" if row["step"] else ""
        _say(f"cycle {row['cycle']} of {clock(row['began'])}: {state}{why}{said}")


@registry.command()
@refuses_clearly
def add(
    model: Annotated[str, typer.Argument(help="Run folder, model folder or model name.")],
    name: Annotated[str, typer.Option(help="The model that this is a version of.")],
    store: _StoreUrl,
    folder: _Folder = None,
    parent: Annotated[str | None, typer.Option(help="Version it was trained from.")] = None,
    metrics: Annotated[
        list[str] | None, typer.Option("--metric", help="NAME=NUMBER; repeatable.")
    ] = None,
    mlflow: _Mlflow = None,
    as_json: JsonOption = False,
) -> None:
    """Copy a model into the registry, under the digest of its weights."""
    with _open_registry(store, folder, mlflow, is_made=True) as (opened, found):
        version = found.add(
            found_folder(model),
            name=name,
            parent=None if parent is None else _whole(opened, parent).version,
            lineage=lineage_of(model),
            metrics=dict(metric_of(word) for word in metrics or []),
        )
    if as_json:
        print(json.dumps(vars(version)))
        return
    _say(f"{name} has version {version.version} at {version.path}")


@registry.command()
@refuses_clearly
def adopt(
    name: _Name,
    version: _Version,
    store: _StoreUrl,
    folder: _Folder = None,
    reason: Annotated[
        str | None, typer.Option(help="For the history; needed where a champion is replaced.")
    ] = None,
    mlflow: _Mlflow = None,
    as_json: JsonOption = False,
) -> None:
    """Make a version a model's first champion; later ones are promoted on evidence.

    With --reason it also takes the place of a champion whose files are damaged, if those of every
    version before it are too.
    """
    with _open_registry(store, folder, mlflow) as (opened, found):
        chosen, serving = _whole(opened, version).version, opened.champion(name)
        if serving is not None and not (reason or "").strip():
            raise ConfigError(
                f"{name!r} has champion {serving.version}: another version is promoted on evidence "
                "(gmpo registry promote); if the champion's files are gone for good, say so with "
                "--reason"
            )
        champion = found.adopt(name, chosen, reason=reason or "the first version")
    _print_champion(champion, as_json=as_json)


@registry.command()
@refuses_clearly
def promote(
    name: _Name,
    version: _Version,
    store: _StoreUrl,
    folder: _Folder = None,
    evidence: Annotated[
        Path | None,
        typer.Option(help="Decision that gmpo gate --json printed; default: the store's newest."),
    ] = None,
    by: Annotated[str | None, typer.Option(help="Who says so; default: the user.")] = None,
    gateways: _Gateways = None,
    vllm: _Vllm = None,
    patience: _Patience = 300.0,
    mlflow: _Mlflow = None,
    as_json: JsonOption = False,
) -> None:
    """Make a candidate the champion, if it passed the gate against the version that serves.

    With servers named, the release stands once all of them report the version, else it is taken
    back; GMPO_FLEET_API_KEY is sent to them.
    """
    from gmpo.shown_urls import store_option

    fleet = _fleet(gateways, vllm, patience)
    with _open_registry(store, folder, mlflow) as (opened, found):
        _require_known(opened, name)
        chosen = _whole(opened, version)
        candidate = chosen.version
        if chosen.name != name:
            raise ConfigError(f"{candidate} is a version of {chosen.name!r}, not of {name!r}")
        decision = (
            found.newest_decision(name, candidate) if evidence is None else read_evidence(evidence)
        )
        if decision is None:
            raise ConfigError(
                f"the store has no decision of the gate about {candidate}; have the gate decide, "
                f"gmpo gate CHAMPION {candidate[:8]} --suite SUITE{store_option(opened.where)} "
                f"--name {name}, or give --evidence"
            )
        champion = fleet.release(
            found,
            chosen,
            expected_champion=decision.get("champion"),
            evidence=decision,
            by=by or getpass.getuser(),
        )
    _print_champion(champion, as_json=as_json)


@registry.command()
@refuses_clearly
def rollback(
    name: _Name,
    store: _StoreUrl,
    reason: Annotated[str, typer.Option(help="Why, for the history.")],
    folder: _Folder = None,
    expected: Annotated[
        str | None, typer.Option(help="Version to be taken back; default: the one that serves.")
    ] = None,
    gateways: _Gateways = None,
    vllm: _Vllm = None,
    patience: _Patience = 300.0,
    mlflow: _Mlflow = None,
    as_json: JsonOption = False,
) -> None:
    """Make the predecessor serve again.

    Servers that are named load it, and those that could not are said, with exit code 1: it is the
    champion all the same.
    """
    if not reason.strip():
        raise ConfigError("--reason is empty; say why, for whoever reads the history")
    with _open_registry(store, folder, mlflow) as (opened, found):
        _require_known(opened, name)
        serving = opened.champion(name)
        if expected is not None:
            taken = _whole(opened, expected).version
        else:
            taken = "" if serving is None else serving.version
        behind: ServersBehind | None = None
        try:
            champion = _fleet(gateways, vllm, patience).rollback(
                found, name, expected_champion=taken or None, reason=reason
            )
        except ServersBehind as error:
            behind, champion = error, found.history(name)[-1]
    _print_champion(champion, as_json=as_json)
    if behind is not None:
        say("error", str(behind), style="red")
        raise typer.Exit(1)


@registry.command()
@refuses_clearly
def verify(
    store: _StoreUrl,
    version: Annotated[
        str | None, typer.Argument(help="Its first digits are enough; all by default.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Only versions of this model.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Read versions' files again and compare; exit code 2 if one is damaged."""
    from gmpo.registry import check_files

    with _opened(store, read_only=True) as opened:
        wanted = opened.model_versions(name) if version is None else [_whole(opened, version)]
    checks = [check_files(one) for one in wanted]
    if as_json:
        print(json.dumps([{**vars(check), "is_whole": check.is_whole} for check in checks]))
    else:
        for check in checks:
            _say(check.sentence)
    if not all(check.is_whole for check in checks):
        raise typer.Exit(2)


@registry.command()
@refuses_clearly
def gc(
    name: _Name,
    store: _StoreUrl,
    folder: _Folder = None,
    keep: Annotated[int, typer.Option(min=0, help="So many of the newest stay.")] = 3,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove files of versions that neither serve, could serve again, nor are being tried."""
    with _open_registry(store, folder, None) as (opened, found):
        _require_known(opened, name)
        garbage = found.collect_garbage(name, keep=keep, dry_run=dry_run)
    if as_json:
        print(json.dumps(garbage.as_dict()))
        return
    for version, why in garbage.kept.items():
        _say(f"kept {version}: {why}")
    gone = [*garbage.removed, *garbage.leftovers]
    verb = "would remove" if dry_run else "removed"
    _say(f"{verb} {len(gone)} folders, {garbage.num_bytes / 1e6:.1f} MB: {', '.join(gone) or '-'}")


@registry.command()
@refuses_clearly
def mirror(
    name: _Name,
    store: _StoreUrl,
    mlflow: Annotated[str, typer.Option("--mlflow", help="A server, or sqlite:///PATH.")],
) -> None:
    """Bring MLflow's model registry to what the store says, aliases included."""
    from gmpo.registry.mirror import mirror_to_mlflow

    with _opened(store, read_only=True) as opened:
        new = mirror_to_mlflow(opened, name, uri=mlflow)
    _say(f"MLflow at {mlflow} knows {name}; {new} of its versions were new there")


@contextmanager
def _opened(url: str, *, read_only: bool = False) -> Iterator[Store]:
    from gmpo.store import open_store

    with open_store(url, read_only=read_only) as opened:
        yield opened


@contextmanager
def _open_registry(
    url: str, folder: Path | None, mlflow: str | None, *, is_made: bool = False
) -> Iterator[tuple[Store, Registry]]:
    """The store, which only `add` makes where there is none, and the versions beside it."""
    from gmpo.registry import Registry
    from gmpo.registry.mirror import mirror_to_mlflow

    with _opened(url) if is_made else existing_store(url) as opened:

        def mirrored(store: Store, name: str) -> None:
            mirror_to_mlflow(store, name, uri=str(mlflow))

        where = _folder(opened, folder, needed=True)
        mirrors = [] if mlflow is None else [mirrored]
        yield opened, Registry(opened, where, mirrors=mirrors, tell=warn)


def _fleet(gateways: list[str] | None, vllm: list[str] | None, patience: float) -> Fleet:
    """The servers that are named; none is a fleet too."""
    from gmpo.fleet import Fleet, FleetServer

    servers = [FleetServer(url=url, kind="gateway") for url in gateways or []]
    servers += [FleetServer(url=url, kind="vllm") for url in vllm or []]
    return Fleet(
        servers,
        api_key=os.environ.get("GMPO_FLEET_API_KEY"),
        patience_seconds=patience,
        tell=warn,
    )


def _folder(opened: Store, folder: Path | None, *, needed: bool) -> Path:
    """Where versions lie: as told, or beside the SQLite file."""
    if folder is not None:
        return folder
    if "://" not in opened.where:
        return Path(opened.where).parent / "models"
    if needed:
        raise ConfigError("the store is a database server, so --folder must say where versions lie")
    return Path("models")


def _whole(opened: Store, digits: str) -> ModelVersion:
    """The version that begins with these digits."""
    found = [one for one in opened.model_versions() if digits and one.version.startswith(digits)]
    if len(found) != 1:
        said = "no version begins" if not found else f"{len(found)} versions begin"
        raise DataError(f"{said} with {digits!r}; gmpo registry list shows all")
    return found[0]


def _require_known(opened: Store, name: str) -> None:
    """Refuse a name that no version has: mistyped, it would look like a model without any."""
    names = sorted({version.name for version in opened.model_versions()})
    if name not in names:
        others = f"it has versions of {', '.join(names)}" if names else "it has no version yet"
        raise DataError(
            f"no version of a model {name!r} is in the store; {others}; gmpo registry add makes one"
        )


def _print_champion(champion: Champion, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(vars(champion)))
        return
    instead = f" in place of {champion.previous}" if champion.previous else ""
    _say(f"{champion.version} is the champion of {champion.name}{instead}")


def _say(sentence: str) -> None:
    Console().print(Text(sentence), soft_wrap=True)
