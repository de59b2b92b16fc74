"""Options that several scripts take, their refusals, and how a benchmark says that it failed."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence

from gmpo.errors import GmpoError

__all__ = [
    "BenchmarkError",
    "add_threads",
    "ends_clearly",
    "require_at_least_one",
    "require_threads",
]

_Main = Callable[..., int]


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
