"""What a batch of rows is like, and whether it differs from earlier ones."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal

import numpy as np

from gmpo.errors import DataError
from gmpo.statistics import holm

__all__ = [
    "DataProfile",
    "DisputeTest",
    "ShiftFigure",
    "dispute_test",
    "main_script",
    "measure_shift",
    "merged_profile",
]

_RESAMPLES = 4_999
_BINS = 10
_RARE = 5
"""Levels with fewer rows on both sides together are taken as one."""
_NO_LETTERS = "none"


@dataclass(frozen=True, kw_only=True)
class DataProfile:
    """Figures of a batch's rows, in one order; enough to compare later batches with it.

    Attributes:
        lengths: words of each row's problem.
        scripts: each problem's main script, "LATIN", "HANGUL", ...; "none" without letters.
        categories: each row's category; None where it has none.
        pass_rates: share of each row's sampled completions that were right; empty if no model was
            asked.
        num_agreed: rows of which most samples gave one and the same answer.
        num_disputed: of these, rows whose given answer is another one.
    """

    lengths: tuple[int, ...]
    scripts: tuple[str, ...]
    categories: tuple[str | None, ...]
    pass_rates: tuple[float, ...] = ()
    num_agreed: int = 0
    num_disputed: int = 0

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> DataProfile:
        """A profile as `as_dict` gave it.

        Raises:
            DataError: it is not one.
        """
        try:
            return cls(
                lengths=tuple(map(int, record["lengths"])),
                scripts=tuple(map(str, record["scripts"])),
                categories=tuple(record["categories"]),
                pass_rates=tuple(map(float, record["pass_rates"])),
                num_agreed=int(record["num_agreed"]),
                num_disputed=int(record["num_disputed"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"this is no profile of a batch ({type(error).__name__}: {error}); check the data "
                "that it is of again"
            ) from None


@dataclass(frozen=True, kw_only=True)
class ShiftFigure:
    """How one figure of the rows differs from earlier data.

    Attributes:
        name: "length", "script", "category" or "difficulty".
        psi: population stability index, sum of (p - q) ln(p / q) over bins, with half a row added
            to each bin; 0 for equal shares.
        p_value: share of random divisions of all rows with an index at least as large, after Holm
            for all figures.
        num_new: rows of the batch.
        num_earlier: rows it is compared with.
        is_alarm: whether it is both larger than chance and large.
        sentence: what moved most.
    """

    name: Literal["length", "script", "category", "difficulty"]
    psi: float
    p_value: float
    num_new: int
    num_earlier: int
    is_alarm: bool
    sentence: str


@dataclass(frozen=True, kw_only=True)
class DisputeTest:
    """Whether more given answers are disputed than in earlier data.

    Attributes:
        num_disputed: rows of which most samples agree on another answer than the one given.
        num_agreed: rows of which most samples agree.
        earlier_disputed: the same of earlier data.
        earlier_agreed: the same of earlier data.
        p_value: of Fisher's exact test that the share has not risen.
        is_alarm: whether it has.
    """

    num_disputed: int
    num_agreed: int
    earlier_disputed: int
    earlier_agreed: int
    p_value: float
    is_alarm: bool


def main_script(text: str) -> str:
    """The script of most of a text's letters, as Unicode names it; "none" without letters."""
    scripts = Counter(_script(letter) for letter in text if letter.isalpha())
    # Of equally many the first in the alphabet, so that the order of letters changes nothing.
    return min(scripts, key=lambda script: (-scripts[script], script)) if scripts else _NO_LETTERS


@cache
def _script(letter: str) -> str:
    return unicodedata.name(letter, "UNKNOWN").partition(" ")[0]


def merged_profile(profiles: Sequence[DataProfile]) -> DataProfile:
    """Several batches as one.

    Raises:
        DataError: there is none.
    """
    if not profiles:
        raise DataError("there is no profile to merge; give at least one")
    return DataProfile(
        lengths=tuple(value for one in profiles for value in one.lengths),
        scripts=tuple(value for one in profiles for value in one.scripts),
        categories=tuple(value for one in profiles for value in one.categories),
        pass_rates=tuple(value for one in profiles for value in one.pass_rates),
        num_agreed=sum(one.num_agreed for one in profiles),
        num_disputed=sum(one.num_disputed for one in profiles),
    )


def measure_shift(
    new: DataProfile, earlier: DataProfile, *, alpha: float, least_psi: float, seed: int = 0
) -> tuple[ShiftFigure, ...]:
    """Each figure of new rows against that of earlier ones.

    Numbers are cut at the deciles of all rows together. The p value is that of a permutation test
    of the index itself, so that it holds for any number of rows and bins: the chance that any
    figure of a batch like the earlier data alarms is at most `alpha`. The index alone has no such
    rate: of 100 rows in ten bins it passes 0.1 more often than not.

    Args:
        new: of the batch.
        earlier: of what it is compared with.
        alpha: chance of a false alarm, over all figures of a batch.
        least_psi: smallest index that alarms; 0.1 is usually called a small shift, 0.25 a large.
        seed: of the permutations.

    Returns:
        The figures that both sides have, in their order.
    """
    sides: list[tuple[Literal["length", "script", "category", "difficulty"], Any, Any]] = []
    if new.lengths and earlier.lengths:
        sides += [
            ("length", new.lengths, earlier.lengths),
            ("script", new.scripts, earlier.scripts),
        ]
    if any(new.categories) and any(earlier.categories):
        sides.append(("category", new.categories, earlier.categories))
    if new.pass_rates and earlier.pass_rates:
        sides.append(("difficulty", new.pass_rates, earlier.pass_rates))
    generator = np.random.default_rng(seed)
    measured = []
    for name, mine, theirs in sides:
        labels, counts = _binned(mine, theirs, is_number=name in ("length", "difficulty"))
        measured.append((name, labels, counts, *_permuted(counts, generator)))
    adjusted = holm([p_value for *_, p_value in measured]) if measured else []
    return tuple(
        ShiftFigure(
            name=name,
            psi=psi,
            p_value=p_value,
            num_new=int(counts[0].sum()),
            num_earlier=int(counts[1].sum()),
            is_alarm=p_value <= alpha and psi >= least_psi,
            sentence=_moved_most(name, labels, counts),
        )
        for (name, labels, counts, psi, _), p_value in zip(measured, adjusted, strict=True)
    )


def dispute_test(new: DataProfile, earlier: DataProfile, *, alpha: float) -> DisputeTest | None:
    """Whether the share of disputed answers among agreed ones has risen.

    Args:
        new: of the batch.
        earlier: of data whose answers are trusted, asked of the same model or a like one.
        alpha: chance of a false alarm.

    Returns:
        The test; None where samples agreed on no row of one side, or no model was asked.
    """
    if not new.num_agreed or not earlier.num_agreed:
        return None
    from scipy.stats import fisher_exact

    table = [
        [new.num_disputed, new.num_agreed - new.num_disputed],
        [earlier.num_disputed, earlier.num_agreed - earlier.num_disputed],
    ]
    p_value = float(fisher_exact(table, alternative="greater").pvalue)
    return DisputeTest(
        num_disputed=new.num_disputed,
        num_agreed=new.num_agreed,
        earlier_disputed=earlier.num_disputed,
        earlier_agreed=earlier.num_agreed,
        p_value=p_value,
        is_alarm=p_value <= alpha,
    )


def _binned(
    mine: Sequence[Any], theirs: Sequence[Any], *, is_number: bool
) -> tuple[list[str], np.ndarray]:
    """Names of bins, and rows in them, [2, bins]; a bin depends on all rows, not on their side."""
    if is_number:
        pooled = np.asarray([*mine, *theirs], dtype=float)
        edges = np.unique(np.quantile(pooled, np.linspace(0, 1, _BINS + 1)[1:-1]))
        places = np.searchsorted(edges, pooled, side="left")
        names = [f"up to {edge:g}" for edge in edges] + [f"above {edges[-1]:g}"]
    else:
        levels = [str(value) for value in (*mine, *theirs)]
        counts = Counter(levels)
        kept = sorted(level for level, count in counts.items() if count >= _RARE)
        names = [*kept, "others"]
        place_of = {level: place for place, level in enumerate(kept)}
        places = np.asarray([place_of.get(level, len(kept)) for level in levels])
    rows = np.stack(
        [
            np.bincount(side, minlength=len(names))
            for side in (places[: len(mine)], places[len(mine) :])
        ]
    )
    filled = rows.sum(axis=0) > 0
    return [name for name, keep in zip(names, filled, strict=True) if keep], rows[:, filled]


def _permuted(counts: np.ndarray, generator: np.random.Generator) -> tuple[float, float]:
    """The index, and how often rows divided at random have at least that."""
    pooled = counts.sum(axis=0)
    psi = float(_index(counts[0], pooled - counts[0]))
    drawn = generator.multivariate_hypergeometric(
        pooled, int(counts[0].sum()), size=_RESAMPLES, method="marginals"
    )
    # Rounding must not make an equal index smaller.
    at_least = int((_index(drawn, pooled - drawn) >= psi - 1e-12).sum())
    return psi, (at_least + 1) / (_RESAMPLES + 1)


def _index(new: np.ndarray, earlier: np.ndarray) -> np.ndarray:
    p = (new + 0.5) / (new + 0.5).sum(axis=-1, keepdims=True)
    q = (earlier + 0.5) / (earlier + 0.5).sum(axis=-1, keepdims=True)
    index: np.ndarray = ((p - q) * np.log(p / q)).sum(axis=-1)
    return index


def _moved_most(name: str, labels: Sequence[str], counts: np.ndarray) -> str:
    shares = counts / counts.sum(axis=1, keepdims=True)
    place = int(np.argmax(np.abs(shares[0] - shares[1])))
    return (
        f"{name} {labels[place]}: {100 * shares[0, place]:.0f} % of the new rows, "
        f"{100 * shares[1, place]:.0f} % of the earlier ones"
    )
