"""The page's first section: accuracy, latency, stability and throughput, and the live log."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from typing import Literal, TypedDict

import numpy as np
import streamlit as st

from gmpo.dashboard.figures import (
    accuracy_figure,
    geometric_mean_figure,
    latency_figure,
    ratio_figure,
)
from gmpo.dashboard.runs import RunLog, sequence_ratios
from gmpo.dashboard.tables import event_rows, moment, seconds_words
from gmpo.dashboard.traffic import Traffic
from gmpo.dashboard.trends import (
    Headline,
    Span,
    headlines,
    latency_boxes,
    steady_figure,
    trend,
)
from gmpo.dashboard.watching import StoreWatch

__all__ = ["SPANS", "choose_span", "draw_overview", "fitting_span"]

SPANS: Mapping[str, float | None] = {
    "5 minutes": 300.0,
    "1 hour": 3600.0,
    "1 day": 86400.0,
    "1 week": 7 * 86400.0,
    "all": None,
}
"""Stretches of time that may be looked at, in seconds."""

_LOG_LINES = 50
_HEADLINES = ("accuracy", "latency", "stability", "throughput")


class _Change(TypedDict):
    """What `st.metric` is told of a change."""

    delta: str | None
    delta_color: Literal["normal", "inverse", "off"]
    delta_arrow: Literal["auto", "off"]


def draw_overview(watch: StoreWatch, run: tuple[str, RunLog] | None) -> None:
    """Draw it as things stand now.

    Args:
        watch: of the store.
        run: name and lines of the training run whose ratios are shown; None for none.
    """
    traffic = watch.traffic()
    span = choose_span(traffic, time.time(), key="span")
    _say_what_is_missing(traffic, watch.num_skipped, span)
    _draw_headlines(headlines(traffic, span), steady_figure(traffic, span))
    _draw_charts(traffic, span, run)
    _draw_log(watch)


def choose_span(traffic: Traffic, now: float, *, key: str) -> Span:
    """The stretch of time that the visitor chose; at first one that holds an answer."""
    # Not as a default: one that changes as time goes by would undo what the visitor chose.
    if key not in st.session_state:
        st.session_state[key] = fitting_span(traffic, now)
    chosen = st.segmented_control("the last", list(SPANS), required=True, key=key)
    assert chosen is not None, "it is required, and one was chosen above"
    return _span(traffic, SPANS[chosen], now)


def fitting_span(traffic: Traffic, now: float) -> str:
    """The shortest of `SPANS`, but at least an hour, that holds the newest answer."""
    newest = traffic.time.max(initial=0.0)
    for name, seconds in SPANS.items():
        if seconds is None or (seconds >= 3600 and now - newest < seconds):
            return name if len(traffic.time) else "1 hour"
    raise AssertionError("the last span has no end")


def _span(traffic: Traffic, seconds: float | None, now: float) -> Span:
    if seconds is None:
        first = min(traffic.time.min(initial=now), traffic.judged_at.min(initial=now))
        return Span(start=float(np.nextafter(first, 0)), end=now)
    return Span(start=now - seconds, end=now)


def _say_what_is_missing(traffic: Traffic, num_skipped: int, span: Span) -> None:
    if not len(traffic.time):
        st.info(
            "No answer is recorded yet. A gateway that was started with this `--store` records "
            "every answer; the page fills by itself."
        )
    elif not span.holds(traffic.time).any():
        newest = moment(float(traffic.time.max()))
        st.info(f"Nothing happened in this time; the newest answer came {newest} UTC.")
    if num_skipped:
        st.warning(f"The oldest {num_skipped:,} events of this store are too many to show.")
    if traffic.num_malformed:
        st.warning(f"{traffic.num_malformed:,} events could not be read and are in no figure.")


def _draw_headlines(found: Mapping[str, Headline], steady: str) -> None:
    accuracy, latency, stability, throughput = st.columns(len(_HEADLINES))
    one = found["accuracy"]
    accuracy.metric(
        "Accuracy",
        "-" if one.now is None else f"{100 * one.now:.1f} %",
        **_change(one.change, lambda change: f"{100 * change:+.1f} points"),
        help="Mean judgement of requests judged in this time, by outcomes or feedback.",
        border=True,
    )
    one = found["latency"]
    p95 = found["latency_p95"].now
    latency.metric(
        "Latency, median",
        "-" if one.now is None else seconds_words(one.now),
        **_change(one.change, _signed_seconds, color="inverse"),
        help="Of whole answers, from the request to the end. "
        + ("" if p95 is None else f"95 % of them took at most {seconds_words(p95)}."),
        border=True,
    )
    one = found["stability"]
    stability.metric(
        "Stability",
        "-" if one.now is None else f"{one.now:.3f}",
        **_change(one.change, lambda change: f"{change:+.3f}"),
        help="Geometric over arithmetic mean of the answers' "
        + ("quality scores" if steady == "quality" else "token probabilities")
        + ": 1 where all are alike, falling as some become much worse than the others.",
        border=True,
    )
    one = found["throughput"]
    tokens = found["tokens_per_second"].now
    throughput.metric(
        "Throughput",
        "-" if one.now is None else f"{_rate(one.now)}/s",
        **_change(one.change, lambda change: f"{change:+.2g}/s"),
        help="Whole answers a second. "
        + ("" if tokens is None else f"They had {_rate(tokens)} tokens a second."),
        border=True,
    )
    if any(found[name].change is not None for name in _HEADLINES):
        st.caption("Changes are from the stretch of the same length before.")


def _draw_charts(traffic: Traffic, span: Span, run: tuple[str, RunLog] | None) -> None:
    left, right = st.columns(2)
    with left:
        st.markdown("**Accuracy**")
        answers = np.where(traffic.is_whole, 1.0, np.nan)
        st.plotly_chart(
            accuracy_figure(
                trend(traffic.judged_at, traffic.judgements, span, is_share=True),
                trend(traffic.time, answers, span),
                span_seconds=span.seconds,
            ),
            key="accuracy",
        )
    with right:
        st.markdown("**Importance ratios in training**")
        newest, earlier = (np.empty(0), np.empty(0)) if run is None else sequence_ratios(run[1])
        if len(newest) + len(earlier):
            st.plotly_chart(ratio_figure(newest, earlier), key="ratios")
        elif run is None:
            st.info(
                "Ratios exist while a model trains, not while it serves. Give the run folder to "
                "`gmpo dashboard` to see its own."
            )
        else:
            st.info("This run kept no rollouts with ratios (`tracking.groups_per_round`).")
    left, right = st.columns(2)
    with left:
        st.markdown("**Latency by model version**")
        st.plotly_chart(latency_figure(latency_boxes(traffic, span)), key="latency")
    with right:
        st.markdown("**Geometric mean of token probabilities**")
        st.plotly_chart(
            geometric_mean_figure(trend(traffic.time, traffic.token_probability, span)),
            key="geometric_mean",
        )


def _draw_log(watch: StoreWatch) -> None:
    st.markdown("**Live log**")
    events = watch.store.events(newest_first=True, limit=_LOG_LINES)
    if events:
        st.dataframe(event_rows(events), key="log", hide_index=True, height=320)
    else:
        st.caption("Empty so far.")


def _change(
    change: float | None,
    words: Callable[[float], str],
    *,
    color: Literal["normal", "inverse"] = "normal",
) -> _Change:
    """How a change is shown: with an arrow, and without one where it rounds to nothing."""
    said = None if change is None else words(change)
    if said is not None and not re.search("[1-9]", said):
        return {"delta": "no change", "delta_color": "off", "delta_arrow": "off"}
    return {"delta": said, "delta_color": color, "delta_arrow": "auto"}


def _signed_seconds(seconds: float) -> str:
    return ("-" if seconds < 0 else "+") + seconds_words(abs(seconds))


def _rate(per_second: float) -> str:
    return f"{per_second:.0f}" if per_second >= 100 else f"{per_second:.2g}"
