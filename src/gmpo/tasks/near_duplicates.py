"""Texts that vary one another: the same words but for numbers, or nearly so."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

__all__ = ["LEAST_OVERLAP", "near_duplicate_groups", "overlaps"]

LEAST_OVERLAP = 0.8
"""Share of the words of the text with fewer from which on two texts are near-duplicates."""

_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
_WORD = re.compile(r"[^\W\d_]+|#")


def near_duplicate_groups(texts: Sequence[str]) -> list[int]:
    """For each text the place of the first text of its group.

    Two texts whose words overlap by `LEAST_OVERLAP` are in one group, and so are two that are
    linked through others.
    """
    linked = overlaps(texts, texts) >= LEAST_OVERLAP
    group = [-1] * len(texts)
    for first in range(len(texts)):
        if group[first] >= 0:
            continue
        group[first], reached = first, [first]
        while reached:
            for other in np.flatnonzero(linked[reached.pop()]).tolist():
                if group[other] < 0:
                    group[other] = first
                    reached.append(other)
    return group


def overlaps(texts: Sequence[str], others: Sequence[str]) -> np.ndarray:
    """Different words that two texts share, over those of the one with fewer; [texts, others].

    Case does not matter, and all numbers are one word. The memory is that of one number a pair.
    """
    words = [_words(text) for text in (*texts, *others)]
    places = {word: place for place, word in enumerate(sorted(set().union(*words)))}
    holds = np.zeros((len(words), len(places)), dtype=np.float32)
    for row, of_text in enumerate(words):
        holds[row, [places[word] for word in of_text]] = 1
    left, right = holds[: len(texts)], holds[len(texts) :]
    fewer = np.minimum(left.sum(axis=1)[:, None], right.sum(axis=1)[None])
    shared: np.ndarray = left @ right.T / np.maximum(fewer, 1)
    return shared


def _words(text: str) -> set[str]:
    return set(_WORD.findall(_NUMBER.sub("#", text.casefold())))
