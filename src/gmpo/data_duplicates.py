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
        from datasketch import MinHashLSH

        self._least_overlap = least_overlap
        self._exact: dict[str, _Entry] = {}
        self._near: dict[str, _Entry] = {}
        self._search: Any = None
        if least_overlap is not None:
            threshold = max(0.05, least_overlap - _SEARCH_MARGIN)
            self._search = MinHashLSH(
                threshold=threshold, num_perm=_PERMUTATIONS, weights=_SEARCH_WEIGHTS
            )

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
        entry = _Entry(key, answer, tuple(sorted(_NUMBER.findall(text))), _runs(text))
        if self._least_overlap is not None:
            hashed = _hashed(entry.runs)
            near = self._nearest(entry, hashed, self._least_overlap)
            if near is not None:
                return near
            self._search.insert(key, hashed, check_duplication=False)
            self._near[key] = entry
        self._exact[digest] = entry
        return None

    def _nearest(self, entry: _Entry, hashed: Any, least_overlap: float) -> Duplicate | None:
        best: Duplicate | None = None
        for key in sorted(self._search.query(hashed)):
            other = self._near[key]
            if (other.answer, other.numbers) != (entry.answer, entry.numbers):
                continue
            overlap = len(entry.runs & other.runs) / len(entry.runs | other.runs)
            if overlap >= least_overlap and (best is None or overlap > best.overlap):
                best = Duplicate(kind="near", key=key, overlap=overlap)
        return best


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
