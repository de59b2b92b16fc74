"""The page in a real Chromium: it is drawn without a complaint, and follows the store by itself."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.dashboard_stores import (
    add_experiment,
    add_trouble,
    add_versions,
    answers,
    fill,
    outcomes,
    write_run,
)
from tests.programs import chromium_or_missing

from gmpo.dashboard.serving_page import dashboard_process, free_port
from gmpo.dashboard.settings import DashboardSettings
from gmpo.store import open_store

SECTIONS = ("Training", "Experiments", "Versions", "Alerts", "Overview")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    browser_path = chromium_or_missing()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        yield browser
        browser.close()


def test_every_section_is_drawn_and_the_page_follows_the_store(chromium: Any, tmp_path: Path):
    now = time.time()
    answered = list(answers(300, start=now - 1800, end=now - 1))
    url = fill(tmp_path / "store.db", [*answered, *outcomes(answered)])
    add_experiment(url, "e", units=300, start=now - 900, end=now - 10)
    add_versions(url, first=now - 1800, second=now - 900)
    add_trouble(url, start=now - 1800, end=now - 60)
    runs = (str(write_run(tmp_path / "run")),)
    settings = DashboardSettings(store=url, runs=runs, every_seconds=0.5)
    port = free_port("127.0.0.1", 0)
    with dashboard_process(settings, host="127.0.0.1", port=port):
        page = chromium.new_page(viewport={"width": 1280, "height": 1000})
        complaints: list[str] = []
        page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else 0)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(f"http://127.0.0.1:{port}")
        for section in SECTIONS:
            page.get_by_role("radio", name=section, exact=True).or_(
                page.get_by_role("button", name=section, exact=True)
            ).first.click()
            page.locator(".js-plotly-plot .main-svg").first.wait_for(timeout=30_000)
            page.locator('[data-testid="stDataFrame"]').first.wait_for(timeout=30_000)
            assert page.locator('[data-testid="stException"]').count() == 0
        accuracy = page.locator('[data-testid="stMetricValue"]').first
        accuracy.wait_for()
        before = accuracy.inner_text()
        with open_store(url) as store:
            store.add_events(
                [
                    *outcomes(
                        list(answers(900, start=time.time() - 60, end=time.time() - 1, seed=5)),
                        every=1,
                    )
                ]
            )
        # Nobody touches the page: its fragment looks at the store again.
        page.wait_for_function(
            """before => before !==
            document.querySelector('[data-testid="stMetricValue"]').innerText""",
            arg=before,
            timeout=30_000,
        )
        assert complaints == []
        page.close()
