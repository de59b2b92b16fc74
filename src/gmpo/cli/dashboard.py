"""`gmpo dashboard`."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from gmpo.cli.conventions import ending_quietly, is_loopback, refuses_clearly, warn
from gmpo.errors import ConfigError, DashboardError
from gmpo.own_servers import require_serving

__all__ = ["dashboard"]

_LOOK_SECONDS = 0.2
_DRAIN_SECONDS = 60.0


@refuses_clearly
def dashboard(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(help="Run folders, or folders of run folders; finished or still training."),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(help="The gateway's store: a SQLite file or a PostgreSQL URL."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any free port.")] = 8501,
    every: Annotated[float, typer.Option(min=0.5, help="Seconds between two looks.")] = 5.0,
    serve: Annotated[
        str | None,
        typer.Option(help="Also run `gmpo serve` with this model and --store, beside the page."),
    ] = None,
    serve_port: Annotated[
        int, typer.Option(min=0, max=65535, help="The gateway's port; 0 is any free one.")
    ] = 8000,
) -> None:
    """Show traffic, runs, experiments, versions and alerts on a page until SIGTERM or Ctrl-C."""
    from gmpo.dashboard.serving_page import dashboard_process, free_port
    from gmpo.dashboard.settings import DashboardSettings

    if serve is not None:
        require_serving("--serve")
        if store is None:
            raise ConfigError("--serve records its answers; say where with --store")
    folders = tuple(map(str, runs or []))
    settings = DashboardSettings(store=store, runs=folders, every_seconds=every)
    _refuse_what_is_not_there(store, runs or [], is_made=serve is not None)
    if not is_loopback(host):
        warn(f"whoever reaches {host} may look: the page asks for no password")
    port = free_port(host, port)
    with (
        ending_quietly("the dashboard has ended"),
        _gateway(serve, store, serve_port) as gateway,
        dashboard_process(settings, host=host, port=port) as page,
    ):
        shown = f"[{host}]" if ":" in host else host
        print(f"dashboard at http://{shown}:{port}", flush=True)
        what, code = _first_to_end({"dashboard": page, **gateway})
    raise DashboardError(f"the {what} ended by itself with code {code}; its own words are above")


def _refuse_what_is_not_there(store: str | None, runs: list[Path], *, is_made: bool) -> None:
    """A mistyped path is told here; what goes away later is told on the page."""
    from gmpo.store import open_store

    if store is not None:
        open_store(store, read_only=not is_made).close()
    for path in runs:
        if not path.is_dir():
            raise ConfigError(f"{path} is no folder; give run folders, or folders of run folders")


@contextmanager
def _gateway(
    model: str | None, store: str | None, port: int
) -> Iterator[Mapping[str, subprocess.Popen[bytes]]]:
    """The gateway beside the page, if a model is to be served; it says itself where."""
    if model is None or store is None:
        yield {}
        return
    process = subprocess.Popen(
        [sys.executable, "-m", "gmpo.cli", "serve", model, "--store", store, "--port", str(port)],
        stdin=subprocess.DEVNULL,
        # Ctrl-C would reach it too, and the signal below would be the second, which drains nothing.
        start_new_session=True,
    )
    try:
        yield {"gateway": process}
    finally:
        process.terminate()
        try:
            process.wait(_DRAIN_SECONDS)
        finally:
            process.kill()
            process.wait()


def _first_to_end(processes: Mapping[str, subprocess.Popen[bytes]]) -> tuple[str, int]:
    """Which process ended first, and with what code; waits for it."""
    while True:
        for name, process in processes.items():
            code = process.poll()
            if code is not None:
                return name, code
        time.sleep(_LOOK_SECONDS)
