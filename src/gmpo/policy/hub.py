"""Names of models that are no folder: refused at once, or after one short question to the hub.

Loaders ask the hub for several files, each several times with growing pauses, before they say that
it cannot be reached; a mistyped name would wait half a minute for its error.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path

import httpx2
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
)

__all__ = ["near_names", "why_unknown"]

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*\w")
_HUB_SECONDS = 5.0
"""Longest time for a connection to the hub, and for its answer."""
_MODEL_FILES = ("config.json", "adapter_config.json", "recipe.toml")


def why_unknown(name: str) -> str | None:
    """Why no model has this name; None for a folder, and for what the hub or its cache has.

    The hub is asked only for names that are of its form, OWNER/NAME, and not in the local cache.
    """
    if name and Path(name).is_dir():
        return None
    if Path(name).is_file():
        return f"it is a file; give the folder {str(Path(name).parent)!r} if the model lies there"
    if name and not name.endswith("/") and _is_cached(name):
        return None
    if not _HUB_NAME.fullmatch(name):
        return "there is no such folder, and names of the hub are OWNER/NAME"
    if constants.is_offline_mode():
        return (
            "there is no such folder, HF_HUB_OFFLINE is set, and the local hub cache "
            f"{constants.HF_HUB_CACHE} does not hold it; unset HF_HUB_OFFLINE to have it loaded"
        )
    return _asked(name)


def near_names(name: str, known: Iterable[str]) -> list[str]:
    """At most three of the known names, and of the folders beside it, that look like this one."""
    if Path(name).is_dir():  # it is there, and something else is wrong with it
        return []
    beside = Path(name).parent
    folders: list[str] = []
    if beside.is_dir() and os.access(beside, os.R_OK):
        folders = [
            str(beside / one.name)
            for one in sorted(beside.iterdir())
            if any((one / file).is_file() for file in _MODEL_FILES)
        ]
    return difflib.get_close_matches(name, [*known, *folders], n=3)


def _is_cached(name: str) -> bool:
    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except ValueError:  # it is no name that the hub could have
        return False


def _asked(name: str) -> str | None:
    """What the hub says against it."""
    hub = constants.ENDPOINT
    try:
        url = hf_hub_url(name, "config.json", endpoint=hub)
        get_hf_file_metadata(url, timeout=_HUB_SECONDS)
    except EntryNotFoundError:
        return None  # the model is there; what it lacks is the loader's to say
    except GatedRepoError:
        return f"{hub} gives it only to those who accepted its terms; accept them, and set HF_TOKEN"
    except RepositoryNotFoundError:
        return f"there is no such folder, and {hub} has no such model that is open to you"
    except httpx2.RequestError as error:
        return (
            f"there is no such folder, and the hub {hub} cannot be reached "
            f"({type(error).__name__}, after at most {_HUB_SECONDS:g} seconds to connect); mend "
            "the network, or set HF_HUB_OFFLINE=1 to work with local models alone"
        )
    except (HfHubHTTPError, ValueError) as error:
        return f"there is no such folder, and {hub} answers: {str(error).strip().splitlines()[0]}"
    return None
