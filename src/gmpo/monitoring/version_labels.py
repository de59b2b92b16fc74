"""Labels of model versions for figures: as many values as memory has room for, and no more."""

from __future__ import annotations

__all__ = ["OTHER", "VersionLabels"]

OTHER = "other"
"""Stands for every version beyond those that have a label of their own."""


class VersionLabels:
    """The first versions keep their names; those that come later share one.

    A version may be what a server says of itself, and a server may say something else with each
    answer: each would begin series that stay until the process ends.

    Args:
        most: versions with a label of their own.
    """

    def __init__(self, *, most: int = 64) -> None:
        self._most = most
        self._known: set[str] = set()
        self.num_folded = 0
        """Answers that were counted under the shared label."""

    def counted(self, version: str | None) -> str | None:
        """The label of an answer's version, which is counted if it is the shared one."""
        label = self.label(version)
        self.num_folded += label != version
        return label

    def label(self, version: str | None) -> str | None:
        """The label of a version; None stays None."""
        if version is None or version in self._known:
            return version
        if len(self._known) == self._most:
            return OTHER
        self._known.add(version)
        return version
