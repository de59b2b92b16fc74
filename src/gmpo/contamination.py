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

_TEMPLATE_SHARE = 0.2
"""Share of a suite's items above which a run that they have is their template's, not an item's."""
_LEAST_TEMPLATE_ITEMS = 10
"""Items that have a template's run, at least: a few near copies in a small suite are items."""

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
    """What was found of one suite; items of which most was found come first.

    Attributes:
        suite: short name.
        title: of the suite.
        num_items: that were looked for.
        matches: items that training texts hold.
        template: runs of words that more than a fifth of the items have, which were not looked for.
    """

    suite: str
    title: str
    num_items: int
    matches: tuple[Match, ...]
    template: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """All of it for JSON."""
        matches = [asdict(match) | {"whole": match.is_whole} for match in self.matches]
        return {
            "suite": self.suite,
            "items": self.num_items,
            "found": len(self.matches),
            "template": list(self.template),
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
    read the excerpt. Runs that more than a fifth of a suite's items have, and ten of them at least,
    are its template's, as an instruction that all repeat is: they tell no item from another and
    are looked for only where an item has no other.

    Args:
        suites: short name, title and items of each; the items without an instruction.
        training: each row once; read one at a time.

    Raises:
        DataError: there is no training text.
    """
    runs_of, templates = _runs_of_items(suites)
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
            template=tuple(sorted(" ".join(run) for run in templates[suite])),
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
    runs_of, _ = _runs_of_items(suites)
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


_Run = tuple[str, ...]


def _runs_of_items(
    suites: Sequence[tuple[str, str, Sequence[Prompt]]],
) -> tuple[dict[tuple[str, str], set[_Run]], dict[str, set[_Run]]]:
    """Runs to look for, by suite and item, and by suite those of its items' template."""
    runs_of: dict[tuple[str, str], set[_Run]] = {}
    templates: dict[str, set[_Run]] = {}
    for suite, _, prompts in suites:
        runs = {prompt.id: _runs(words(_problem(prompt))) for prompt in prompts}
        template = _template(list(runs.values()))
        left_out: set[_Run] = set()
        for item, of_item in runs.items():
            own = of_item - template
            runs_of[suite, item] = own or of_item
            left_out |= of_item & template if own else set()
        templates[suite] = left_out
    return runs_of, templates


def _template(runs_of_items: Sequence[set[_Run]]) -> set[_Run]:
    """Runs that so many items have that they tell none from another."""
    counts = Counter(run for runs in runs_of_items for run in runs)
    most = max(_TEMPLATE_SHARE * len(runs_of_items), _LEAST_TEMPLATE_ITEMS - 1)
    return {run for run, count in counts.items() if count > most}


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
