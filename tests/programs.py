"""Programs that tests start for real; where CI is set, a missing one fails the test."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import pytest

__all__ = ["CHROMIUM", "chromium_or_missing", "missing", "program"]

CHROMIUM = Path("/usr/bin/chromium")


def missing(what: str, *, package: str) -> NoReturn:
    """Skip the test that needs it, or fail where CI is set: a whole check leaves nothing out.

    Args:
        what: is not here.
        package: of Debian and Ubuntu that brings it; `.ci/run` installs it.
    """
    problem = f"there is no {what} here; on Debian and Ubuntu: apt-get install {package}"
    if "CI" in os.environ:
        pytest.fail(problem)
    pytest.skip(problem)


def program(name: str, *, package: str) -> str:
    """The path of the program of that name, which that package of Debian and Ubuntu brings."""
    return shutil.which(name) or missing(name, package=package)


def chromium_or_missing() -> str:
    """The path of the browser that playwright drives."""
    if find_spec("playwright") is None:  # of the tools of developers
        missing("playwright", package="chromium, and pip install playwright")
    if not CHROMIUM.is_file():
        missing(str(CHROMIUM), package="chromium")
    return str(CHROMIUM)
