"""Intervals and tests on counts, scores and paired differences; numpy and scipy only."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Float
from scipy.special import nctdtr, stdtrit

__all__ = [
    "MOST_PAIRS",
    "McNemar",
    "PairedDifference",
    "average_interval",
    "bootstrap_interval",
    "crossed_interval",
    "detectable_mean",
    "holm",
    "mcnemar",
    "paired_bootstrap",
    "paired_t_interval",
    "pass_at_k",
    "sign_flip_p_value",
    "wilson_interval",
]

_RESAMPLES = 10_000
_SIGN_DRAWS = 99_999
_CELLS_AT_ONCE = 2**21  # drawn places held in memory at a time, 16 MiB


def wilson_interval(
    num_successes: int, num_trials: int, *, confidence: float = 0.95
) -> tuple[float, float]:
    """Wilson's score interval of a success probability, as fractions.

    It keeps its coverage near 0 and 1 and for few trials, where the normal interval does not.

    Raises:
        ValueError: the counts are not 0 <= successes <= trials with at least one trial.
    """
    if not 0 <= num_successes <= num_trials or num_trials == 0:
        raise ValueError(
            f"need 0 <= successes <= trials and at least one trial, got {num_successes} of "
            f"{num_trials}"
        )
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = num_successes / num_trials
    center = share + z * z / (2 * num_trials)
    half = z * math.sqrt(share * (1 - share) / num_trials + z * z / (4 * num_trials**2))
    scale = 1 + z * z / num_trials
    # Rounding must not put the share itself outside: an error bar cannot have a negative length.
    return (
        max(0.0, min(share, (center - half) / scale)),
        min(1.0, max(share, (center + half) / scale)),
    )


def paired_t_interval(
    differences: Sequence[float], *, confidence: float = 0.95
) -> tuple[float, float]:
    """Student's t interval of the mean of paired differences.

    mean +- t(n - 1) * s / sqrt(n). It supposes that the differences are about normal, which a few
    of them cannot show; `sign_flip_p_value` supposes only that they are as often too large as too
    small.

    Raises:
        ValueError: fewer than two differences, or one that is not finite.
    """
    values = _finite_pairs(differences)
    spread = float(values.std(ddof=1)) / math.sqrt(len(values))
    half = float(stdtrit(len(values) - 1, 0.5 + confidence / 2)) * spread
    return float(values.mean()) - half, float(values.mean()) + half


def crossed_interval(
    table: Float[np.ndarray, "rows columns"], *, confidence: float = 0.95
) -> tuple[float, float]:
    """t interval of the mean of a table whose rows and whose columns are both drawn by chance.

    Rows are seeds, say, and columns items: other seeds and other items would have given another
    mean. With R rows, C columns and the sample variances of their means,

        mean +- t(f) * sqrt(a + b),   a = var(row means) / R,   b = var(column means) / C

    and f by Welch and Satterthwaite, (a + b)^2 / (a^2 / (R - 1) + b^2 / (C - 1)). What one row
    does to one column alone is in both terms, so that the interval is too wide by that, never too
    narrow. Without any spread it has no width.

    Args:
        table: one value a row and column, differences of pairs for instance.
        confidence: probability that the interval claims, between 0 and 1.

    Raises:
        ValueError: fewer than two rows or columns, or a value that is not finite.
    """
    if table.ndim != 2 or min(table.shape) < 2 or not np.isfinite(table).all():
        raise ValueError(
            f"need a table of at least two rows and two columns, all finite, got {table.shape}; a "
            "single row or column says nothing about chance"
        )
    rows, columns = table.shape
    of_rows = float(table.mean(axis=1).var(ddof=1)) / rows
    of_columns = float(table.mean(axis=0).var(ddof=1)) / columns
    mean, variance = float(table.mean()), of_rows + of_columns
    if not variance:
        return mean, mean
    freedom = variance**2 / (of_rows**2 / (rows - 1) + of_columns**2 / (columns - 1))
    half = float(stdtrit(freedom, 0.5 + confidence / 2)) * math.sqrt(variance)
    return mean - half, mean + half


def sign_flip_p_value(
    differences: Sequence[float], *, clusters: Sequence[Hashable] | None = None, seed: int = 0
) -> float:
    """Two-sided p of a mean of paired differences, if nothing but chance gave their signs.

    The share of all 2^n choices of signs whose sum is at least as far from 0 as the one seen, n
    those that are not 0. It is never below 2 / 2^n: 1 for one pair, 0.5 for two, 0.0625 for five.
    Differences of one size make it McNemar's exact test, and choices of up to 40 signs are counted
    out. Of more, choices are drawn: (1 + those as far out) / (1 + drawn), which rejects no oftener
    than it says (Phipson & Smyth 2010), with a standard error of 0.0007 at 0.05.

    Args:
        differences: one a pair.
        clusters: the cluster of each difference, whose signs change together; None is each alone.
        seed: of the drawn choices, so that the same differences give the same p.

    Raises:
        ValueError: fewer than two differences, one that is not finite, or not as many clusters.
    """
    values, _ = _cluster_totals(_finite_pairs(differences), clusters)
    sizes = np.abs(values)
    # What adds up to 0 by hand may miss it in the last bits.
    values = values[sizes > 1e-12 * sizes.max()]
    sizes = np.abs(values)
    # The same numbers added in another order differ in their last bits and still tie.
    bound = abs(float(values.sum())) - 1e-9 * float(sizes.sum())
    if bound <= 0:
        return 1.0
    if np.ptp(sizes) <= 1e-12 * sizes.max():
        return _fair_coin_p(int((values > 0).sum()), int((values < 0).sum()))
    if len(values) > MOST_PAIRS:
        return _drawn_p(sizes, bound, seed)
    # A sum over all pairs is one of the first half plus one of the second: 2 * 2^(n/2) of them.
    half = len(values) // 2
    first, second = _signed_sums(values[:half]), np.sort(_signed_sums(values[half:]))
    above = len(second) - np.searchsorted(second, bound - first, side="left")
    below = np.searchsorted(second, -bound - first, side="right")
    return float((above + below).sum()) / 2.0 ** len(values)


def detectable_mean(
    deviation: float, num_pairs: int, *, power: float = 0.8, confidence: float = 0.95
) -> float:
    """The mean difference that a paired t-test of this size finds with this probability.

    delta * s / sqrt(n), where delta is the noncentrality at which t(n - 1, delta) passes the
    test's bound with probability `power`. With few pairs s itself is only roughly known, and so is
    this.

    Args:
        deviation: standard deviation s of the paired differences.
        num_pairs: n.
        power: probability of finding it.
        confidence: of the test's interval.

    Raises:
        ValueError: fewer than two pairs, or a deviation below 0.
    """
    if num_pairs < 2 or not deviation >= 0:
        raise ValueError(
            f"need at least 2 pairs and a deviation of 0 or more, got {num_pairs} pairs and "
            f"{deviation}"
        )
    freedom = num_pairs - 1
    bound = float(stdtrit(freedom, 0.5 + confidence / 2))
    low, high = 0.0, 10 * bound
    for _ in range(60):
        middle = (low + high) / 2
        found = 1 - float(nctdtr(freedom, middle, bound))
        low, high = (middle, high) if found < power else (low, middle)
    return high * deviation / math.sqrt(num_pairs)


MOST_PAIRS = 40
"""Pairs whose choices of signs are counted out, whatever their sizes."""


def _finite_pairs(differences: Sequence[float]) -> np.ndarray:
    values = np.asarray(differences, dtype=float)
    if len(values) < 2 or not np.isfinite(values).all():
        raise ValueError(
            f"need at least two differences, all finite, got {list(differences)}; a single pair "
            "says nothing about chance"
        )
    return values


def _signed_sums(values: np.ndarray) -> np.ndarray:
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums + value, sums - value])
    return sums


def _drawn_p(sizes: np.ndarray, bound: float, seed: int) -> float:
    """Share of drawn choices of signs whose sum is at least as far from 0 as the bound."""
    generator = np.random.default_rng(seed)
    # Signs of one size are a count of heads: one draw in place of as many as there are.
    found, counts = np.unique(sizes, return_counts=True)
    sums = np.zeros(_SIGN_DRAWS)
    for size, count in zip(found, counts, strict=True):
        sums += size * (2 * generator.binomial(count, 0.5, size=_SIGN_DRAWS) - count)
    as_far_out = int((np.abs(sums) >= bound).sum())
    return (1 + as_far_out) / (1 + _SIGN_DRAWS)


def _fair_coin_p(heads: int, tails: int) -> float:
    """Two-sided p of a fair coin: 2 P(X <= the fewer), X ~ Binomial(heads + tails, 1/2)."""
    thrown = heads + tails
    # Whole numbers of any size: 0.5 ** n underflows for n > 1,074.
    tail = sum(math.comb(thrown, count) for count in range(min(heads, tails) + 1))
    p_value: float = 2 * tail / 2**thrown
    return min(1.0, p_value)


def pass_at_k(*, num_correct: int, num_samples: int, k: int) -> float:
    """Probability that of k completions at least one is right, estimated from n with c right.

    1 - C(n - c, k) / C(n, k), the mean over all choices of k of the n: unbiased, which
    1 - (1 - c/n)^k is not (arXiv 2107.03374, equation 1). For k = 1 it is c / n.

    Raises:
        ValueError: not 0 <= c <= n, or not 1 <= k <= n: no k can be chosen from fewer.
    """
    if not 0 <= num_correct <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(
            f"need 0 <= correct <= samples and 1 <= k <= samples, got {num_correct} correct of "
            f"{num_samples} samples and k = {k}; draw more samples or lower k"
        )
    # Whole numbers of any size, so that nothing cancels or overflows.
    all_choices = math.comb(num_samples, k)
    return (all_choices - math.comb(num_samples - num_correct, k)) / all_choices


def bootstrap_interval(
    values: Sequence[float],
    *,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    num_resamples: int = _RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of the mean of values, whole clusters drawn with replacement.

    Values of one cluster (completions of one item, say) stay together, because they are no
    independent evidence. It is known to be too narrow for few clusters, below about 20, and has
    no width at all where all clusters are alike.

    Args:
        values: one a measurement.
        clusters: the cluster of each value; None is each by itself.
        confidence: probability that the interval claims, between 0 and 1.
        num_resamples: bootstrap samples.
        seed: of the draws, so that the same values give the same interval.

    Raises:
        ValueError: there are no values, one is not finite, or an argument is out of range.
    """
    means = _resampled_means(
        values, clusters=clusters, confidence=confidence, num_resamples=num_resamples, seed=seed
    )
    return _percentiles(means, confidence)


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Candidate less baseline on the same items: mean, interval, two-sided p-value."""

    difference: float
    interval: tuple[float, float]
    p_value: float


def paired_bootstrap(
    *,
    baseline: Sequence[float],
    candidate: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    num_resamples: int = _RESAMPLES,
    seed: int = 0,
) -> PairedDifference:
    """Mean of the pairs' differences, candidate less baseline, with its bootstrap interval.

    Pairs are drawn, never the two sides apart, so what both find hard does not widen the
    interval. The p-value is twice the smaller share of resampled means on either side of 0
    (0 itself counts for both, and one is added to counts: Davison & Hinkley 1997, 4.2), so it is
    below 1 - confidence when the interval excludes 0, up to those corrections. Never below
    2 / (num_resamples + 1). Where few pairs differ both say too much: 4 of 30 up and none down
    have p 0.03, and by `sign_flip_p_value`, which is to decide, 0.125.

    Raises:
        ValueError: the sides differ in length, or as for `bootstrap_interval`.
    """
    differences = _differences(baseline=baseline, candidate=candidate)
    means = _resampled_means(
        differences,
        clusters=clusters,
        confidence=confidence,
        num_resamples=num_resamples,
        seed=seed,
    )
    smaller_side = min((means <= 0).sum(), (means >= 0).sum())
    return PairedDifference(
        difference=float(np.mean(differences)),
        interval=_percentiles(means, confidence),
        p_value=min(1.0, float(2 * (smaller_side + 1) / (len(means) + 1))),
    )


@dataclass(frozen=True, kw_only=True)
class McNemar:
    """Items that only one of two models answers correctly, and the exact two-sided p-value."""

    only_baseline: int
    only_candidate: int
    p_value: float


def mcnemar(*, baseline: Sequence[bool], candidate: Sequence[bool]) -> McNemar:
    """Exact McNemar test of two models on the same items.

    Items on which both are right or both wrong say nothing about a difference. If there is none,
    the others fall on either side like a fair coin: p = 2 P(X <= min(b, c)) for
    X ~ Binomial(b + c, 1/2), at most 1, and 1 if there is no such item.

    Raises:
        ValueError: the sides differ in length or are empty.
    """
    _require_pairs(len(baseline), len(candidate))
    pairs = list(zip(baseline, candidate, strict=True))
    only_baseline = sum(bool(one) and not other for one, other in pairs)
    only_candidate = sum(bool(other) and not one for one, other in pairs)
    return McNemar(
        only_baseline=only_baseline,
        only_candidate=only_candidate,
        p_value=_fair_coin_p(only_baseline, only_candidate),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given.

    Of m values the i-th smallest is multiplied by m - i + 1, then none may be below a smaller
    one's, nor above 1. Rejecting those below alpha keeps the probability of any false rejection
    below alpha, however the tests depend on each other.

    Raises:
        ValueError: a value is no probability.
    """
    for value in p_values:
        if not 0 <= value <= 1:
            raise ValueError(f"a p-value is {value}; it must be between 0 and 1")
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda at: p_values[at])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


def average_interval(
    estimates: Sequence[float], intervals: Sequence[tuple[float, float]]
) -> tuple[float, float]:
    """Interval of the plain average of independent estimates, from theirs.

    With m estimates p_i in l_i..u_i: average - sqrt(sum (p_i - l_i)^2) / m, and likewise upwards
    (the method of variance estimates recovery; Zou & Donner 2008, Statistics in Medicine 27). It
    keeps the lopsidedness of intervals near 0 and 1.

    Raises:
        ValueError: there are no estimates, or not as many intervals.
    """
    _require_pairs(len(estimates), len(intervals))
    average = sum(estimates) / len(estimates)
    below = [estimate - low for estimate, (low, _) in zip(estimates, intervals, strict=True)]
    above = [high - estimate for estimate, (_, high) in zip(estimates, intervals, strict=True)]
    return (
        average - math.hypot(*below) / len(estimates),
        average + math.hypot(*above) / len(estimates),
    )


def _resampled_means(
    values: Sequence[float],
    *,
    clusters: Sequence[Hashable] | None,
    confidence: float,
    num_resamples: int,
    seed: int,
) -> Float[np.ndarray, " resamples"]:
    if not 0 < confidence < 1 or num_resamples < 1:
        raise ValueError(
            f"confidence is {confidence} and num_resamples {num_resamples}; they must be between "
            "0 and 1, and at least 1"
        )
    sums, counts = _cluster_totals(values, clusters)
    generator = np.random.default_rng(seed)
    means = [
        sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
        for drawn in _draws(generator, num_clusters=len(sums), num_resamples=num_resamples)
    ]
    return np.concatenate(means)


def _draws(
    generator: np.random.Generator, *, num_clusters: int, num_resamples: int
) -> Iterator[np.ndarray]:
    """Places of drawn clusters, [resamples, clusters], some rows at a time."""
    rows = max(1, _CELLS_AT_ONCE // num_clusters)
    for start in range(0, num_resamples, rows):
        size = (min(rows, num_resamples - start), num_clusters)
        yield generator.integers(num_clusters, size=size)


def _cluster_totals(
    values: Sequence[float] | np.ndarray, clusters: Sequence[Hashable] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the values of each cluster, clusters in the order they first occur."""
    found = np.asarray(values, dtype=float)
    if found.ndim != 1 or not len(found) or not np.isfinite(found).all():
        raise ValueError(
            f"need a row of at least one finite value, got {len(found)} of which "
            f"{int((~np.isfinite(found)).sum())} are not finite; leave those out and say how many"
        )
    if clusters is None:
        return found, np.ones(len(found))
    _require_pairs(len(found), len(clusters))
    places: dict[Hashable, int] = {}
    place_of = [places.setdefault(cluster, len(places)) for cluster in clusters]
    return np.bincount(place_of, weights=found), np.bincount(place_of).astype(float)


def _percentiles(means: np.ndarray, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _differences(*, baseline: Sequence[float], candidate: Sequence[float]) -> list[float]:
    _require_pairs(len(baseline), len(candidate))
    return [new - old for old, new in zip(baseline, candidate, strict=True)]


def _require_pairs(one: int, other: int) -> None:
    if one != other or one == 0:
        raise ValueError(
            f"need two rows of one length with at least one entry, got {one} and {other}; pair "
            "them by item first"
        )
