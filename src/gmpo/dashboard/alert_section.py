"""The section of trouble: alerts of the store, alarms of runs, anomalies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st

from gmpo.dashboard.figures import MAX_POINTS, severity_figure
from gmpo.dashboard.runs import RunWatch
from gmpo.dashboard.tables import anomaly_words, moment
from gmpo.errors import GmpoError
from gmpo.monitoring.alerts import Condition
from gmpo.run_conditions import unreadable_run
from gmpo.store import AlertRow, Event, Store

__all__ = ["alarm_rows", "alert_rows", "anomaly_rows", "draw_alerts", "severities"]

_ROWS = 50


def draw_alerts(store: Store | None, watch: RunWatch, folders: Mapping[str, Path]) -> None:
    """Draw what is wrong now, and what was."""
    if folders:
        st.markdown("**Alarms of training runs**")
        _table(alarm_rows(_conditions(watch, folders)), "alarms", "No run has an alarm that lasts.")
    if store is None:
        return
    st.markdown("**Alerts**")
    _table(alert_rows(store.alerts()), "alerts", "The store holds no alert.")
    anomalies = store.events(kinds=["anomaly"], newest_first=True, limit=MAX_POINTS)
    st.markdown("**Anomalies**")
    if anomalies:
        st.plotly_chart(severity_figure(*severities(anomalies)), key="severities")
    _table(anomaly_rows(anomalies[:_ROWS]), "anomalies", "The store holds no anomaly report.")


def _conditions(watch: RunWatch, folders: Mapping[str, Path]) -> list[Condition]:
    found: list[Condition] = []
    for folder in folders.values():
        try:
            found.extend(watch.health(folder).conditions)
        except GmpoError as error:
            found.append(unreadable_run(folder, error))
    return found


def _table(rows: Sequence[Mapping[str, Any]], key: str, empty: str) -> None:
    if rows:
        st.dataframe(rows, key=key, hide_index=True)
    else:
        st.caption(empty)


def alarm_rows(conditions: Sequence[Condition]) -> list[dict[str, str]]:
    """What is wrong with runs now, the critical first."""
    ordered = sorted(conditions, key=lambda one: one.severity != "critical")
    return [
        {
            "severity": one.severity,
            "alarm": one.labels["alertname"],
            "run": one.labels.get("run", ""),
            "summary": one.annotations.get("summary", ""),
            "what to do": one.annotations.get("action", ""),
        }
        for one in ordered
    ]


def alert_rows(alerts: Sequence[AlertRow]) -> list[dict[str, Any]]:
    """Alerts as they stand: those that fire first, of these the critical, then the newest."""
    ordered = sorted(
        alerts,
        key=lambda one: (one.ends_at is not None, one.severity != "critical", -one.starts_at),
    )
    return [
        {
            "status": one.status,
            "severity": one.severity,
            "since (UTC)": moment(one.starts_at),
            "until (UTC)": "" if one.ends_at is None else moment(one.ends_at),
            "alert": _field(one.payload, "labels", "alertname"),
            "summary": _field(one.payload, "annotations", "summary"),
            "what to do": _field(one.payload, "annotations", "action") or _actions(one.payload),
        }
        for one in ordered
    ]


def _field(payload: Mapping[str, Any], table: str, name: str) -> str:
    inner = payload.get(table)
    return str(inner.get(name) or "") if isinstance(inner, Mapping) else ""


def _actions(payload: Mapping[str, Any]) -> str:
    return "; ".join(map(str, payload.get("recommended_actions") or []))


def anomaly_rows(anomalies: Sequence[Event]) -> list[dict[str, Any]]:
    """Reports in the order given: how severe, of what, and what to do."""
    return [
        {
            "time (UTC)": moment(one.time),
            "level": one.payload.get("level"),
            "severity": one.payload.get("severity"),
            "of": one.model_version or one.payload.get("run") or "",
            "signs": anomaly_words(one.payload),
            "what to do": _actions(one.payload),
        }
        for one in anomalies
    ]


def severities(anomalies: Sequence[Event]) -> tuple[np.ndarray, np.ndarray]:
    """Times and severities, oldest first; NaN where a report has none."""
    ordered = sorted(anomalies, key=lambda one: one.time)
    values = [one.payload.get("severity") for one in ordered]
    return (
        np.array([one.time for one in ordered], dtype=float),
        np.array([math.nan if one is None else one for one in values], dtype=float),
    )
