"""Ways out of damage, as commands that a person can give; words in capitals are to be put in."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from gmpo.shown_urls import store_option
from gmpo.store import Store

__all__ = ["Commands", "commands_for", "way_out"]


@dataclass(frozen=True, kw_only=True)
class Commands:
    """Commands about one model in one store.

    Attributes:
        add: restores a version's files from a model of the same weights, or registers another one.
        adopt: makes a first champion.
        replace: puts a version in place of a champion whose files are gone, as those before it are.
        rollback: makes the nearest whole version before the champion serve.
    """

    add: str
    adopt: str
    replace: str
    rollback: str


def commands_for(store: Store, name: str) -> Commands:
    """The commands, with the store and, where it is not beside it, the folder of the versions.

    Args:
        store: that holds the model.
        name: of the model.
    """
    model = shlex.quote(name)
    options = store_option(store.where)
    versions = store.model_versions(name)
    folder = str(Path(versions[-1].path).parent) if versions else None
    if "://" in store.where:
        options += f" --folder {'FOLDER' if folder is None else shlex.quote(folder)}"
    elif folder is not None and folder != str(Path(store.where).resolve().parent / "models"):
        options += f" --folder {shlex.quote(folder)}"
    adopt = f"gmpo registry adopt {model} VERSION{options}"
    return Commands(
        add=f"gmpo registry add MODEL --name {model}{options}",
        adopt=adopt,
        replace=f"{adopt} --reason WHY",
        rollback=f"gmpo registry rollback {model}{options} --reason WHY",
    )


def way_out(commands: Commands, *, instead: str | None) -> str:
    """What to do about a champion whose files are damaged, for the end of a sentence.

    Args:
        commands: about its model.
        instead: whole version before it; None if there is none.
    """
    restore = f"restore the files from the model that it was added from ({commands.add})"
    if instead is not None:
        return f"{restore}, or go back to version {instead} ({commands.rollback})"
    return (
        f"{restore}, or, where they are gone for good, put another version in its place "
        f"({commands.replace})"
    )
