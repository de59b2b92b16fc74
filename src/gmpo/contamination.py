"""Whether training texts hold the items of evaluation suites, by runs of words."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gmpo.errors import DataError
from gmpo.records import Prompt

__all__ = [
    "Contamination",
    "HeldItem",
    "Match",
    "TrainingText",
    "find_contamination",
    "items_in_rows",
    "words",
]

_LONG_RUN = 13
"""Words in a run, as in GPT-3's check (arXiv 2005.14165, appendix C)."""
_SHORT_RUN = 8
"""Words in a run for an item with fewer than `_LONG_RUN` words."""

_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True, kw_only=True)
class TrainingText:
    """One training row's text, and what to call it."""

    id: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Match:
    """An item that training texts hold, in whole or in part.

    Attributes:
        item_id: of the suite.
        num_words: of the item.
        coverage: share of the item's runs that the training row named has, over 0: 1 is a copy,
            little is mostly a phrase of the field.
        training_id: the training row that has most of them.
        num_rows: training rows that have at least one.
        excerpt: one run that both have.
    """

    item_id: str
    num_words: int
    coverage: float
    training_id: str
    num_rows: int
    excerpt: str

    @property
    def is_whole(self) -> bool:
        """Whether the row has every run of the item, so nothing of it is new."""
        return self.coverage == 1.0


@dataclass(frozen=True, kw_only=True)
class Contamination:
    """What was found of one suite; items of which most was found come first."""

    suite: str
    title: str
    num_items: int
    matches: tuple[Match, ...]

    def as_dict(self) -> dict[str, Any]:
        """All of it for JSON."""
        matches = [asdict(match) | {"whole": match.is_whole} for match in self.matches]
        return {
            "suite": self.suite,
            "items": self.num_items,
            "found": len(self.matches),
            "matches": matches,
        }


@dataclass(frozen=True, kw_only=True)
class HeldItem:
    """The item of which a training row has most.

    Attributes:
        suite: short name.
        item_id: of the suite.
        coverage: share of the item's runs that the row has, over 0 up to 1.
        excerpt: one run that both have.
    """

    suite: str
    item_id: str
    coverage: float
    excerpt: str


def words(text: str) -> list[str]:
    """The text's words and numbers in lower case; punctuation and signs are left out."""
    return _WORD.findall(text.casefold())


def find_contamination(
    suites: Sequence[tuple[str, str, Sequence[Prompt]]], training: Iterable[TrainingText]
) -> list[Contamination]:
    """Items of suites of which a run of words occurs in a training text.

    A run is 13 words, for items with fewer than 13 words 8, and for items with fewer than 8 all
    of them. It finds copies and quotations, also inside longer texts. It does not find what was
    reworded or translated, nor the same problem with other numbers unless 13 words between two
    numbers stay; and a phrase of the field that 13 words long stands in both is found too, so
    read the excerpt.

    Args:
        suites: short name, title and items of each; the items without an instruction.
        training: each row once; read one at a time.

    Raises:
        DataError: there is no training text.
    """
    runs_of = _runs_of_items(suites)
    search = _Search(runs_of)
    hits: dict[tuple[str, str], list[tuple[str, set[tuple[str, ...]]]]] = defaultdict(list)
    is_empty = True
    for row in training:
        is_empty = False
        for item, shared in search.shared(row.text).items():
            hits[item].append((row.id, shared))
    if is_empty:
        raise DataError("there is no training text to check; name data with at least one row")
    return [
        Contamination(
            suite=suite,
            title=title,
            num_items=len(prompts),
            matches=tuple(
                sorted(
                    (
                        _match(prompt, runs_of[suite, prompt.id], hits[suite, prompt.id])
                        for prompt in prompts
                        if (suite, prompt.id) in hits
                    ),
                    key=lambda match: -match.coverage,
                )
            ),
        )
        for suite, title, prompts in suites
    ]


def items_in_rows(
    suites: Sequence[tuple[str, str, Sequence[Prompt]]], training: Iterable[TrainingText]
) -> dict[str, HeldItem]:
    """By id, the training rows that hold an item or part of one: `find_contamination` by row.

    Args:
        suites: as for `find_contamination`.
        training: each row once, each with an id of its own.
    """
    runs_of = _runs_of_items(suites)
    search = _Search(runs_of)
    held: dict[str, HeldItem] = {}
    for row in training:
        shared = search.shared(row.text)
        if not shared:
            continue
        item = max(shared, key=lambda one: (len(shared[one]) / len(runs_of[one]), one))
        held[row.id] = HeldItem(
            suite=item[0],
            item_id=item[1],
            coverage=len(shared[item]) / len(runs_of[item]),
            excerpt=" ".join(min(shared[item])),
        )
    return held


def _runs_of_items(
    suites: Sequence[tuple[str, str, Sequence[Prompt]]],
) -> dict[tuple[str, str], set[tuple[str, ...]]]:
    return {
        (suite, prompt.id): _runs(words(_problem(prompt)))
        for suite, _, prompts in suites
        for prompt in prompts
    }


class _Search:
    """Which items hold a run, so that a text is read once for all of them."""

    def __init__(self, runs_of: dict[tuple[str, str], set[tuple[str, ...]]]) -> None:
        self._holders: dict[tuple[str, ...], list[tuple[str, str]]] = defaultdict(list)
        for item, runs in runs_of.items():
            for run in runs:
                self._holders[run].append(item)
        self._lengths = sorted({len(run) for run in self._holders})

    def shared(self, text: str) -> dict[tuple[str, str], set[tuple[str, ...]]]:
        """By item, the runs that a text has too."""
        found = words(text)
        shared: dict[tuple[str, str], set[tuple[str, ...]]] = defaultdict(set)
        for size in self._lengths:
            for start in range(len(found) - size + 1):
                run = tuple(found[start : start + size])
                for item in self._holders.get(run, ()):
                    shared[item].add(run)
        return shared


def _problem(prompt: Prompt) -> str:
    turns = [message.content for message in prompt.messages or () if message.role == "user"]
    return "\n".join(turns) or prompt.text or ""


def _runs(found: Sequence[str]) -> set[tuple[str, ...]]:
    """All different runs of an item's words, of the length that its own length asks for."""
    size = _LONG_RUN if len(found) >= _LONG_RUN else min(_SHORT_RUN, len(found))
    if not size:
        return set()
    return {tuple(found[start : start + size]) for start in range(len(found) - size + 1)}


def _match(
    prompt: Prompt,
    runs: set[tuple[str, ...]],
    hits: Sequence[tuple[str, set[tuple[str, ...]]]],
) -> Match:
    training_id, shared = max(hits, key=lambda hit: len(hit[1]))
    counts = Counter(run for _, found in hits for run in found)
    # The rarest shared run says more than a phrase that many rows have.
    excerpt = min(shared, key=lambda run: (counts[run], run))
    return Match(
        item_id=prompt.id,
        num_words=len(words(_problem(prompt))),
        coverage=len(shared) / len(runs),
        training_id=training_id,
        num_rows=len(hits),
        excerpt=" ".join(excerpt),
    )
