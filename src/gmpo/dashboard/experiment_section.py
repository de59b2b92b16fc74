"""The section of experiments: what to do, the confidence sequence, every metric."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import streamlit as st

from gmpo.abtest.report import ExperimentReport
from gmpo.abtest.wording import NAMES
from gmpo.abtest_report import METRIC_COLUMNS, judgement_lines, metric_rows, report_of
from gmpo.dashboard.figures import sequence_figure
from gmpo.dashboard.tables import moment, plain
from gmpo.store import Experiment, Store

__all__ = ["ReportWatch", "draw_experiments"]

_REST = 10.0


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """A report, what it was made from, and until when it is good enough."""

    state: tuple[Experiment, int | None]
    until: float
    report: ExperimentReport


class ReportWatch:
    """Reports of experiments, made anew as they go on; threads may share one.

    A report reads all of an experiment, so it is made at most so often that ten times its own
    duration lies between two of them.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._kept: dict[str, _Kept] = {}

    def report(self, store: Store, experiment: Experiment) -> ExperimentReport:
        """What the experiment shows; how old it is stands in its `time`.

        Raises:
            StoreError: the store cannot be read.
            ConfigError: the experiment's settings are not a plan.
        """
        with self._lock:
            kept = self._kept.get(experiment.name)
            began = self._clock()
            if kept is not None and kept.state[0] == experiment and began < kept.until:
                return kept.report
            newest = store.events(experiment=experiment.name, newest_first=True, limit=1)
            state = (experiment, newest[0].id if newest else None)
            # A running one grows older without events too.
            if kept is not None and experiment.status == "stopped" and kept.state == state:
                return kept.report
            made = report_of(store, experiment)
            ended = self._clock()
            until = ended + _REST * (ended - began)
            self._kept[experiment.name] = _Kept(state=state, until=until, report=made)
            return made


def draw_experiments(store: Store, watch: ReportWatch) -> None:
    """Draw the chosen experiment as it stands now."""
    experiments = {one.name: one for one in reversed(store.experiments())}
    if not experiments:
        st.info("There is no experiment yet; `gmpo ab start` begins one.")
        return
    names = sorted(experiments, key=lambda name: experiments[name].status != "running")
    name = st.selectbox(
        "experiment",
        names,
        format_func=lambda name: f"{name} ({experiments[name].status})",
        key="experiment",
    )
    report = watch.report(store, experiments[name])
    _draw_recommendation(report)
    _draw_counts(report)
    primary = report.primary
    st.markdown(f"**{NAMES[primary.metric]}: {100 * (1 - primary.alpha):g} % confidence sequence**")
    if report.path:
        st.plotly_chart(sequence_figure(report), key="sequence")
    else:
        st.info(
            f"Not judged yet: each arm needs {report.plan.burn_in} units with a known "
            f"{NAMES[primary.metric]}."
        )
    rows = [dict(zip(METRIC_COLUMNS, row, strict=True)) for row in metric_rows(report)]
    st.dataframe(rows, key="experiment_metrics", hide_index=True)
    for warning in report.warnings:
        st.warning(plain(warning))
    if lines := judgement_lines(report):
        st.caption(plain("success of " + "; of ".join(lines)))
    if report.counts:
        counted = ", ".join(f"{name} {count}" for name, count in sorted(report.counts.items()))
        st.caption(plain(f"counted: {counted}"))
    st.caption(f"As of {moment(report.time)} UTC; it may be looked at as often as one likes.")


def _draw_recommendation(report: ExperimentReport) -> None:
    text = plain(report.recommendation)
    if report.decision.action == "promote":
        st.success(text)
    elif report.decision.action in ("roll_back", "blocked"):
        st.error(text)
    else:
        st.info(text)


def _draw_counts(report: ExperimentReport) -> None:
    counts = report.ratio.counts
    units, shares, hours = st.columns(3)
    units.metric("Units", f"{report.num_units:,} of {report.plan.max_units:,}", border=True)
    shares.metric(
        "Control / candidate",
        f"{counts.get('control', 0):,} / {counts.get('candidate', 0):,}",
        help=f"Test of the shares: p = {report.ratio.p_value:.2g}. With an alarm nothing is "
        "decided.",
        border=True,
    )
    hours.metric("Hours", f"{report.hours:.1f}", border=True)
