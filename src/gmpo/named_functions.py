"""Functions named "module:function" in a recipe, found on the import path or in this folder."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable
from operator import attrgetter
from typing import Any

from gmpo.errors import ConfigError

__all__ = ["load_function", "reference_of"]


def load_function(reference: str, *, key: str) -> Callable[..., Any]:
    """The function that `reference`, "module:function", names.

    The current folder is put first on the import path and stays there, because the module may
    import its neighbours later.

    Args:
        reference: as written in a recipe; dots after the colon lead into classes.
        key: the recipe's key, for errors.

    Raises:
        ConfigError: the module cannot be imported, has no such name, or that is no function.
    """
    module_name, colon, path = reference.partition(":")
    if not (module_name and colon and path):
        raise ConfigError(f"{key} = {reference!r}: it must be 'module:function'")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"{key} = {reference!r}: importing {module_name!r} raised {type(error).__name__}: "
            f"{error}; modules are looked for in {here} and on Python's path"
        ) from error
    try:
        function = attrgetter(path)(module)
    except AttributeError:
        public = [name for name, value in vars(module).items() if callable(value)]
        near = difflib.get_close_matches(path, public, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{key} = {reference!r}: {module_name!r} has no {path!r}{hint}") from None
    if not callable(function):
        raise ConfigError(
            f"{key} = {reference!r}: it is {type(function).__name__}; it must be a function"
        )
    loaded: Callable[..., Any] = function
    return loaded


def reference_of(function: Callable[..., Any]) -> str:
    """How a recipe records a function that was handed over as an object."""
    named = function if isinstance(function, type(reference_of)) else type(function)
    return f"{named.__module__}:{named.__qualname__}"
