"""Traffic and runs as Plotly figures; colours are legible on a light and on a dark page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from gmpo.abtest.report import ExperimentReport
from gmpo.dashboard.trends import Boxes, Span, Trend, thinned

__all__ = [
    "MAX_POINTS",
    "accuracy_figure",
    "geometric_mean_figure",
    "latency_figure",
    "moments",
    "ratio_figure",
    "runs_figure",
    "sequence_figure",
    "severity_figure",
    "versions_figure",
]

MAX_POINTS = 2000
"""Of one figure: a browser redraws so many without being felt."""

# Okabe and Ito's palette without its black and yellow: common colour blindness tells them apart,
# and they stand out from white and from near-black alike.
_COLOURS = ("#0096d6", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9")
_GREY = "#8a8f98"
_GRID = "rgba(128, 128, 128, 0.25)"


def moments(times: Float[np.ndarray, " N"]) -> np.ndarray:
    """Unix seconds as UTC times for an axis, to the millisecond; `[N]`."""
    return (np.asarray(times) * 1000).astype("datetime64[ms]")


def accuracy_figure(trend: Trend, answers: Trend, *, span_seconds: float) -> go.Figure:
    """Accuracy with its 95 % interval, over bars of whole answers a second.

    Args:
        trend: of judgements.
        answers: of anything that each whole answer has; its counts are drawn.
        span_seconds: of both trends.
    """
    figure = make_subplots(specs=[[{"secondary_y": True}]])
    part = span_seconds / 60
    figure.add_trace(
        go.Bar(
            x=moments(answers.time),
            y=answers.count / part,
            name="answers a second",
            marker={"color": _GREY, "opacity": 0.35, "line": {"width": 0}},
            width=0.9 * part * 1000,
        ),
        secondary_y=True,
    )
    for trace in _band(trend, "accuracy", _COLOURS[0]):
        figure.add_trace(trace, secondary_y=False)
    _lay_out(figure, y="share of judged requests")
    figure.update_yaxes(range=[-0.03, 1.03], tickformat=".0%", secondary_y=False)
    figure.update_yaxes(
        title="answers a second",
        showgrid=False,
        # The bars keep to the lower third, below the line.
        range=[0, 3 * max(float(answers.count.max(initial=0.0)) / part, 1e-9)],
        nticks=4,
        tickmode="auto",
        secondary_y=True,
    )
    return figure


def ratio_figure(newest: Float[np.ndarray, " N"], earlier: Float[np.ndarray, " M"]) -> go.Figure:
    """Distribution of the importance ratios of sequences, of new rounds and of those before.

    Args:
        newest: geometric mean ratios of the rollouts of the newest rounds, above 0.
        earlier: those of the rounds before.
    """
    figure = go.Figure()
    both = np.concatenate([newest, earlier])
    for values, name, colour in ((earlier, "before", _GREY), (newest, "newest", _COLOURS[0])):
        if len(values):
            edges = _edges(both)
            counts, _ = np.histogram(values, bins=edges)
            figure.add_trace(
                go.Bar(
                    x=(edges[:-1] + edges[1:]) / 2,
                    y=counts / len(values),
                    width=np.diff(edges),
                    name=f"{name} ({len(values)})",
                    marker={"color": colour, "opacity": 0.6, "line": {"width": 0}},
                )
            )
    _lay_out(figure, x="importance ratio of a sequence", y="share of rollouts")
    figure.update_layout(barmode="overlay")
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    return figure


def _edges(values: Float[np.ndarray, " N"]) -> Float[np.ndarray, " E"]:
    """40 bins, one of them centred at 1, where a policy that did not move has its ratios."""
    furthest = max(float(np.abs(values - 1).max(initial=0.0)), 0.01) * 1.025
    low = max(float(values.min(initial=1.0)), 1 - furthest)
    width = max(float(values.max(initial=1.0)) - low, 0.02) / 39
    first = 1 - width * (math.ceil((1 - low) / width) + 0.5)
    return first + width * np.arange(42)


def latency_figure(boxes: Boxes) -> go.Figure:
    """A box for each version: quartiles, whiskers from the 5 % to the 95 % quantile."""
    figure = go.Figure()
    if boxes.versions:
        figure.add_trace(
            go.Box(
                x=[_version(one) for one in boxes.versions],
                q1=boxes.q25,
                median=boxes.q50,
                q3=boxes.q75,
                lowerfence=boxes.q05,
                upperfence=boxes.q95,
                line={"color": _COLOURS[0]},
                name="latency",
                showlegend=False,
            )
        )
    _lay_out(figure, y="seconds to the whole answer")
    figure.update_xaxes(type="category")
    low, high = min(boxes.q05, default=0.0), max(boxes.q95, default=0.0)
    if 0 < 10 * low < high:
        ticks = _log_ticks(low, high)
        figure.update_yaxes(type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    else:
        figure.update_yaxes(rangemode="tozero")
    return figure


def _log_ticks(low: float, high: float) -> list[float]:
    """Values for a logarithmic axis, from at most the low end to at least the high one.

    Plotly's own marks between powers of ten have their leading digit alone for a label, and two of
    one digit are told apart by counting; these are for labels in full.
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    # With powers of ten alone a box between two could not be read off; of more, labels would touch.
    digits = (1, 2, 5) if high <= 1000 * low else (1,)
    return [float(f"{digit}e{power}") for power in range(first, last + 1) for digit in digits]


def geometric_mean_figure(trend: Trend) -> go.Figure:
    """Geometric mean of the probabilities of an answer's tokens, over time."""
    figure = go.Figure([*_band(trend, "mean of answers", _COLOURS[2])])
    _lay_out(figure, y="geometric mean token probability")
    figure.update_yaxes(range=[-0.03, 1.03])
    return figure


def runs_figure(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float | None]]], *, metric: str, x: str
) -> go.Figure:
    """One metric of several runs, thinned so that the figure has at most `MAX_POINTS` points.

    Args:
        lines: positions and values of each run; None is a value that was not finite.
        metric: name of the metric, for the axis.
        x: what positions are, for the axis.
    """
    figure = go.Figure()
    for place, (name, (positions, values)) in enumerate(lines.items()):
        at, value = thinned(
            np.array(positions, dtype=float),
            np.array(values, dtype=float),
            max_points=max(2, MAX_POINTS // len(lines)),
        )
        figure.add_trace(
            go.Scatter(
                x=at,
                y=value,
                name=escape(name),
                mode="lines" if len(at) > 1 else "markers",
                line={"color": _COLOURS[place % len(_COLOURS)], "width": 1.8},
            )
        )
    _lay_out(figure, x=x, y=metric)
    figure.update_layout(showlegend=len(lines) > 1, height=380)
    return figure


def sequence_figure(report: ExperimentReport) -> go.Figure:
    """The primary metric's confidence sequence over the units, with the line of no difference."""
    result = report.primary
    is_ratio = result.scale == "ratio"
    points = [one for one in report.path if math.isfinite(one.interval.low + one.interval.high)]
    units = [one.num_units for one in points]
    figure = go.Figure(
        _filled(
            units,
            [one.interval.low for one in points],
            [one.interval.high for one in points],
            _COLOURS[0],
        )
    )
    figure.add_trace(
        go.Scatter(
            x=units,
            y=[one.estimate for one in points],
            name="estimate",
            mode="lines",
            line={"color": _COLOURS[0], "width": 2},
        )
    )
    figure.add_hline(
        y=1.0 if is_ratio else 0.0, line={"color": _GREY, "dash": "dash", "width": 1.5}
    )
    side = "over" if is_ratio else "less"
    _lay_out(figure, x="units of both arms", y=f"candidate {side} control")
    figure.update_layout(showlegend=False, height=380)
    return figure


def versions_figure(
    answers: Mapping[str, Trend], changes: Sequence[tuple[float, str]], span: Span
) -> go.Figure:
    """Answers a second of each version on top of each other, and when the champion changed.

    Args:
        answers: by version, over the span; counts are drawn.
        changes: unix seconds, and what happened then; told where the mouse is over the mark.
        span: that is drawn.
    """
    figure = go.Figure()
    part = span.seconds / 60
    for place, (version, trend) in enumerate(answers.items()):
        figure.add_trace(
            go.Bar(
                x=moments(trend.time),
                y=trend.count / part,
                width=part * 1000,
                name=_version(version),
                marker={"color": _COLOURS[place % len(_COLOURS)], "line": {"width": 0}},
            )
        )
    if changes:
        at = moments(np.array([time for time, _ in changes]))
        for moment in at:
            figure.add_vline(x=str(moment), line={"color": _GREY, "dash": "dash", "width": 1.5})
        tops = sum((trend.count.max() / part for trend in answers.values()), 0.0) or 1.0
        figure.add_trace(
            go.Scatter(
                x=at,
                y=[1.08 * tops] * len(at),
                text=[escape(words) for _, words in changes],
                hovertemplate="%{text}<br>%{x}<extra></extra>",
                mode="markers",
                marker={"symbol": "triangle-down", "size": 11, "color": _COLOURS[3]},
                name="changes",
            )
        )
    _lay_out(figure, y="whole answers a second")
    figure.update_layout(
        barmode="stack",
        height=340,
        showlegend=True,
        legend={"y": -0.2, "yanchor": "top"},
    )
    figure.update_xaxes(
        type="date", range=[str(one) for one in moments(np.array([span.start, span.end]))]
    )
    figure.update_yaxes(rangemode="tozero")
    return figure


def severity_figure(
    times: Float[np.ndarray, " N"], severities: Float[np.ndarray, " N"]
) -> go.Figure:
    """Severities of anomaly reports over time, between 0 and 1; at most `MAX_POINTS` of them."""
    at, severity = thinned(times, severities, max_points=MAX_POINTS)
    figure = go.Figure(
        go.Scatter(
            x=moments(at),
            y=severity,
            mode="lines+markers",
            line={"color": _COLOURS[3], "width": 1.5},
            marker={"size": 4},
        )
    )
    _lay_out(figure, y="severity")
    figure.update_yaxes(range=[-0.03, 1.03])
    return figure


def _band(trend: Trend, name: str, colour: str) -> list[go.Scatter]:
    """A line with its band."""
    at = moments(trend.mean_time)
    return [
        *_filled(at, trend.low, trend.high, colour),
        go.Scatter(
            x=at,
            y=trend.value,
            name=name,
            mode="lines+markers",
            line={"color": colour, "width": 2},
            marker={"size": 5},
        ),
    ]


def _filled(x: Any, low: Any, high: Any, colour: str) -> list[go.Scatter]:
    """The area between two lines."""
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    edge: dict[str, Any] = {
        "x": x,
        "mode": "lines",
        "line": {"width": 0},
        "hoverinfo": "skip",
        "showlegend": False,
    }
    fill = f"rgba({red},{green},{blue},0.22)"
    return [
        go.Scatter(y=low, **edge),
        go.Scatter(y=high, fill="tonexty", fillcolor=fill, **edge),
    ]


def _lay_out(figure: go.Figure, *, x: str | None = None, y: str) -> None:
    figure.update_layout(
        height=290,
        margin={"l": 8, "r": 8, "t": 28, "b": 8},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        bargap=0,
        hovermode="closest",
    )
    axis = {"gridcolor": _GRID, "zeroline": False, "automargin": True}
    figure.update_xaxes(title=x and escape(x), **axis)
    figure.update_yaxes(title=escape(y), **axis)


def _version(version: str) -> str:
    return escape(version if len(version) <= 12 else version[:11] + "…")
