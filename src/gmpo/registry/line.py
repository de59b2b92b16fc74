"""Which versions serve, served before, and could serve again."""

from __future__ import annotations

from collections.abc import Sequence

from gmpo.store import Champion

__all__ = ["ROLLBACK", "serving_line"]

ROLLBACK = "rollback"
"""Kind of a reason: the version serves again because the one after it was taken back."""


def serving_line(history: Sequence[Champion]) -> list[str]:
    """Versions that stand behind each other, the champion last.

    A rollback takes the versions after its own off the line, so that a second rollback goes further
    back and never to what was taken back: A, then B, then back to A leaves A alone.

    Args:
        history: of one model, oldest first.
    """
    line: list[str] = []
    for row in history:
        if row.reason.get("kind") == ROLLBACK and row.version in line:
            while line[-1] != row.version:
                line.pop()
        else:
            line.append(row.version)
    return line
