"""Options that several scripts take, and their refusals."""

from __future__ import annotations

import argparse
import os

__all__ = ["add_threads", "require_at_least_one", "require_threads"]


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
