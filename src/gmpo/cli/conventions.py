"""What every command shares: options, clear refusals, notes on stderr."""

from __future__ import annotations

import ipaddress
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from gmpo.errors import (
    ConfigError,
    GmpoError,
    GuardStopped,
    NonFiniteError,
    ProcessLost,
    RunStopped,
    StillHeld,
)

if TYPE_CHECKING:
    from gmpo.store import Store

__all__ = [
    "JsonOption",
    "SetOption",
    "WaitOption",
    "ending_quietly",
    "existing_store",
    "is_given",
    "is_loopback",
    "model_name",
    "refuses_clearly",
    "require_wait",
    "say",
    "threads_of_each",
    "warn",
]

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")

_DIVERGED = 3
"""Exit code of a run that ended because a value that counts was not finite."""

_STILL_HELD = 4
"""Exit code of a command that waited for other processes as long as it might."""

_LOST = 5
"""Exit code of a run another process of which ended; it can be resumed."""

_STOPPED = 130
"""Exit code of a run that was asked to stop, as shells give it for Ctrl-C."""

JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one line of JSON.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override: table.key=value; repeatable.")
]

WaitOption = Annotated[
    float,
    typer.Option(
        metavar="MINUTES",
        help="Longest wait in minutes for other calls on the study while nothing comes of them; "
        "0 does not wait.",
    ),
]


def refuses_clearly(command: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Print the project's own errors as one line and exit with 2, 3, 4, 5 or 130.

    2 is a mistake or a failure, 3 a run that diverged or that the guard stopped, 4 a wait for other
    processes that was given up, 5 a run that lost one of its processes, 130 a stop that was asked
    for.
    """

    @wraps(command)
    def wrapped(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        try:
            return command(*args, **kwargs)
        except RunStopped as error:
            say("stopped", str(error), style="yellow")
            raise typer.Exit(_STOPPED) from None
        except StillHeld as error:
            say("gave up waiting", str(error), style="yellow")
            raise typer.Exit(_STILL_HELD) from None
        except ProcessLost as error:
            say("error", str(error), style="red")
            raise typer.Exit(_LOST) from None
        except GmpoError as error:
            say("error", str(error), style="red")
            diverged = isinstance(error, NonFiniteError | GuardStopped)
            raise typer.Exit(_DIVERGED if diverged else 2) from None

    return wrapped


@contextmanager
def existing_store(url: str) -> Iterator[Store]:
    """A store to write to that is there already: a mistyped path must not make an empty one.

    Raises:
        StoreError: there is none.
    """
    from gmpo.store import open_store

    open_store(url, read_only=True).close()
    with open_store(url) as opened:
        yield opened


@contextmanager
def ending_quietly(told: str) -> Iterator[None]:
    """SIGTERM ends with 0, Ctrl-C with 130, both after what the block left to be done.

    Args:
        told: what is said after Ctrl-C.

    Raises:
        RunStopped: Ctrl-C came.
    """
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        yield
    except KeyboardInterrupt:
        raise RunStopped(told) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def require_wait(minutes: float) -> None:
    """Refuse a `WaitOption` that is none.

    Raises:
        ConfigError: it is negative or no number.
    """
    if not minutes >= 0:  # nan too
        raise ConfigError(f"--wait {minutes:g} must be minutes from 0 on; 0 does not wait")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def model_name(model: str) -> str:
    """A run folder stands for its newest checkpoint's model."""
    if not (Path(model) / "recipe.toml").is_file():
        return model
    from gmpo.checkpoint import checkpoint_model, latest_checkpoint
    from gmpo.tracking import no_checkpoint

    checkpoint = latest_checkpoint(Path(model) / "checkpoints")
    if checkpoint is None:
        raise ConfigError(f"{no_checkpoint(Path(model))}, or name a model")
    return str(checkpoint_model(checkpoint))


def is_given(context: typer.Context, parameter: str) -> bool:
    """Whether the user gave a parameter a value, be it the default's."""
    source = context.get_parameter_source(parameter)
    return source is not None and source.name != "DEFAULT"


def threads_of_each(processes: int) -> int:
    """CPU threads of each run: what the environment says, else an equal share of the cores."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked):
        return int(asked)
    return max(1, (os.cpu_count() or 1) // processes)


def warn(message: str) -> None:
    """Say it on stderr, and go on."""
    say("note", message, style="yellow")


def say(what: str, message: str, *, style: str) -> None:
    """One sentence on stderr, under a coloured word; unsaid where nobody can hear it."""
    text = Text.assemble((f"{what}:", style), " ", message)  # markup would eat a path's brackets
    # A reader that left or a full disk must end neither the work beside nor its exit code.
    with suppress(OSError):
        _Notes(stderr=True).print(text, soft_wrap=True)


class _Notes(Console):
    """A console whose reader may leave; rich's own ends the thread then."""

    def on_broken_pipe(self) -> None:
        """Leave it at that."""
