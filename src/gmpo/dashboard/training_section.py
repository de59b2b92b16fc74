"""The section of training runs: their figures side by side, and any metric's course."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import streamlit as st

from gmpo.dashboard.figures import runs_figure
from gmpo.dashboard.runs import RunLog, RunWatch, metric_names, metric_series
from gmpo.dashboard.tables import plain
from gmpo.errors import GmpoError

__all__ = ["draw_training", "run_row"]

_AT_FIRST = 6
_USUAL = ("rollout/reward", "evaluation/accuracy", "ratio/am_gm_gap", "update/gradient_norm")


def draw_training(watch: RunWatch, folders: Mapping[str, Path]) -> None:
    """Draw the runs as they stand now; one that cannot be read hides none of the others."""
    if not folders:
        st.info("There is no run in these folders yet; `gmpo train` makes one. It shows up here.")
        return
    chosen = _chosen("runs", sorted(folders), at_first=list(folders)[:_AT_FIRST], key="runs")
    if len(chosen) < len(folders):
        st.caption(f"{len(chosen)} of {len(folders)} runs.")
    logs: dict[str, RunLog] = {}
    for name in chosen:
        try:
            logs[name] = watch.log(folders[name])
        except GmpoError as error:
            st.error(plain(str(error)))
    if not logs:
        return
    rows = [run_row(name, log) for name, log in logs.items()]
    numbers = [name for name in rows[0] if name not in ("run", "rounds")]
    st.dataframe(
        rows,
        key="run_table",
        hide_index=True,
        column_config={name: st.column_config.NumberColumn(format="%.3g") for name in numbers},
    )
    _draw_metrics(logs)


def _draw_metrics(logs: Mapping[str, RunLog]) -> None:
    metrics = metric_names(list(logs.values()))
    if not metrics:
        st.info("None of these runs has finished a round yet.")
        return
    shown = _chosen(
        "metrics (docs/metrics.md says what each means)",
        metrics,
        at_first=[name for name in _USUAL if name in metrics],
        key="metrics",
    )
    columns = st.columns(2)
    for place, metric in enumerate(shown):
        series = {name: metric_series(log, metric) for name, log in logs.items()}
        measured = {name: one for name, one in series.items() if one[0]}
        with columns[place % 2]:
            st.markdown(f"**{plain(metric)}**")
            st.plotly_chart(runs_figure(measured, metric=metric, x="round"), key=f"metric {metric}")


def _chosen(label: str, options: list[str], *, at_first: list[str], key: str) -> list[str]:
    """What the visitor chose, of the options that there are now.

    Runs and metrics come while the page is open, and a changed list makes a new field; the choice
    is kept beside it.
    """
    kept = st.session_state.get(f"chosen {key}", at_first)
    st.session_state[key] = [name for name in st.session_state.get(key, kept) if name in options]
    chosen = st.multiselect(label, options, key=key)
    st.session_state[f"chosen {key}"] = chosen
    return chosen


def run_row(name: str, log: RunLog) -> dict[str, Any]:
    """A run's newest figures; None is not measured."""
    rounds = [line for line in log.metrics if line["kind"] == "round"]
    evaluations = [line for line in log.metrics if line["kind"] == "evaluation"]
    rewards = _measured(rounds[-10:], "rollout/reward")
    seconds = ("time/rollout_seconds", "time/reward_seconds", "time/update_seconds")
    return {
        "run": name,
        "rounds": len(rounds),
        "reward, last ten rounds": sum(rewards) / len(rewards) if rewards else None,
        "held-out accuracy": _last(evaluations, "evaluation/accuracy"),
        "smallest ratio": min(_measured(rounds, "ratio/min"), default=None),
        "largest ratio": max(_measured(rounds, "ratio/max"), default=None),
        "tokens/s": _last(rounds, "time/tokens_per_second"),
        "minutes": sum(sum(_measured(rounds, one)) for one in seconds) / 60,
    }


def _measured(lines: list[Mapping[str, Any]], name: str) -> list[float]:
    return [line[name] for line in lines if line.get(name) is not None]


def _last(lines: list[Mapping[str, Any]], name: str) -> float | None:
    found = _measured(lines, name)
    return found[-1] if found else None
