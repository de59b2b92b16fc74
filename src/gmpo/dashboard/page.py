"""The script that Streamlit runs for every visitor; `gmpo dashboard` starts it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import streamlit as st

from gmpo.dashboard.alert_section import draw_alerts
from gmpo.dashboard.experiment_section import ReportWatch, draw_experiments
from gmpo.dashboard.overview import draw_overview
from gmpo.dashboard.runs import RunLog, RunWatch
from gmpo.dashboard.settings import DashboardSettings, run_folders, settings_from
from gmpo.dashboard.tables import plain
from gmpo.dashboard.training_section import draw_training
from gmpo.dashboard.version_section import draw_versions
from gmpo.dashboard.watching import StoreWatch
from gmpo.errors import GmpoError

__all__ = ["show_page"]


@st.cache_resource(show_spinner="reading the store")
def _store_watch(url: str) -> StoreWatch:
    watch = StoreWatch(url)
    watch.traffic()
    return watch


@st.cache_resource
def _run_watch() -> RunWatch:
    return RunWatch()


@st.cache_resource
def _report_watch() -> ReportWatch:
    return ReportWatch()


def show_page(settings: DashboardSettings) -> None:
    """Draw the chosen section, and draw it again every few seconds."""
    st.set_page_config(page_title="gmpo", layout="wide")
    # Streamlit leaves the height of a banner empty above the page.
    st.html("<style>.stMainBlockContainer {padding-top: 2.5rem}</style>")
    st.header("gmpo")
    sections = _sections(settings)
    chosen = st.segmented_control(
        "section",
        list(sections),
        default=next(iter(sections)),
        required=True,  # pressed again, a choice would be taken back and none be marked
        key="section",
        label_visibility="collapsed",
    )
    draw = sections[chosen]

    @st.fragment(run_every=settings.every_seconds)
    def live() -> None:
        try:
            draw()
        except GmpoError as error:  # a locked store may be readable at the next look
            st.error(plain(str(error)))

    live()


def _sections(settings: DashboardSettings) -> Mapping[str, Callable[[], None]]:
    url = settings.store
    sections: dict[str, Callable[[], None]] = {}
    if url is not None:
        sections["Overview"] = lambda: draw_overview(_store_watch(url), _newest_run(settings))
    if settings.runs:
        sections["Training"] = lambda: draw_training(_run_watch(), run_folders(settings.runs))
    if url is not None:
        sections["Experiments"] = lambda: draw_experiments(_store_watch(url).store, _report_watch())
        sections["Versions"] = lambda: draw_versions(_store_watch(url))
    sections["Alerts"] = lambda: draw_alerts(
        None if url is None else _store_watch(url).store, _run_watch(), run_folders(settings.runs)
    )
    return sections


def _newest_run(settings: DashboardSettings) -> tuple[str, RunLog] | None:
    """The run that was written last; None where there is none, or it cannot be read."""
    for name, folder in run_folders(settings.runs).items():
        try:
            return name, _run_watch().log(folder)
        except GmpoError as error:  # what the store holds does not need the run
            st.error(plain(str(error)))
            return None
    return None


if __name__ == "__main__":
    show_page(settings_from(os.environ))
