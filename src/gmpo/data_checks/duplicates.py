"""Rows that say the same: equal texts by digest, nearly equal ones by MinHash."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Duplicate", "TextIndex", "text_digest"]

_PERMUTATIONS = 128
_FEW = 64
"""Texts of one answer and the same numbers that are compared one by one; more are searched."""

_SEARCH_MARGIN = 0.15
_SEARCH_WEIGHTS = (0.05, 0.95)  # of wrong candidates and of missed ones
"""The hashed search looks below the overlap asked for and would rather find too much, because
exact overlap decides: at its own threshold, evenly weighted, it misses about half."""

_NO_SPACES = "\u3040-\u30ff\u3400-\u9fff"  # kana and Chinese signs stand without spaces
_TOKEN = re.compile(rf"[{_NO_SPACES}]|(?:(?![{_NO_SPACES}])[^\W_])+|[-+*/^=<>%\u00d7\u00f7]")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_RUN = 3


@dataclass(frozen=True, kw_only=True)
class Duplicate:
    """An earlier text that a text repeats.

    Attributes:
        kind: "exact"; "near"; or "contradiction", the same text with another answer.
        key: of the earlier text.
        overlap: share of the runs of three words of either that both have; 1 for equal texts.
    """

    kind: Literal["exact", "near", "contradiction"]
    key: str
    overlap: float


@dataclass(frozen=True)
class _Entry:
    key: str
    answer: str
    numbers: tuple[str, ...]
    runs: frozenset[str]


def text_digest(text: str) -> str:
    """SHA-256 of a text; compatibility forms, case and white space make no difference."""
    return hashlib.sha256(_normalized(text).encode()).hexdigest()


class TextIndex:
    """Texts seen so far, and whether another one repeats one of them.

    Texts are equal where `text_digest` is. They are near where their runs of three words overlap
    as much as asked for and they have the same numbers and the same answer: the same story with
    other numbers is another problem.

    Args:
        least_overlap: of near texts, above 0.15 and up to 1 (Jaccard); None looks for equal texts
            only.
    """

    def __init__(self, *, least_overlap: float | None) -> None:
        self._least_overlap = least_overlap
        self._exact: dict[str, _Entry] = {}
        self._groups: dict[tuple[str, tuple[str, ...]], _Group] = {}

    def add(self, key: str, text: str, answers: Sequence[str]) -> Duplicate | None:
        """Look a text up and keep it, unless it repeats one that is kept.

        Args:
            key: no two texts may have the same.
            text: the problem.
            answers: all accepted forms, in any order.

        Returns:
            What it repeats; None if it is new.
        """
        answer = "\n".join(sorted(_normalized(form) for form in answers))
        digest = text_digest(text)
        equal = self._exact.get(digest)
        if equal is not None:
            kind: Literal["exact", "contradiction"]
            kind = "exact" if equal.answer == answer else "contradiction"
            return Duplicate(kind=kind, key=equal.key, overlap=1.0)
        entry = _Entry(key, answer, tuple(sorted(_NUMBER.findall(_normalized(text)))), _runs(text))
        if self._least_overlap is not None:
            # Only these can be near, and there are few of them: rows made by a program have the
            # same words but for their numbers, and each would be compared with each.
            group = self._groups.setdefault((answer, entry.numbers), _Group(self._least_overlap))
            near = group.nearest(entry)
            if near is not None:
                return near
            group.add(entry)
        self._exact[digest] = entry
        return None


class _Group:
    """Texts with one answer and the same numbers."""

    def __init__(self, least_overlap: float) -> None:
        self._least_overlap = least_overlap
        self._entries: list[_Entry] = []
        self._search: Any = None

    def nearest(self, entry: _Entry) -> Duplicate | None:
        best: Duplicate | None = None
        for other in self._candidates(entry):
            overlap = len(entry.runs & other.runs) / len(entry.runs | other.runs)
            if overlap >= self._least_overlap and (best is None or overlap > best.overlap):
                best = Duplicate(kind="near", key=other.key, overlap=overlap)
        return best

    def add(self, entry: _Entry) -> None:
        self._entries.append(entry)
        if self._search is not None:
            self._insert(len(self._entries) - 1)
        elif len(self._entries) > _FEW:
            self._search = _new_search(self._least_overlap)
            for place in range(len(self._entries)):
                self._insert(place)

    def _candidates(self, entry: _Entry) -> list[_Entry]:
        if self._search is None:
            return self._entries
        # In the order of the texts, so that of equally near ones the first is named.
        return [self._entries[place] for place in sorted(self._search.query(_hashed(entry.runs)))]

    def _insert(self, place: int) -> None:
        hashed = _hashed(self._entries[place].runs)
        self._search.insert(place, hashed, check_duplication=False)


def _new_search(least_overlap: float) -> Any:
    from datasketch import MinHashLSH

    threshold = max(0.05, least_overlap - _SEARCH_MARGIN)
    return MinHashLSH(threshold=threshold, num_perm=_PERMUTATIONS, weights=_SEARCH_WEIGHTS)


def _normalized(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _runs(text: str) -> frozenset[str]:
    tokens = _TOKEN.findall(_normalized(text))
    last = max(1, len(tokens) - _RUN + 1)
    return frozenset(" ".join(tokens[start : start + _RUN]) for start in range(last))


def _hashed(runs: frozenset[str]) -> Any:
    from datasketch import MinHash

    hashed = MinHash(num_perm=_PERMUTATIONS, seed=1)
    hashed.update_batch([run.encode() for run in sorted(runs)])
    return hashed
