"""Traffic over a stretch of time: figures beside those of the stretch before, and their course."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from gmpo.dashboard.traffic import Traffic
from gmpo.serving.quality import stability
from gmpo.statistics import wilson_interval

__all__ = [
    "Boxes",
    "Headline",
    "Span",
    "Trend",
    "headlines",
    "latency_boxes",
    "steady_figure",
    "thinned",
    "trend",
]

_BINS = 60
_FEWEST_BINS = 6
_JUDGEMENTS_A_BIN = 40
_SHORTEST_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Span:
    """A stretch of time, in unix seconds; its end belongs to it and its start does not."""

    start: float
    end: float

    @property
    def seconds(self) -> float:
        """Its length, at least 1: a rate over less says nothing."""
        return max(self.end - self.start, _SHORTEST_SECONDS)

    def holds(self, times: Float[np.ndarray, " N"]) -> Bool[np.ndarray, " N"]:
        """Which times are in it."""
        return (times > self.start) & (times <= self.end)

    def before(self) -> Span:
        """The stretch of the same length that ends where this one begins."""
        return Span(start=self.start - (self.end - self.start), end=self.start)


@dataclass(frozen=True, kw_only=True)
class Headline:
    """A figure of a span and of the one before; None where nothing was measured."""

    now: float | None
    before: float | None

    @property
    def change(self) -> float | None:
        """What it rose by."""
        return None if self.now is None or self.before is None else self.now - self.before


@dataclass(frozen=True, kw_only=True)
class Trend:
    """A figure over time, one point for each part of a span that holds a value.

    Attributes:
        time: middle of the part, unix seconds, rising; `[K]`. It may lie before the first value.
        mean_time: mean of the values' own times, for a point that stands for them.
        value: mean of its values.
        low: of a band about it.
        high: of that band.
        count: values in it.
    """

    time: Float[np.ndarray, " K"]
    mean_time: Float[np.ndarray, " K"]
    value: Float[np.ndarray, " K"]
    low: Float[np.ndarray, " K"]
    high: Float[np.ndarray, " K"]
    count: Float[np.ndarray, " K"]


@dataclass(frozen=True, kw_only=True)
class Boxes:
    """Latencies of whole answers by version; quantiles in seconds, `[V]` each.

    Attributes:
        versions: those with an answer in the span, in the order in which they were first seen.
        q05: 5 % quantile.
        q25: lower quartile.
        q50: median.
        q75: upper quartile.
        q95: 95 % quantile.
        counts: answers.
    """

    versions: tuple[str, ...]
    q05: tuple[float, ...]
    q25: tuple[float, ...]
    q50: tuple[float, ...]
    q75: tuple[float, ...]
    q95: tuple[float, ...]
    counts: tuple[int, ...]


def headlines(traffic: Traffic, span: Span) -> dict[str, Headline]:
    """Accuracy, latency, latency_p95, stability, throughput and tokens_per_second of a span.

    * accuracy: mean judgement of the requests judged in it.
    * latency, latency_p95: median and 95 % quantile of whole answers, seconds.
    * stability: geometric over arithmetic mean of `steady_figure` of whole answers: 1 where all are
      alike, falling as some become much worse than the others; from 20 answers on.
    * throughput, tokens_per_second: whole answers and their tokens over its seconds. The part of a
      span in which there was no traffic yet is left out.
    """
    name = steady_figure(traffic, span)
    now = _figures(traffic, _since_first(traffic, span), name)
    before = _figures(traffic, _since_first(traffic, span.before()), name)
    return {name: Headline(now=now[name], before=before[name]) for name in now}


def steady_figure(traffic: Traffic, span: Span) -> Literal["quality", "token_probability"]:
    """Of what stability is: of quality, where any answer of the span has a score."""
    scores = traffic.quality[span.holds(traffic.time) & traffic.is_whole]
    return "quality" if len(_known(scores)) else "token_probability"


def _since_first(traffic: Traffic, span: Span) -> Span:
    first = min(traffic.time.min(initial=math.inf), traffic.judged_at.min(initial=math.inf))
    if not span.start < first <= span.end:
        return span
    # The first one itself belongs to it.
    return Span(start=math.nextafter(first, -math.inf), end=span.end)


def _figures(
    traffic: Traffic, span: Span, steady: Literal["quality", "token_probability"]
) -> dict[str, float | None]:
    inside = span.holds(traffic.time) & traffic.is_whole
    latency = _known(traffic.latency[inside])
    scores = traffic.quality if steady == "quality" else traffic.token_probability
    judgements = traffic.judgements[span.holds(traffic.judged_at)]
    return {
        "accuracy": float(judgements.mean()) if len(judgements) else None,
        "latency": float(np.median(latency)) if len(latency) else None,
        "latency_p95": float(np.quantile(latency, 0.95)) if len(latency) else None,
        "stability": _stability(_known(scores[inside])),
        "throughput": int(inside.sum()) / span.seconds if inside.any() else None,
        "tokens_per_second": (
            float(_known(traffic.tokens[inside]).sum()) / span.seconds if inside.any() else None
        ),
    }


def _stability(values: Float[np.ndarray, " n"]) -> float | None:
    """As the gateway's answers have it; 0 where one is 0, which no floored score is."""
    return 0.0 if values.min(initial=1.0) <= 0 else stability(values.tolist())


def trend(
    times: Float[np.ndarray, " N"],
    values: Float[np.ndarray, " N"],
    span: Span,
    *,
    is_share: bool = False,
) -> Trend:
    """Means over 60 or fewer equal parts of a span; NaN values count nowhere.

    Args:
        times: unix seconds, in any order.
        values: one a time.
        span: from which values are taken.
        is_share: values are successes, and the band is Wilson's 95 % interval of their rate; there
            are fewer parts if there are few values, down to 6, so that most parts hold 40. Else the
            band is from the 10 % to the 90 % quantile of the values.
    """
    inside = span.holds(times) & ~np.isnan(values)
    taken, at = values[inside], times[inside]
    parts = min(_BINS, max(_FEWEST_BINS, len(taken) // _JUDGEMENTS_A_BIN)) if is_share else _BINS
    width = span.seconds / parts
    part = np.clip(((at - span.start) / width).astype(int), 0, parts - 1)
    order = np.argsort(part, kind="stable")
    filled, starts = np.unique(part[order], return_index=True)
    groups = np.split(taken[order], starts[1:]) if len(filled) else []
    moments = np.split(at[order], starts[1:]) if len(filled) else []
    bands = [_wilson(group) if is_share else _middle(group) for group in groups]
    return Trend(
        time=span.start + (filled + 0.5) * width,
        mean_time=np.array([group.mean() for group in moments], dtype=float),
        value=np.array([group.mean() for group in groups], dtype=float),
        low=np.array([low for low, _ in bands], dtype=float),
        high=np.array([high for _, high in bands], dtype=float),
        count=np.array([len(group) for group in groups], dtype=float),
    )


def _wilson(values: Float[np.ndarray, " n"]) -> tuple[float, float]:
    return wilson_interval(round(float(values.sum())), len(values))


def _middle(values: Float[np.ndarray, " n"]) -> tuple[float, float]:
    low, high = np.quantile(values, [0.1, 0.9])
    return float(low), float(high)


def latency_boxes(traffic: Traffic, span: Span) -> Boxes:
    """Quantiles of the latency of whole answers for each version; thousands fit into five."""
    inside = span.holds(traffic.time) & traffic.is_whole & ~np.isnan(traffic.latency)
    rows = []
    for place, version in enumerate(traffic.versions):
        latency = traffic.latency[inside & (traffic.version == place)]
        if len(latency):
            levels = np.quantile(latency, [0.05, 0.25, 0.5, 0.75, 0.95]).tolist()
            rows.append((version, *levels, len(latency)))
    columns = list(zip(*rows, strict=True)) or [()] * 7
    names = ("versions", "q05", "q25", "q50", "q75", "q95", "counts")
    return Boxes(**dict(zip(names, columns, strict=True)))


def thinned(
    x: Float[np.ndarray, " N"], y: Float[np.ndarray, " N"], *, max_points: int
) -> tuple[Float[np.ndarray, " K"], Float[np.ndarray, " K"]]:
    """At most so many of the points of a line; the extremes of every part of it are kept.

    Args:
        x: in order.
        y: finite, or NaN for a gap.
        max_points: at least 2; half as many equal parts give their lowest and highest point each.
    """
    if len(x) <= max_points:
        return x, y
    kept: list[int] = []
    for part in np.array_split(np.arange(len(x)), max_points // 2):
        known = part[~np.isnan(y[part])]
        if len(known):
            kept += sorted({int(known[y[known].argmin()]), int(known[y[known].argmax()])})
    return x[kept], y[kept]


def _known(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " k"]:
    known: Float[np.ndarray, " k"] = values[~np.isnan(values)]
    return known
