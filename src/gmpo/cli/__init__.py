"""The `gmpo` command; each module here holds one or a few of its commands."""

from __future__ import annotations

import os

import typer

from gmpo.cli.ab import ab
from gmpo.cli.compare import compare
from gmpo.cli.contamination import contamination
from gmpo.cli.dashboard import dashboard
from gmpo.cli.data import data
from gmpo.cli.evaluate import evaluate
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
    help="Geometric-Mean Policy Optimization of language models from verifiable rewards.",
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
):
    app.command()(_command)
app.add_typer(ab, name="ab")
app.add_typer(registry, name="registry")
app.add_typer(data, name="data")


def main() -> None:
    """Run the command line."""
    # Loading bars of libraries would tear the output; HF reads the variable when it is imported.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    app()
