"""The page's script over real stores and run folders, without a browser."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest
from tests.dashboard_stores import (
    add_experiment,
    add_trouble,
    add_versions,
    answers,
    fill,
    outcomes,
    write_run,
)

import gmpo.dashboard
from gmpo.abtest_report import report_of
from gmpo.dashboard.experiment_section import ReportWatch
from gmpo.dashboard.figures import MAX_POINTS
from gmpo.dashboard.settings import VARIABLE, DashboardSettings
from gmpo.dashboard.watching import StoreWatch
from gmpo.errors import StoreError
from gmpo.store import Event, open_store

PAGE = Path(gmpo.dashboard.__file__).with_name("page.py")


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch):
    """Opens the page on a store and runs, as `gmpo dashboard` would."""
    import streamlit

    streamlit.cache_resource.clear()

    def opened(store: str | None = None, runs: tuple[Path, ...] = ()) -> AppTest:
        settings = DashboardSettings(store=store, runs=tuple(map(str, runs)))
        monkeypatch.setenv(VARIABLE, settings.as_json())
        app = AppTest.from_file(str(PAGE), default_timeout=120).run()
        assert not app.exception, app.exception
        return app

    return opened


def figures(app: AppTest) -> list[dict]:
    import json

    return [json.loads(chart.proto.spec) for chart in app.get("plotly_chart")]


def words(app: AppTest) -> list[str]:
    return [metric.value for metric in app.metric]


def test_an_empty_store_shows_an_empty_page_that_says_why(page, tmp_path: Path):
    app = page(fill(tmp_path / "store.db", []))
    assert words(app) == ["-", "-", "-", "-"]
    assert not any("the same length before" in one.value for one in app.caption)
    assert any("No answer is recorded yet" in one.value for one in app.info)
    assert not app.error


def test_a_filled_store_shows_its_figures_and_the_newest_events(page, tmp_path: Path):
    now = time.time()
    answered = list(answers(500, start=now - 1800, end=now - 1))
    # Two judged requests: one in two succeeded.
    judged = [
        Event(kind="outcome", time=now - 60, payload={"success": n}, request_id=f"r{n}")
        for n in (0, 1)
    ]
    url = fill(tmp_path / "store.db", [*answered, *judged])
    app = page(url, (write_run(tmp_path / "run"),))
    accuracy, latency, stability, throughput = words(app)
    assert accuracy == "50.0 %"
    assert latency.endswith(" ms")
    assert 0 < float(stability) < 1
    assert throughput.endswith("/s")
    assert len(figures(app)) == 4
    assert len(app.dataframe[0].value) == 50
    assert app.dataframe[0].value["kind"].tolist()[:3] == ["outcome", "outcome", "answer"]
    # What is written later is there at the next look.
    with open_store(url) as store:
        store.add_events([Event(kind="swap", time=now, payload={"previous": "a", "version": "b"})])
    app.run()
    assert app.dataframe[0].value["what"][0] == "b serves in place of a"


def test_a_change_that_rounds_to_nothing_has_no_arrow(page, tmp_path: Path):
    now = time.time()
    events = []
    # An hour and the one before it, alike but for a quality that is worse by one in 100,000.
    # Neither comes near the border of the hours, however long the page takes to be drawn.
    for start, quality, better in ((now - 7000, 0.9, 0), (now - 3400, 0.89999, 40)):
        for place in range(100):
            of = {"time": start + 30 * place, "request_id": f"{start}-{place}"}
            payload = {"status": 200, "latency_s": 0.5, "quality": quality * (place % 2 or 0.5)}
            events.append(Event(kind="answer", payload=payload, **of))
            success = int(place % 2 == 0 or place < better)
            events.append(Event(kind="outcome", payload={"success": success}, **of))
    app = page(fill(tmp_path / "store.db", sorted(events, key=lambda one: one.time)))
    app.segmented_control(key="span").set_value("1 hour").run()
    accuracy, latency, stability, _ = app.metric
    # 50 of 100, and 20 more of the second hour.
    assert (accuracy.value, accuracy.delta) == ("70.0 %", "+20.0 points")
    for one in (latency, stability):
        assert one.delta == "no change", one
        assert one.proto.direction == one.proto.MetricDirection.NONE
        assert one.proto.color == one.proto.MetricColor.GRAY
    assert accuracy.proto.direction == accuracy.proto.MetricDirection.UP
    assert any("the same length before" in one.value for one in app.caption)


def test_no_choice_can_be_taken_back(page, tmp_path: Path):
    app = page(fill(tmp_path / "store.db", []))
    for key in ("section", "span"):
        assert app.segmented_control(key=key).proto.required, key


def test_another_span_shows_other_figures(page, tmp_path: Path):
    now = time.time()
    old = list(answers(100, start=now - 9000, end=now - 8000))
    app = page(fill(tmp_path / "store.db", old))
    # An hour would show nothing, so the page begins with a day.
    assert app.segmented_control(key="span").value == "1 day"
    # Nothing happened in the day before, so that there is nothing to compare with.
    assert not any("the same length before" in one.value for one in app.caption)
    assert words(app)[1] != "-"
    app.segmented_control(key="span").set_value("5 minutes").run()
    assert words(app)[1] == "-"
    assert any("the newest answer came" in one.value for one in app.info)


def test_200_thousand_events_are_drawn_from_few_points(page, tmp_path: Path):
    now = time.time()
    answered = list(answers(150_000, start=now - 80_000, end=now - 1))
    url = fill(tmp_path / "store.db", [*answered, *outcomes(answered)])
    began = time.perf_counter()
    app = page(url)
    first = time.perf_counter() - began
    began = time.perf_counter()
    app.segmented_control(key="span").set_value("all").run()
    again = time.perf_counter() - began
    assert not app.exception
    assert words(app)[0] != "-"
    for figure in figures(app):
        for trace in figure["data"]:
            assert len(trace.get("x", [])) <= MAX_POINTS
    # Events are read once; a later look reads only what is new.
    assert again < first / 2


def test_runs_alone_are_shown_side_by_side(page, tmp_path: Path):
    runs = tmp_path / "runs"
    write_run(runs / "slow", seed=2)
    write_run(runs / "fast", seed=0)
    app = page(runs=(runs,))
    table = app.dataframe[0].value
    assert sorted(table["run"]) == ["fast", "slow"]
    assert table["rounds"].tolist() == [40, 40]
    assert len(figures(app)) == 4
    assert sorted(trace["name"] for trace in figures(app)[0]["data"]) == ["fast", "slow"]
    app.multiselect(key="metrics").set_value(["ratio/max"]).run()
    assert len(figures(app)) == 1


def test_what_was_chosen_stays_while_runs_and_metrics_come(page, tmp_path: Path):
    runs = tmp_path / "runs"
    write_run(runs / "b", rounds=4)  # no evaluation yet
    write_run(runs / "c", rounds=4)
    app = page(runs=(runs,))
    app.multiselect(key="runs").set_value(["c"]).run()
    app.multiselect(key="metrics").set_value(["ratio/max"]).run()
    write_run(runs / "a", rounds=10)
    write_run(tmp_path / "longer", rounds=10)
    (tmp_path / "longer" / "metrics.jsonl").replace(runs / "c" / "metrics.jsonl")
    app.run()
    assert not app.exception
    assert "evaluation/accuracy" in app.multiselect(key="metrics").options
    assert "a" in app.multiselect(key="runs").options
    assert app.multiselect(key="runs").value == ["c"]
    assert app.multiselect(key="metrics").value == ["ratio/max"]


def test_a_span_that_was_chosen_stays_while_time_goes_by(page, tmp_path: Path):
    now = time.time()
    url = fill(tmp_path / "store.db", list(answers(10, start=now - 9000, end=now - 8000)))
    app = page(url)
    app.segmented_control(key="span").set_value("5 minutes").run()
    with open_store(url) as store:  # an hour would now be the page's own choice
        store.add_events(list(answers(10, start=now - 60, end=now)))
    app.run()
    assert app.segmented_control(key="span").value == "5 minutes"


def test_a_damaged_run_hides_neither_the_page_nor_other_runs(page, tmp_path: Path):
    write_run(tmp_path / "runs" / "whole")
    broken = write_run(tmp_path / "runs" / "broken", rounds=3)
    (broken / "metrics.jsonl").write_text('{"kind": \n', encoding="utf-8")
    app = page(runs=(tmp_path / "runs",))
    assert len(app.error) == 1
    assert "line 1" in app.error[0].value
    assert app.dataframe[0].value["run"].tolist() == ["whole"]


def test_a_damaged_newest_run_leaves_the_overview_all_that_the_store_holds(page, tmp_path: Path):
    now = time.time()
    answered = list(answers(500, start=now - 1800, end=now - 1))
    url = fill(tmp_path / "store.db", [*answered, *outcomes(answered)])
    whole = write_run(tmp_path / "runs" / "whole")
    broken = write_run(tmp_path / "runs" / "broken", rounds=3)
    (broken / "metrics.jsonl").write_text('{"kind": \n', encoding="utf-8")
    later = (whole / "metrics.jsonl").stat().st_mtime + 60
    os.utime(broken / "metrics.jsonl", (later, later))
    app = page(url, (tmp_path / "runs",))
    assert len(app.error) == 1
    assert "broken" in app.error[0].value and "line 1" in app.error[0].value
    assert "-" not in words(app)
    assert len(words(app)) == 4
    assert len(figures(app)) == 3  # all but the ratios of the run
    assert len(app.dataframe[0].value) == 50


def go_to(app: AppTest, section: str) -> AppTest:
    app.segmented_control(key="section").set_value(section).run()
    assert not app.exception, app.exception
    return app


def test_every_section_of_an_empty_store_says_what_would_fill_it(page, tmp_path: Path):
    app = page(fill(tmp_path / "store.db", []))
    assert "gmpo ab start" in go_to(app, "Experiments").info[0].value
    assert "No version is registered" in go_to(app, "Versions").info[0].value
    said = [one.value for one in go_to(app, "Alerts").caption]
    assert said == ["The store holds no alert.", "The store holds no anomaly report."]


def test_an_experiment_is_shown_with_its_sequence_and_what_to_do(page, tmp_path: Path):
    url = fill(tmp_path / "store.db", [])
    now = time.time()
    add_experiment(url, "prompt-length", units=1200, start=now - 5000, end=now - 10)
    add_experiment(url, "young", units=20, start=now - 60, end=now - 1)
    app = go_to(page(url), "Experiments")
    app.selectbox(key="experiment").set_value("prompt-length").run()
    reference = report_of(open_store(url, read_only=True), by_name(url, "prompt-length"))
    assert reference.decision.action == "promote"
    assert app.success[0].value.replace("\\", "") == reference.recommendation
    assert app.metric[0].value == "1,200 of 5,000"
    (figure,) = figures(app)
    estimate = next(trace for trace in figure["data"] if trace.get("name") == "estimate")
    assert len(estimate["x"]) == len(reference.path)
    assert app.dataframe[0].value["metric"].tolist()[0] == "success rate"
    app.selectbox(key="experiment").set_value("young").run()
    assert any("Not judged yet" in one.value for one in app.info)


def by_name(url: str, name: str):
    with open_store(url, read_only=True) as store:
        experiment = store.experiment(name)
    assert experiment is not None
    return experiment


def test_a_report_is_made_anew_only_after_a_rest(tmp_path: Path):
    url = fill(tmp_path / "store.db", [])
    add_experiment(url, "e", units=200, start=0, end=200)
    clock = iter([0.0, 2.0, 21.0, 23.0, 25.0]).__next__
    watch = ReportWatch(clock)
    with open_store(url) as store:
        experiment = by_name(url, "e")
        first = watch.report(store, experiment)  # takes from 0 to 2, so it rests until 22
        assert watch.report(store, experiment) is first  # at 21
        assert watch.report(store, experiment) is not first  # at 23
        assert first.num_units == 200


def add_ways(url: str, now: float) -> None:
    told = {"outcome": "inconclusive", "champion": "v1", "sentence": "120 more items would decide"}
    with open_store(url) as store:
        store.add_events([Event(kind="gate", time=now, payload=told, model_version="v2")])
        store.begin_cycle("support-bot", state="train", payload={})


def test_each_cycle_is_shown_with_its_outcome_and_reason(page, tmp_path: Path):
    told = {"passed": True, "sentence": "60 accepted", "details": {"long": ["x"] * 500}}
    wrong = {**told, "passed": False, "sentence": "59 disputed"}
    made = {**told, "sentence": "version v2", "details": {"new_model_version": "v2"}}
    result = {
        "success": False,
        "reason": "Data validation failed: poisoned",
        "details": {"new tasks": {"rejected": ["x"] * 500}},
        "new_model_version": None,
        "step": "validate",
        "sentence": "59 disputed",
    }
    url = fill(tmp_path / "store.db", list(answers(20, start=0.0, end=1.0)))
    with open_store(url) as store:
        cycle = store.begin_cycle("bot", state="validate", payload={})
        payload = {"reports": {"validate": wrong}, "result": result}
        store.move_cycle(cycle, state="refused", payload=payload, ends=True)
        goes_on = store.begin_cycle("bot", state="validate", payload={})
        payload = {"reports": {"validate": told, "update": made}}
        store.move_cycle(goes_on, state="evaluate", payload=payload)
    table = go_to(page(url), "Versions").dataframe[-1].value
    assert table["state"].tolist() == ["evaluate", "refused"]
    assert table["reason"].tolist() == ["", "Data validation failed: poisoned"]
    assert table["what decided"].tolist() == ["update: version v2", "validate: 59 disputed"]
    assert table["candidate"].tolist() == ["v2", ""]


def test_versions_show_the_champion_and_what_answered(page, tmp_path: Path):
    now = time.time()
    answered = list(answers(400, start=now - 1800, end=now - 1))
    num_whole = sum(event.payload["status"] == 200 for event in answered)
    assert 380 < num_whole < 400
    url = fill(tmp_path / "store.db", answered)
    add_versions(url, first=now - 1800, second=now - 900)
    add_ways(url, now)
    app = go_to(page(url), "Versions")
    gate, cycles = (table.value for table in app.dataframe[2:])
    assert gate["outcome"].tolist() == ["inconclusive"]
    assert gate["why"].tolist() == ["120 more items would decide"]
    assert cycles["state"].tolist() == ["train"]
    assert cycles["ended (UTC)"].tolist() == [""]
    table = app.dataframe[0].value
    assert table["version"].tolist() == ["9b1d44f0c2e7a135", "4337669ad7b75dc6"]
    assert table["champion"].tolist() == [True, False]
    assert table["whole answers"].sum() == num_whole
    assert app.dataframe[1].value["in place of"].tolist() == ["4337669ad7b75dc6", ""]
    (figure,) = figures(app)
    assert [trace["name"] for trace in figure["data"][:2]] == ["4337669ad7b…", "9b1d44f0c2e…"]
    assert figure["data"][2]["text"] == [
        "serves 9b1d44f0",
        "champion 4337669a",
        "champion 9b1d44f0",
    ]


def test_a_version_that_is_not_registered_has_empty_fields(page, tmp_path: Path):
    now = time.time()
    url = fill(tmp_path / "store.db", list(answers(20, start=now - 900, end=now - 1)))
    (table,) = (one.value for one in go_to(page(url), "Versions").dataframe)
    assert len(table) > 0
    for column in ("model", "registered (UTC)", "parent", "metrics"):
        assert set(table[column]) == {""}


def test_alerts_show_what_fires_first_and_what_to_do(page, tmp_path: Path):
    now = time.time()
    url = fill(tmp_path / "store.db", [])
    add_trouble(url, start=now - 1800, end=now - 60)
    app = go_to(page(url), "Alerts")
    alerts, anomalies = (table.value for table in app.dataframe)
    assert alerts["alert"].tolist() == ["GmpoLowQuality", "GmpoSlowAnswers"]
    assert alerts["status"].tolist() == ["firing", "resolved"]
    assert alerts["what to do"][0] == "look at the log"
    assert anomalies["level"][0] == "critical"
    assert anomalies["signs"][0] == "performance: success_rate 1, answer_quality 0.75"
    assert anomalies["what to do"][0] == "roll back"
    (figure,) = figures(app)
    assert len(figure["data"][0]["x"]) == 30


def test_alarms_of_runs_are_shown_with_runs_that_cannot_be_read(page, tmp_path: Path):
    runs = tmp_path / "runs"
    for name in ("fine", "broken"):
        write_run(runs / name)
    (runs / "broken" / "metrics.jsonl").write_text("{\n")
    app = go_to(page(runs=(runs,)), "Alerts")
    table = app.dataframe[0].value
    assert table["run"].tolist() == [str(runs / "broken")]
    assert table["alarm"].tolist() == ["GmpoRunUnreadable"]


def test_a_store_that_is_gone_is_said_on_the_page(page, tmp_path: Path):
    app = page(str(tmp_path / "gone.db"))
    assert len(app.error) == 1
    assert "there is no store" in app.error[0].value.replace("\\", "")


def test_a_watch_reads_every_event_once_and_says_what_it_skipped(store_url: str):
    url = fill(store_url, list(answers(30, start=0, end=30)))
    watch = StoreWatch(url, max_events=10)
    assert len(watch.traffic().time) == 10
    assert watch.num_skipped == 20
    with open_store(url) as store:
        store.add_events(list(answers(5, start=30, end=35)))
    assert len(watch.traffic().time) == 15
    assert len(watch.traffic().time) == 15
    with pytest.raises(StoreError, match="read-only"):
        watch.store.add_events(list(answers(1, start=0, end=1)))
    watch.store.close()
