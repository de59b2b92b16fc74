"""The `gmpo` command; each module here holds one or a few of its commands."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Annotated

import typer

from gmpo.cli.ab import ab
from gmpo.cli.compare import compare
from gmpo.cli.contamination import contamination
from gmpo.cli.dashboard import dashboard
from gmpo.cli.data import data
from gmpo.cli.doctor import doctor
from gmpo.cli.evaluate import evaluate
from gmpo.cli.federate import federate
from gmpo.cli.gate import gate
from gmpo.cli.inspect import inspect
from gmpo.cli.learn import learn
from gmpo.cli.models import export, models, sample
from gmpo.cli.monitor import monitor
from gmpo.cli.quality import quality
from gmpo.cli.registry import registry
from gmpo.cli.serve import serve
from gmpo.cli.train import train
from gmpo.cli.tune import tune

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _command in (
    train,
    compare,
    tune,
    evaluate,
    gate,
    contamination,
    sample,
    serve,
    quality,
    learn,
    monitor,
    dashboard,
    export,
    inspect,
    models,
    doctor,
):
    app.command()(_command)


def _print_versions(is_asked: bool) -> None:
    if is_asked:
        others = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers"))
        print(f"gmpo {metadata.version('gmpo')} ({others}, Python {platform.python_version()})")
        raise typer.Exit


@app.callback()
def _every_command(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_versions, is_eager=True, help="Print versions and end."
        ),
    ] = False,
) -> None:
    """Geometric-Mean Policy Optimization of language models from verifiable rewards."""


app.add_typer(ab, name="ab")
app.add_typer(registry, name="registry")
app.add_typer(data, name="data")
app.add_typer(federate, name="federate")


def main() -> None:
    """Run the command line."""
    # Loading bars of libraries would tear the output; HF reads the variable when it is imported.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    app()
