"""`gmpo dashboard`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from gmpo.cli.conventions import is_loopback, refuses_clearly, warn
from gmpo.errors import ConfigError, DashboardError, RunStopped

__all__ = ["dashboard"]


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
) -> None:
    """Show traffic, runs, experiments, versions and alerts on a page until SIGTERM or Ctrl-C."""
    from gmpo.dashboard.serving_page import dashboard_process, free_port
    from gmpo.dashboard.settings import DashboardSettings

    folders = tuple(map(str, runs or []))
    settings = DashboardSettings(store=store, runs=folders, every_seconds=every)
    _refuse_what_is_not_there(settings.store, runs or [])
    if not is_loopback(host):
        warn(f"whoever reaches {host} may look: the page asks for no password")
    port = free_port(host, port)
    with _ending_quietly(), dashboard_process(settings, host=host, port=port) as process:
        shown = f"[{host}]" if ":" in host else host
        print(f"dashboard at http://{shown}:{port}", flush=True)
        code = process.wait()
    raise DashboardError(f"the dashboard ended by itself with code {code}; start it again")


def _refuse_what_is_not_there(store: str | None, runs: list[Path]) -> None:
    """A mistyped path is told here; what goes away later is told on the page."""
    from gmpo.store import open_store

    if store is not None:
        open_store(store, read_only=True).close()
    for path in runs:
        if not path.is_dir():
            raise ConfigError(f"{path} is no folder; give run folders, or folders of run folders")


@contextmanager
def _ending_quietly() -> Iterator[None]:
    """SIGTERM ends with 0, Ctrl-C with 130."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        yield
    except KeyboardInterrupt:
        raise RunStopped("the dashboard has ended") from None
    finally:
        signal.signal(signal.SIGTERM, before)
