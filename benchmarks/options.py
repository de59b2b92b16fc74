"""Options that several scripts take, their refusals, and how a benchmark says that it failed."""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from gmpo.errors import GmpoError

__all__ = [
    "BenchmarkError",
    "add_threads",
    "ends_clearly",
    "plot_file",
    "plotted_results_file",
    "require_at_least_one",
    "require_threads",
    "results_file",
]

_Main = Callable[..., int]
_PICTURES = (".png", ".svg", ".pdf")


class BenchmarkError(RuntimeError):
    """A benchmark cannot be held, and the message says why."""


def ends_clearly(main: _Main) -> _Main:
    """Have a script's `main` print what it cannot do in one line, and return 1."""

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv)
        except (BenchmarkError, GmpoError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1

    return run


def results_file(text: str) -> Path:
    """The path that `--json` names, as the option's type: what cannot be written ends the program.

    The figures come after minutes of work, so the place is tried before. Its folder is made; a file
    that is there already stays as it is, because an interrupted run may go on with it.

    Raises:
        ArgumentTypeError: the path is a folder's, or nothing can be written there. argparse prints
            the message and ends with exit code 2.
    """
    path = Path(text)
    try:
        if path.is_dir() or text.endswith(os.sep):
            raise argparse.ArgumentTypeError(
                f"{text!r} is a folder; name a file in it, such as {path / 'results.json'}"
            )
        if path.exists() and not path.is_file():
            raise argparse.ArgumentTypeError(f"{text!r} is no ordinary file; name another")
        _try_to_write(path)
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} cannot be written: {error.strerror}; name a file elsewhere, or see to space "
            "and permissions"
        ) from None
    return path


def plotted_results_file(text: str) -> Path:
    """`results_file` of a script that draws a plot beside it, with .png in place of .json.

    Raises:
        ArgumentTypeError: besides, the name does not end in .json, so that the plot might take the
            same one; or the plot cannot be written.
    """
    path = Path(text)
    if path.suffix != ".json" and not path.is_dir():
        raise argparse.ArgumentTypeError(
            f"{text!r} does not end in .json; name a file that does: the plot beside it takes the "
            "name with .png instead"
        )
    results_file(text)
    results_file(str(path.with_suffix(".png")))
    return path


def plot_file(text: str) -> Path:
    """The path that `--plot` names, as the option's type, tried as a results file is.

    Raises:
        ArgumentTypeError: besides, the name does not end as a picture's does.
    """
    if Path(text).suffix not in _PICTURES and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(
            f"{text!r} is no picture's name; name a file that ends in {' or '.join(_PICTURES)}"
        )
    return results_file(text)


def _try_to_write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        with path.open("ab"):  # changes nothing, and fails where it may not be written
            pass
    # Results are written beside the file and take its place, so the folder counts too; a whole
    # block, because an empty file can be made on a full disk.
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.") as probe:
        probe.write(b"0" * 4096)
        probe.flush()


def add_threads(parser: argparse.ArgumentParser, *, what: str = "all cores unless given") -> None:
    """`--threads`, to be checked by `require_threads` once the options are parsed."""
    parser.add_argument("--threads", type=int, default=_cores(), help=what)


def require_threads(parser: argparse.ArgumentParser, threads: int) -> None:
    """End the program if there are not so many cores."""
    if not 1 <= threads <= _cores():
        parser.error(f"--threads {threads} must lie in 1 to {_cores()}, the cores here")


def require_at_least_one(parser: argparse.ArgumentParser, **counts: int) -> None:
    """End the program if one of the options, given by name, is 0 or less."""
    for name, count in counts.items():
        if count < 1:
            parser.error(f"--{name.replace('_', '-')} is {count}; at least 1 is needed")


def _cores() -> int:
    return len(os.sched_getaffinity(0))
