"""URLs in messages, redacted: they may hold passwords and keys, which are not repeated."""

from __future__ import annotations

import shlex
from pathlib import Path
from urllib.parse import urlsplit

__all__ = ["shown_url", "store_option", "without_url"]


def shown_url(url: str) -> str:
    """Scheme, host and port; user info, path and query may be secrets and are left out."""
    try:
        parts = urlsplit(url)
        port = "" if parts.port is None else f":{parts.port}"
    except ValueError:
        return "a URL that cannot be read"
    if not parts.scheme or not parts.hostname:
        return "a URL without a host"
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}{port}"


def without_url(text: str, url: str) -> str:
    """What another program said about a URL, with no part of it that may be a secret.

    Args:
        text: that may repeat the URL, its user info, path or query.
        url: as it was given.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        return text.replace(url, "***")
    info, at, _ = parts.netloc.rpartition("@")
    query = f"?{parts.query}" if parts.query else ""
    for secret in (url, info + at, parts.path.rstrip("/"), query):
        if secret:
            text = text.replace(secret, "***")
    return text


def store_option(where: str) -> str:
    """Option of a command, with a space before it; STORE stands for a URL that has a password.

    Args:
        where: of the store, as `gmpo.store.Store.where`.
    """
    if "://" not in where:
        return f" --store {shlex.quote(str(Path(where).resolve()))}"
    return " --store " + ("STORE" if "***" in where else shlex.quote(where))
