"""Scores of models on suites side by side, and tests of their differences item by item."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from gmpo.errors import ConfigError, DataError
from gmpo.outcomes import (
    SuiteOutcomes,
    refuse_other_question,
    told_of_answering,
    what_chooses_items,
)
from gmpo.statistics import (
    average_interval,
    holm,
    mcnemar,
    paired_bootstrap,
    sign_flip_p_value,
)
from gmpo.suites.items import SUITES

__all__ = ["Gain", "Metric", "Score", "ScoreTable", "metrics_of", "score_table"]

_ALPHA = 0.05
_ROUNDING = 1e-12


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A figure of a suite: the mean over its items of pass@k, asked one way."""

    name: str
    way: Literal["greedy", "sampled"]
    k: int = 1


@dataclass(frozen=True, kw_only=True)
class Score:
    """A mean with its 95 % interval, as fractions."""

    mean: float
    interval: tuple[float, float]
    num_items: int


@dataclass(frozen=True, kw_only=True)
class Gain:
    """A model less the first one on the items that both were asked, as fractions.

    Attributes:
        label: the model.
        baseline: the first model.
        suite: short name, or "average".
        num_items: shared items.
        difference: of the means.
        interval: 95 %, paired bootstrap of items; of an average, from the suites'. Of one
            difference alone, and too narrow where few items differ, so it decides nothing.
        only_baseline: items that only the baseline got right; None where an item may be right in
            part (mean@n and pass@k of more than k samples), and of an average.
        only_candidate: items that only the model got right, likewise.
        p_value: McNemar's exact test, or where an item may be right in part the sign-flip test of
            the items' differences; of an average that of all its items, each with the weight that
            it has in the average.
        adjusted_p: by Holm over all suites, averages and models of the table.
    """

    label: str
    baseline: str
    suite: str
    num_items: int
    difference: float
    interval: tuple[float, float]
    p_value: float
    adjusted_p: float
    only_baseline: int | None = None
    only_candidate: int | None = None

    @property
    def is_seen(self) -> bool:
        """Whether there is a difference at 5 %, by the adjusted p-value."""
        return self.adjusted_p < _ALPHA

    @property
    def verdict(self) -> str:
        """Which model is better on these items, if that is seen."""
        if not self.is_seen:
            return "none seen"
        return "better" if self.difference > 0 else "worse"


@dataclass(frozen=True, kw_only=True)
class ScoreTable:
    """Models in rows, suites in columns: one metric.

    Attributes:
        metric: what is shown.
        titles: of the suites by short name, in the order of columns.
        scores: by model and suite; a suite that a model was not asked is absent.
        averages: by model, the plain mean over the suites that every model was asked; empty for
            fewer than two.
        averaged: these suites.
        gains: of every model but the first, by suite, then its average.
        notes: what makes rows less comparable, a sentence each.
    """

    metric: Metric
    titles: Mapping[str, str]
    scores: Mapping[str, Mapping[str, Score]]
    averages: Mapping[str, Score]
    averaged: tuple[str, ...]
    gains: tuple[Gain, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """All of it for JSON."""
        gains = [asdict(gain) | {"verdict": gain.verdict} for gain in self.gains]
        return {**asdict(self), "gains": gains}


def metrics_of(outcomes: Sequence[SuiteOutcomes], ks: Sequence[int] = ()) -> list[Metric]:
    """The metrics that outcomes allow: greedy pass@1; of n samples mean@n and pass@k.

    Args:
        outcomes: of all models and suites.
        ks: which k; none is n.

    Raises:
        ConfigError: a k is not from 1 to n, or there are no sampled outcomes to choose k from;
            or numbers of samples differ.
    """
    metrics = []
    if any(one.way.name == "greedy" for one in outcomes):
        metrics.append(Metric(name="greedy pass@1", way="greedy"))
    counts = {one.way.num_samples for one in outcomes if one.way.name == "sampled"}
    if not counts:
        if ks:
            raise ConfigError(f"k = {ks[0]} needs sampled completions; give --samples {max(ks)}")
        return metrics
    if len(counts) > 1:
        raise ConfigError(
            f"outcomes have {sorted(counts)} samples an item; compare models that were asked "
            "equally often"
        )
    (num_samples,) = counts
    for k in ks:
        if not 1 <= k <= num_samples:
            raise ConfigError(
                f"k = {k} is not from 1 to the {num_samples} samples an item; lower it or raise "
                "--samples"
            )
    best = {one.way.best_of for one in outcomes if one.way.name == "sampled"}
    # Where they differ, notes say so.
    each = "" if len(best) > 1 or best == {1} else f", each the best of {min(best)}"
    metrics.append(Metric(name=f"mean@{num_samples}{each}", way="sampled"))
    wanted = [k for k in ks or [num_samples] if k > 1]  # pass@1 of n samples is mean@n
    return metrics + [Metric(name=f"pass@{k}{each}", way="sampled", k=k) for k in wanted]


def score_table(outcomes: Sequence[SuiteOutcomes], metric: Metric) -> ScoreTable:
    """The table of one metric; the first model's label is the baseline of the gains.

    Raises:
        DataError: two models share no suite or no item of one, or were put one differently, by
            its text or what their recipes add; or a label has a suite twice.
    """
    by_model = _by_model([one for one in outcomes if one.way.name == metric.way])
    titles = _titles(by_model)
    labels = list(by_model)
    shared = [name for name in titles if all(name in suites for suites in by_model.values())]
    averaged = tuple(shared) if len(shared) > 1 else ()
    gains = _gains(by_model, labels[0], averaged, metric) if len(labels) > 1 else ()
    return ScoreTable(
        metric=metric,
        titles=titles,
        scores={
            label: {name: _score(suites[name], metric) for name in titles if name in suites}
            for label, suites in by_model.items()
        },
        averages={
            label: _average([_score(suites[name], metric) for name in averaged])
            for label, suites in by_model.items()
            if averaged
        },
        averaged=averaged,
        gains=gains,
        # What is not known of the first is met with each other model, and told of once.
        notes=tuple(dict.fromkeys([*_notes(by_model, titles), *_disagreements(gains, titles)])),
    )


def _by_model(outcomes: Sequence[SuiteOutcomes]) -> dict[str, dict[str, SuiteOutcomes]]:
    found: dict[str, dict[str, SuiteOutcomes]] = {}
    for one in outcomes:
        suites = found.setdefault(one.label, {})
        if one.suite in suites:
            raise DataError(
                f"there are two outcomes of {one.label!r} on {one.suite}; give each model a label "
                "of its own: LABEL=MODEL"
            )
        suites[one.suite] = one
    return found


def _titles(by_model: Mapping[str, Mapping[str, SuiteOutcomes]]) -> dict[str, str]:
    """The paper's order first, then as met."""
    met = {name: one.title for suites in by_model.values() for name, one in suites.items()}
    order = [name for name in SUITES if name in met] + [name for name in met if name not in SUITES]
    return {name: met[name] for name in order}


def _score(outcomes: SuiteOutcomes, metric: Metric) -> Score:
    return Score(
        mean=outcomes.mean(metric.k),
        interval=outcomes.interval(metric.k),
        num_items=len(outcomes.items),
    )


def _average(scores: Sequence[Score]) -> Score:
    means = [score.mean for score in scores]
    return Score(
        mean=sum(means) / len(means),
        interval=average_interval(means, [score.interval for score in scores]),
        num_items=sum(score.num_items for score in scores),
    )


def _gains(
    by_model: Mapping[str, Mapping[str, SuiteOutcomes]],
    first: str,
    averaged: Sequence[str],
    metric: Metric,
) -> tuple[Gain, ...]:
    baseline = by_model[first]
    found: list[Gain] = []
    for label, suites in by_model.items():
        if label == first:
            continue
        pairs = {
            name: _paired(baseline[name], suites[name], metric.k)
            for name in _titles(by_model)
            if name in baseline and name in suites
        }
        if not pairs:
            raise DataError(
                f"{first!r} and {label!r} share no suite ({', '.join(baseline)} against "
                f"{', '.join(suites)}), so nothing can be compared; evaluate both on one, or show "
                "them one by one"
            )
        gains = [_gain(baseline[name], suites[name], pairs[name], metric) for name in pairs]
        found += gains
        if averaged:
            parts = [gain for gain in gains if gain.suite in averaged]
            found.append(_average_gain(parts, [pairs[name] for name in averaged]))
    adjusted = holm([gain.p_value for gain in found])
    return tuple(replace(gain, adjusted_p=p) for gain, p in zip(found, adjusted, strict=True))


@dataclass(frozen=True, kw_only=True)
class _Pairs:
    """Both models' values of the items that both were asked; `digests` tells items apart."""

    before: list[float]
    after: list[float]
    digests: list[str]

    @property
    def differences(self) -> list[float]:
        return [new - old for old, new in zip(self.before, self.after, strict=True)]


def _gain(baseline: SuiteOutcomes, candidate: SuiteOutcomes, pairs: _Pairs, metric: Metric) -> Gain:
    paired = paired_bootstrap(baseline=pairs.before, candidate=pairs.after)
    p_value = sign_flip_p_value(pairs.differences) if len(pairs.before) > 1 else 1.0
    gain = Gain(
        label=candidate.label,
        baseline=baseline.label,
        suite=candidate.suite,
        num_items=len(pairs.before),
        difference=paired.difference,
        interval=paired.interval,
        p_value=p_value,
        adjusted_p=p_value,
    )
    if metric.k < candidate.way.num_samples:
        return gain
    exact = mcnemar(
        baseline=[value == 1 for value in pairs.before],
        candidate=[value == 1 for value in pairs.after],
    )
    return replace(gain, **asdict(exact))


def _average_gain(gains: Sequence[Gain], pairs: Sequence[_Pairs]) -> Gain:
    """The mean of the suites' gains, tested by the signs of all their items."""
    differences = [gain.difference for gain in gains]
    p_value = sign_flip_p_value(
        [value / (len(pairs) * len(one.before)) for one in pairs for value in one.differences],
        # An item of two suites is one piece of evidence. In one suite items of the same words may
        # differ (by a picture): the first of one suite goes with the first of another.
        clusters=[key for one in pairs for key in _occurrences(one.digests)],
    )
    return Gain(
        label=gains[0].label,
        baseline=gains[0].baseline,
        suite="average",
        num_items=sum(gain.num_items for gain in gains),
        difference=sum(differences) / len(differences),
        interval=average_interval(differences, [gain.interval for gain in gains]),
        p_value=p_value,
        adjusted_p=p_value,
    )


def _occurrences(digests: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Each digest with how often it has come before."""
    met: Counter[str] = Counter()
    for digest in digests:
        yield digest, met[digest]
        met[digest] += 1


def _paired(baseline: SuiteOutcomes, candidate: SuiteOutcomes, k: int) -> _Pairs:
    """Both models' values of each item that both were asked."""
    refuse_other_question(baseline, candidate)
    others = {item.id: item for item in candidate.items}
    shared = [item for item in baseline.items if item.id in others]
    if not shared:
        raise DataError(
            f"{baseline.label!r} and {candidate.label!r} share no item of {baseline.suite} (for "
            f"instance {baseline.items[0].id!r} and {candidate.items[0].id!r}); evaluate both "
            f"with {what_chooses_items(baseline.suite)}"
        )
    for item in shared:
        if item.digest != others[item.id].digest:
            raise DataError(
                f"item {item.id!r} of {baseline.suite} was put differently to {baseline.label!r} "
                f"and {candidate.label!r}; evaluate both on the same data with the same "
                "--instruction"
            )
    return _Pairs(
        before=[item.value(k) for item in shared],
        after=[others[item.id].value(k) for item in shared],
        digests=[item.digest for item in shared],
    )


def _disagreements(gains: Sequence[Gain], titles: Mapping[str, str]) -> Iterator[str]:
    """Where a reader of the interval would come to another verdict."""
    for gain in gains:
        low, high = gain.interval
        leaves_out = low > _ROUNDING or high < -_ROUNDING
        if leaves_out != gain.is_seen:
            yield (
                f"{titles.get(gain.suite, gain.suite)}: the interval of {gain.label} - "
                f"{gain.baseline} {'leaves out' if leaves_out else 'holds'} 0, and the adjusted p "
                f"is {gain.adjusted_p:.3g}; p decides"
            )


def _notes(
    by_model: Mapping[str, Mapping[str, SuiteOutcomes]], titles: Mapping[str, str]
) -> Iterator[str]:
    """How each model was asked otherwise than the first, suite by suite.

    All gains are against the first, and of two others that differ from each other at least one
    differs from it, and is told of.
    """
    for name, title in titles.items():
        one, *others = (suites[name] for suites in by_model.values() if name in suites)
        for other in others:
            for what, left, right in (
                ("tokens at most", one.max_tokens, other.max_tokens),
                ("temperature", one.way.temperature, other.way.temperature),
                ("completions are the best of", one.way.best_of, other.way.best_of),
                ("items", len(one.items), len(other.items)),
            ):
                if left != right:
                    yield (f"{title}: {what} {left} for {one.label} and {right} for {other.label}")
            yield from told_of_answering(one, other)
