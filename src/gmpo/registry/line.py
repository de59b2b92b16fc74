"""Which versions serve, served before, and could serve again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gmpo.store import Champion

__all__ = ["ROLLBACK", "nearest_whole", "serving_line"]

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


def nearest_whole(
    line: Sequence[str], *, is_whole: Callable[[str], bool]
) -> tuple[str | None, list[str]]:
    """The last version of a line whose files are whole, and the damaged ones after it.

    Args:
        line: of versions, the last one nearest.
        is_whole: reads a version's files.
    """
    damaged: list[str] = []
    for version in dict.fromkeys(reversed(line)):
        if is_whole(version):
            return version, damaged
        damaged.append(version)
    return None, damaged
