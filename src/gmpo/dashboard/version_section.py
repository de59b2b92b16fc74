"""The section of model versions: what answered when, and which version is the champion."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import streamlit as st

from gmpo.dashboard.figures import versions_figure
from gmpo.dashboard.overview import choose_span
from gmpo.dashboard.tables import moment, reason_words
from gmpo.dashboard.traffic import Traffic
from gmpo.dashboard.trends import Span, Trend, trend
from gmpo.dashboard.watching import StoreWatch
from gmpo.store import Champion, Cycle, Event, ModelVersion, Store

__all__ = [
    "answers_by_version",
    "changes_of",
    "cycle_rows",
    "draw_versions",
    "gate_rows",
    "version_rows",
]

_MAX_CHANGES = 20
_LONGEST = 400


def draw_versions(watch: StoreWatch) -> None:
    """Draw the versions as they stand now."""
    store = watch.store
    traffic = watch.traffic()
    versions = store.model_versions()
    names = dict.fromkeys(one.name for one in versions)
    champions = [one for name in names for one in store.champion_history(name)]
    if not versions and not traffic.versions:
        st.info("No version is registered and none has answered yet.")
        return
    span = choose_span(traffic, time.time(), key="version_span")
    swaps = store.events(kinds=["swap"], since=span.start, newest_first=True, limit=_MAX_CHANGES)
    st.markdown("**Answers by model version**")
    st.plotly_chart(
        versions_figure(
            answers_by_version(traffic, span),
            changes_of(champions, swaps, span),
            span,
        ),
        key="versions",
    )
    st.dataframe(
        version_rows(versions, champions, traffic, span), key="version_table", hide_index=True
    )
    st.markdown("**Champions**")
    if champions:
        st.dataframe(_champion_rows(champions), key="champions", hide_index=True)
    else:
        st.caption("No version was made champion yet.")
    _draw_ways(store)


def _draw_ways(store: Store) -> None:
    """How versions became candidates: decisions of the gate, and cycles of learning."""
    decisions = store.events(kinds=["gate"], newest_first=True, limit=_MAX_CHANGES)
    if decisions:
        st.markdown("**Decisions of the gate**")
        st.dataframe(gate_rows(decisions), key="gate", hide_index=True)
    cycles = store.cycles()
    if cycles:
        st.markdown("**Cycles of learning**")
        st.dataframe(cycle_rows(cycles), key="cycles", hide_index=True)


def gate_rows(decisions: Sequence[Event]) -> list[dict[str, str]]:
    """Decisions in the order given."""
    return [
        {
            "time (UTC)": moment(one.time),
            "outcome": str(one.payload.get("outcome")),
            "candidate": one.model_version or "",
            "champion": str(one.payload.get("champion") or ""),
            "why": str(one.payload.get("sentence") or ""),
        }
        for one in decisions
    ]


def cycle_rows(cycles: Sequence[Cycle]) -> list[dict[str, Any]]:
    """Cycles, the newest first, each with what became of it and why, or how far it is.

    The state is the step that comes next, or the outcome; what decided is the step that ended the
    cycle, or the newest one that is over, with what it said.
    """
    return [
        {
            "model": one.name,
            "cycle": one.number,
            "state": one.state,
            **_what_became_of(one.payload),
            "began (UTC)": moment(one.created),
            "changed (UTC)": moment(one.changed),
            "ended (UTC)": "" if one.ended is None else moment(one.ended),
        }
        for one in sorted(cycles, key=lambda one: -one.created)
    ]


def _what_became_of(payload: Mapping[str, Any]) -> dict[str, str]:
    result, reports = payload.get("result") or {}, payload.get("reports") or {}
    step, sentence = result.get("step"), result.get("sentence")
    if not result and reports:
        step = next(reversed(reports))
        sentence = reports[step].get("sentence")
    update = reports.get("update", {}).get("details") or {}
    return {
        "reason": str(result.get("reason") or ""),
        "what decided": f"{step}: {sentence}"[:_LONGEST] if step else "",
        "candidate": str(result.get("new_model_version") or update.get("new_model_version") or ""),
    }


def answers_by_version(traffic: Traffic, span: Span) -> dict[str, Trend]:
    """Courses of the whole answers of each version that has some in the span."""
    courses = {}
    for place, version in enumerate(traffic.versions):
        ones = np.where(traffic.is_whole & (traffic.version == place), 1.0, np.nan)
        course = trend(traffic.time, ones, span)
        if len(course.time):
            courses[version] = course
    return courses


def changes_of(
    champions: Sequence[Champion], swaps: Sequence[Event], span: Span
) -> list[tuple[float, str]]:
    """When the champion or the served weights changed in the span, at most the newest twenty."""
    found = [(one.since, f"{_how(one)} {one.version[:8]}") for one in champions]
    found += [(one.time, f"serves {one.payload.get('version', '?')[:8]}") for one in swaps]
    return sorted(one for one in found if span.start < one[0] <= span.end)[-_MAX_CHANGES:]


def _how(champion: Champion) -> str:
    return "rolled back to" if champion.reason.get("kind") == "rollback" else "champion"


def version_rows(
    versions: Sequence[ModelVersion],
    champions: Sequence[Champion],
    traffic: Traffic,
    span: Span,
) -> list[dict[str, Any]]:
    """Registered versions, newest first, then those that answered without being registered."""
    serving = {one.name: one.version for one in champions}  # the history is oldest first
    rows = [
        {
            "version": one.version,
            "model": one.name,
            "champion": serving.get(one.name) == one.version,
            "registered (UTC)": moment(one.created),
            "parent": one.parent or "",
            **_answered(one.version, traffic, span),
            "metrics": json.dumps(one.metrics) if one.metrics else "",
        }
        for one in reversed(versions)
    ]
    known = {one.version for one in versions}
    rows += [
        {
            "version": version,
            "model": "",
            "champion": False,
            "registered (UTC)": "",
            "parent": "",
            **_answered(version, traffic, span),
            "metrics": "",
        }
        for version in traffic.versions
        if version not in known
    ]
    return rows


def _answered(version: str, traffic: Traffic, span: Span) -> Mapping[str, Any]:
    if version not in traffic.versions:
        return {"whole answers": 0}
    place = traffic.versions.index(version)
    these = traffic.is_whole & (traffic.version == place) & span.holds(traffic.time)
    return {
        "whole answers": int(these.sum()),
        "median latency, s": _median(traffic.latency[these]),
        "median quality": _median(traffic.quality[these]),
        "median token probability": _median(traffic.token_probability[these]),
    }


def _median(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else None


def _champion_rows(champions: Sequence[Champion]) -> list[dict[str, Any]]:
    return [
        {
            "since (UTC)": moment(one.since),
            "model": one.name,
            "revision": one.revision,
            "version": one.version,
            "in place of": one.previous or "",
            "reason": reason_words(one.reason)[:_LONGEST],
        }
        for one in sorted(champions, key=lambda one: -one.since)
    ]
