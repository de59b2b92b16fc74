"""What a process of gmpo needs that starts a server of gmpo's, or asks one: packages, and a key."""

from __future__ import annotations

import os
from importlib.util import find_spec

from gmpo.errors import DependencyError

__all__ = ["API_KEYS", "own_api_key", "require_serving"]

API_KEYS = "GMPO_API_KEYS"
"""Environment variable with the keys that a server's clients may use, separated by commas."""
_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")


def own_api_key() -> str | None:
    """The key that gmpo's processes send to each other: the first of `API_KEYS`, if any."""
    keys = (key.strip() for key in os.environ.get(API_KEYS, "").split(","))
    return next((key for key in keys if key), None)


def require_serving(what: str) -> None:
    """Refuse what starts a server where the extra `serve` is not installed.

    Args:
        what: needs it, as the error begins: "gmpo serve".

    Raises:
        DependencyError: a package is missing; it is named.
    """
    for package in _PACKAGES:
        if find_spec(package) is None:
            raise DependencyError(
                f"{what} needs {package}; install it with pip install 'gmpo[serve]'"
            )
