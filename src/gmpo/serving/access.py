"""API keys: who may ask."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable
from pathlib import Path

from gmpo.errors import ConfigError

__all__ = ["ApiKeys", "read_api_keys"]

_VARIABLE = "GMPO_API_KEYS"


class ApiKeys:
    """The keys that are accepted; only their digests are kept.

    Args:
        keys: none of them empty; without any, everybody may ask.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accept(self, key: bytes) -> bool:
        """Whether it is one of them; takes equally long for each key of one length."""
        digest = _digest(key)
        # All are compared: stopping at the first would tell which one it was.
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0


def read_api_keys(file: Path | None) -> ApiKeys:
    """Keys from a file, one a line (`#` begins a comment), or else from GMPO_API_KEYS.

    Raises:
        ConfigError: both are given, the file cannot be read, or there is no key in what is given.
    """
    variable = os.environ.get(_VARIABLE)
    if file is None:
        keys = [key.strip() for key in (variable or "").split(",")]
        if variable and not any(keys):
            # Whoever sets it wants keys; serving everybody would be the opposite.
            raise ConfigError(
                f"{_VARIABLE} is {variable!r}, which holds no key; separate keys by commas, or "
                "unset it to let everybody ask"
            )
        return ApiKeys(key for key in keys if key)
    if variable:
        raise ConfigError(f"keys come from {_VARIABLE} or from --api-keys, not from both; take one")
    try:
        # Some editors begin a file with a mark, which would become part of the first key.
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the file of API keys cannot be read: {error}; name a text file with one key a line"
        ) from None
    keys = [line.strip() for line in lines if not line.lstrip().startswith("#")]
    found = [key for key in keys if key]
    if not found:
        raise ConfigError(
            f"{file} has no API key; write one a line, or leave --api-keys out to let everybody ask"
        )
    return ApiKeys(found)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
