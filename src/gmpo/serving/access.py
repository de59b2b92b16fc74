"""API keys: who may ask, and how often one may guess."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

from gmpo.errors import ConfigError
from gmpo.own_servers import API_KEYS

__all__ = ["ApiKeys", "WrongKeys", "read_api_keys"]


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


class WrongKeys:
    """How many wrong keys each address has sent of late; after too many it has to wait.

    It remembers so many addresses and no more: the one that began first is forgotten, and counted
    if it had not waited to its end. All addresses of an IPv6 network of 64 bits are one, because
    one client has them all.

    Args:
        most: wrong keys that an address may send within the time.
        seconds: the time, from the first of them; then the address begins anew.
        max_addresses: that are remembered.
    """

    def __init__(self, *, most: int, seconds: float, max_addresses: int = 4096) -> None:
        self._most = most
        self._seconds = seconds
        self._max_addresses = max_addresses
        # How many, and when that is forgotten; the soonest first, because all last equally long.
        self._sent: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self.num_forgotten = 0
        """Addresses forgotten before their time, to make room."""

    def seconds_left(self, address: str, *, now: float) -> float:
        """How long an address has to wait; 0 if it may send a key.

        Args:
            address: of the client.
            now: monotonic seconds.
        """
        count, until = self._sent.get(_network(address), (0, 0.0))
        return max(0.0, until - now) if count >= self._most else 0.0

    def note(self, address: str, *, now: float) -> None:
        """Count a wrong key; the arguments are those of `seconds_left`."""
        network = _network(address)
        count, until = self._sent.get(network, (0, 0.0))
        if until > now:
            self._sent[network] = (count + 1, until)
            return
        self._sent.pop(network, None)
        self._sent[network] = (1, now + self._seconds)
        if len(self._sent) > self._max_addresses:
            _, (_, until) = self._sent.popitem(last=False)
            self.num_forgotten += until > now


def _network(address: str) -> str:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address  # a socket's path, or none
    if found.version == 4:
        return address
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.ip_network((int(found) >> 64 << 64, 64)))


def read_api_keys(file: Path | None) -> ApiKeys:
    """Keys from a file, one a line (`#` begins a comment), or else from GMPO_API_KEYS.

    Raises:
        ConfigError: both are given, the file cannot be read, or there is no key in what is given.
    """
    variable = os.environ.get(API_KEYS)
    if file is None:
        keys = [key.strip() for key in (variable or "").split(",")]
        if variable and not any(keys):
            # Whoever sets it wants keys; serving everybody would be the opposite.
            raise ConfigError(
                f"{API_KEYS} is {variable!r}, which holds no key; separate keys by commas, or "
                "unset it to let everybody ask"
            )
        return ApiKeys(key for key in keys if key)
    if variable:
        raise ConfigError(f"keys come from {API_KEYS} or from --api-keys, not from both; take one")
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
