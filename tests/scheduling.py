"""Which tests run on one worker: those of a file, and all of the files with the real model."""

from __future__ import annotations

import functools
from pathlib import Path

from xdist.scheduler import LoadScopeScheduling

REPOSITORY = Path(__file__).resolve().parents[1]
REAL_MODEL = "the real model"


@functools.cache
def scope_of_file(name: str) -> str:
    """The file itself; or one scope for all of the real model, of which two would not fit."""
    holds_real_model = "pytest.mark.real_model" in (REPOSITORY / name).read_text(encoding="utf-8")
    return REAL_MODEL if holds_real_model else name


class FileScheduling(LoadScopeScheduling):
    """A file at a time to the worker that is free, so that a file's fixtures are made once.

    With pytest 9 xdist 3.8 does not see its own marks of groups any more.
    """

    def _split_scope(self, nodeid: str) -> str:
        return scope_of_file(nodeid.partition("::")[0])
