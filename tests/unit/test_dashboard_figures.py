"""What is drawn of traffic and runs, by value."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from tests.commands import jsonl

from gmpo.dashboard.alert_section import alert_rows
from gmpo.dashboard.figures import (
    MAX_POINTS,
    accuracy_figure,
    geometric_mean_figure,
    latency_figure,
    ratio_figure,
    runs_figure,
)
from gmpo.dashboard.runs import RunLog, RunWatch, metric_names, metric_series, sequence_ratios
from gmpo.dashboard.settings import VARIABLE, DashboardSettings, run_folders, settings_from
from gmpo.dashboard.tables import event_rows, moment, plain, reason_words, seconds_words
from gmpo.dashboard.training_section import run_row
from gmpo.dashboard.trends import Boxes, Span, trend
from gmpo.errors import ConfigError, DataError
from gmpo.store import AlertRow, Event

SPAN = Span(start=0, end=60)


def test_accuracy_lies_over_bars_of_answers_a_second():
    judged = trend(np.array([0.5, 0.6]), np.array([1.0, 0.0]), SPAN, is_share=True)
    answers = trend(np.array([0.2, 0.3, 0.4, 5.0]), np.ones(4), SPAN)
    figure = accuracy_figure(judged, answers, span_seconds=60)
    bars, low, high, line = figure.data
    assert list(bars.y) == [3, 1]
    assert str(bars.x[0]) == "1970-01-01T00:00:00.500"
    assert list(line.y) == [0.5]
    assert low.y[0] < 0.5 < high.y[0]
    assert line.name == "accuracy"


def test_no_point_of_a_line_stands_before_the_first_value_or_after_the_last():
    # Ten-second parts for two judgements, and one-second parts for the rest.
    first, last = np.array([8.0, 9.0, 9.5]), np.array([51.0, 51.5])
    for times in (first, last, np.concatenate([first, last])):
        shares = trend(times, np.ones(len(times)), SPAN, is_share=True)
        for figure in (
            accuracy_figure(shares, trend(times, np.ones(len(times)), SPAN), span_seconds=60),
            geometric_mean_figure(trend(times, np.ones(len(times)), SPAN)),
        ):
            for line in (one for one in figure.data if one.type == "scatter"):
                at = line.x.astype("datetime64[ms]").astype(int) / 1000
                assert min(times) <= min(at) and max(at) <= max(times)
    assert shares.time[0] == 5.0 and shares.mean_time[0] == pytest.approx((8 + 9 + 9.5) / 3)


def test_the_bars_of_ratios_are_shares_and_one_is_centred_at_1():
    figure = ratio_figure(np.array([1.0, 1.0, 1.0, 1.5]), np.array([0.5, 1.0]))
    before, newest = figure.data
    assert (before.name, newest.name) == ("before (2)", "newest (4)")
    assert sum(newest.y) == pytest.approx(1)
    assert sum(before.y) == pytest.approx(1)
    middle = int(np.abs(np.array(newest.x) - 1).argmin())
    assert newest.x[middle] == pytest.approx(1)
    assert newest.y[middle] == pytest.approx(0.75)
    assert before.y[middle] == pytest.approx(0.5)


@pytest.mark.parametrize("ratios", [[1.0], [0.01, 30.0], [1e-9, 1.0], [3.0, 4.0]])
def test_every_ratio_is_in_a_bar(ratios: list[float]):
    (bars,) = ratio_figure(np.array(ratios), np.empty(0)).data
    assert sum(bars.y) == pytest.approx(1)


def test_a_box_takes_its_quantiles_as_they_are():
    boxes = Boxes(
        versions=("<b>v1</b>",),
        q05=(0.1,),
        q25=(0.2,),
        q50=(0.3,),
        q75=(0.4,),
        q95=(0.5,),
        counts=(9,),
    )
    (box,) = latency_figure(boxes).data
    assert (box.lowerfence[0], box.q1[0], box.median[0], box.q3[0], box.upperfence[0]) == (
        *(0.1, 0.2, 0.3, 0.4, 0.5),
    )
    assert box.x[0] == "&lt;b&gt;v1&lt;/b&gt;"


def latency_axis(q05: float, q95: float):
    inner = {"q25": (q05,), "q50": (q95,), "q75": (q95,)}
    return latency_figure(
        Boxes(versions=("v1",), q05=(q05,), q95=(q95,), counts=(9,), **inner)
    ).layout.yaxis


@pytest.mark.parametrize(
    ("q05", "q95", "labels"),
    [
        (0.7, 13.0, "0.1 0.2 0.5 1 2 5 10 20 50 100 200 500"),
        (0.031, 0.9, "0.01 0.02 0.05 0.1 0.2 0.5 1 2 5"),
        (0.15, 103.0, "0.1 0.2 0.5 1 2 5 10 20 50 100 200 500 1000 2000 5000"),
        (0.004, 120.0, "0.001 0.01 0.1 1 10 100 1000"),
    ],
)
def test_a_latency_axis_over_more_than_tenfold_has_labels_in_full(
    q05: float, q95: float, labels: str
):
    axis = latency_axis(q05, q95)
    assert axis.type == "log" and axis.dtick is None
    assert axis.ticktext == tuple(labels.split())
    assert axis.tickvals == tuple(float(label) for label in labels.split())
    assert sum(q05 <= tick <= q95 for tick in axis.tickvals) >= 3


@pytest.mark.parametrize(("q05", "q95"), [(0.7, 6.9), (0.0, 5.0)])
def test_a_latency_axis_without_tenfold_or_with_zero_is_not_logarithmic(q05: float, q95: float):
    axis = latency_axis(q05, q95)
    assert (axis.type, axis.tickvals, axis.rangemode) == (None, None, "tozero")


def test_the_geometric_mean_has_its_band():
    low, high, line = geometric_mean_figure(
        trend(np.array([1.0, 1.0, 1.0]), np.array([0.2, 0.4, 0.6]), SPAN)
    ).data
    assert list(line.y) == pytest.approx([0.4])
    assert (low.y[0], high.y[0]) == (pytest.approx(0.24), pytest.approx(0.56))


def test_long_runs_are_thinned_together():
    rounds = [float(n) for n in range(50_000)]
    series = {name: (rounds, [math.sin(n) for n in rounds]) for name in ("a", "b", "c")}
    figure = runs_figure(series, metric="rollout/reward", x="round")
    assert sum(len(trace.x) for trace in figure.data) <= MAX_POINTS
    assert [trace.name for trace in figure.data] == ["a", "b", "c"]


def test_a_gap_stays_a_gap():
    (line,) = runs_figure({"a": ([1.0, 2.0, 3.0], [1.0, None, 3.0])}, metric="m", x="round").data
    assert math.isnan(line.y[1])


def round_line(number: int, **values: float | None) -> dict[str, object]:
    named = {name.replace("__", "/"): value for name, value in values.items()}
    return {"kind": "round", "round": number, "step": 4 * number, **named}


def test_series_are_those_of_rounds_and_evaluations():
    log = RunLog(
        metrics=(
            {"kind": "step", "round": 1, "step": 1, "ratio/max": 9.0},
            round_line(1, ratio__max=2.0, rollout__reward=0.5),
            {"kind": "evaluation", "round": 1, "evaluation/accuracy": 0.25},
            round_line(2, ratio__max=None, rollout__reward=0.75),
        ),
        rollouts=(),
    )
    assert metric_series(log, "ratio/max") == ([1.0, 2.0], [2.0, None])
    assert metric_series(log, "evaluation/accuracy") == ([1.0], [0.25])
    assert metric_names([log]) == ["evaluation/accuracy", "ratio/max", "rollout/reward"]
    row = run_row("mine", log)
    assert row["rounds"] == 2
    assert row["reward, last ten rounds"] == 0.625
    assert row["held-out accuracy"] == 0.25
    assert row["largest ratio"] == 2.0
    assert row["tokens/s"] is None


def test_ratios_are_those_of_the_newest_ten_rounds_and_of_those_before():
    groups = tuple(
        {"round": number, "rollouts": [{"ratio": {"sequence": float(number)}}, {"ratio": None}]}
        for number in range(1, 13)
    )
    newest, earlier = sequence_ratios(RunLog(metrics=(), rollouts=groups))
    assert newest.tolist() == [float(n) for n in range(3, 13)]
    assert earlier.tolist() == [1.0, 2.0]
    newest, earlier = sequence_ratios(RunLog(metrics=(), rollouts=()))
    assert len(newest) == len(earlier) == 0


def test_a_run_is_read_again_once_it_has_changed(tmp_path: Path):
    watch = RunWatch()
    assert watch.log(tmp_path).metrics == ()
    jsonl(tmp_path / "metrics.jsonl", [round_line(1)])
    first = watch.log(tmp_path).metrics
    assert len(first) == 1
    assert watch.log(tmp_path).metrics is first
    jsonl(tmp_path / "metrics.jsonl", [round_line(1), round_line(2)])
    assert len(watch.log(tmp_path).metrics) == 2
    (tmp_path / "metrics.jsonl").write_text("{\n{}\n")
    with pytest.raises(DataError, match="line 1"):
        watch.log(tmp_path)


def test_runs_are_found_in_folders_the_newest_first(tmp_path: Path):
    import os

    for age, name in enumerate(["new", "old"]):
        (tmp_path / name).mkdir()
        file = jsonl(tmp_path / name / "metrics.jsonl", [])
        os.utime(file, (1000 - age, 1000 - age))
    (tmp_path / "no-run").mkdir()
    assert list(run_folders((str(tmp_path),))) == ["new", "old"]
    assert run_folders((str(tmp_path / "old"),)) == {"old": tmp_path / "old"}
    assert run_folders((str(tmp_path / "gone"),)) == {}
    other = tmp_path / "no-run" / "old"
    other.mkdir()
    jsonl(other / "metrics.jsonl", [])
    found = run_folders((str(tmp_path), str(other)))
    assert set(found) == {"new", "old", "no-run/old"}
    assert found["no-run/old"] == other


def test_runs_of_one_name_are_told_apart_by_what_differs(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [f"learn/cycle-{number}/update/run" for number in (1, 2)]
    for run in runs:
        Path(run).mkdir(parents=True)
        jsonl(Path(run) / "metrics.jsonl", [])
    found = run_folders((runs[0], str(tmp_path / runs[1])))
    assert found == {
        "cycle-1/update/run": Path(runs[0]),
        "cycle-2/update/run": tmp_path / runs[1],
    }


def test_a_champions_reason_is_a_sentence_where_one_is_known():
    gate = {"outcome": "pass", "sentence": "pass: +7.8 points on 600 items"}
    assert (
        reason_words({"kind": "promotion", "by": "cycle 2", "evidence": gate})
        == "promotion by cycle 2: pass: +7.8 points on 600 items"
    )
    assert reason_words({"kind": "adoption", "why": "the first"}) == "adoption: the first"
    assert reason_words({"kind": "promotion", "by": "ann", "evidence": {}}) == (
        '{"kind": "promotion", "by": "ann", "evidence": {}}'
    )


def test_settings_survive_the_way_through_the_environment():
    settings = DashboardSettings(store="postgresql://u:p@h/d", runs=("a", "b"), every_seconds=2)
    assert settings_from({VARIABLE: settings.as_json()}) == settings
    with pytest.raises(ConfigError, match="gmpo dashboard"):
        settings_from({})
    with pytest.raises(ConfigError, match="nothing to show"):
        DashboardSettings(store=None, runs=())


def test_an_event_is_one_line():
    events = [
        Event(
            kind="answer",
            time=0.0,
            model_version="v1",
            payload={
                "status": 200,
                "finish_reason": "stop",
                "latency_s": 0.25,
                "completion_tokens": 8,
                "quality": 0.5,
                "fell_back": True,
                "fallback_reason": "timeout",
                "error": None,
            },
        ),
        Event(kind="swap", time=1.0, payload={"previous": "v1", "version": "v2"}),
        Event(kind="removed", time=2.0, payload={"active": 3, "queue": None, "x": "\x1b[2J" * 99}),
    ]
    first, second, third, fourth = event_rows(
        [*events, Event(kind="outcome", time=3, payload={"success": 1, "latency_s": 0.12345})]
    )
    assert fourth["what"] == "success 1, latency 0.123"
    assert first == {
        "time (UTC)": "1970-01-01 00:00:00",
        "kind": "answer",
        "model version": "v1",
        "what": "200, stop, 250 ms, 8 tokens, quality 0.50, fell back: timeout",
    }
    assert second["what"] == "v2 serves in place of v1"
    assert third["what"].startswith('{"active": 3, "x": "\\u001b[2J')
    assert len(third["what"]) == 160
    assert json.dumps([first, second, third])


def test_a_judgement_tells_only_what_is_not_as_usual():
    usual = {"variant": "control", "served_variant": "control", "fell_back": False, "success": 0}
    unusual = {"variant": "control", "served_variant": "main", "fell_back": True, "success": 1}
    thumb = {"score": 1.0, "thumbs": "up", "comment_length": 0}
    rows = event_rows(
        [
            Event(kind="outcome", time=1.0, payload=usual),
            Event(kind="outcome", time=2.0, payload=unusual),
            Event(kind="feedback", time=3.0, payload=thumb),
            Event(kind="feedback", time=4.0, payload={**thumb, "comment_length": 7}),
        ]
    )
    assert [row["what"] for row in rows] == [
        "variant control, success 0",
        "variant control, served variant main, fell back True, success 1",
        "score 1, thumbs up",
        "score 1, thumbs up, comment length 7",
    ]


def test_memory_is_told_in_units_that_can_be_read():
    figures = {"memory_bytes": 824_633_720, "running_completions": 3}
    rows = event_rows(
        [
            Event(kind="metric", time=1.0, payload=figures),
            Event(kind="metric", time=2.0, payload={"memory_bytes": 1.5 * 2**30}),
            Event(kind="metric", time=3.0, payload={"memory_bytes": None}),
        ]
    )
    # 824,633,720 / 2^20 = 786.4.
    assert [row["what"] for row in rows] == [
        "memory 786 MiB, running completions 3",
        "memory 1.50 GiB",
        "",
    ]


def test_texts_of_people_are_not_shown():
    kept = {"prompt": "my secret", "completion": "a secret answer"}
    (row,) = event_rows([Event(kind="text", time=0.0, payload=kept)])
    assert row["what"] == "with prompt, completion"


def test_words():
    assert moment(1e9) == "2001-09-09 01:46:40"
    assert seconds_words(0.0126) == "13 ms"
    assert seconds_words(2.5) == "2.50 s"
    assert plain("a *b* [c](d)") == r"a \*b\* \[c\]\(d\)"


def test_a_change_of_champion_is_told_with_its_reason_first():
    gate = {"sentence": "pass: +2.0 points", "suites": ["long"] * 50}
    told = {
        "name": "bot",
        "previous": "v1",
        "revision": 2,
        "reason": {"kind": "promotion", "by": "cycle 2", "evidence": gate},
    }
    first = {"name": "bot", "previous": None, "revision": 1, "reason": {"kind": "adoption"}}
    rows = event_rows(
        [
            Event(kind="promotion", time=0.0, payload=told, model_version="v2"),
            Event(kind="rollback", time=0.0, payload={**told, "reason": {"kind": "x", "why": "y"}}),
            Event(kind="promotion", time=0.0, payload=first),
        ]
    )
    assert [row["what"] for row in rows] == [
        "champion of bot in place of v1; promotion by cycle 2: pass: +2.0 points",
        "champion of bot in place of v1; x: y",
        'champion of bot; {"kind": "adoption"}',
    ]


@pytest.mark.parametrize(
    ("told", "what_to_do"),
    [
        ({"annotations": {"summary": "slow", "action": "add a gateway"}}, "add a gateway"),
        ({"annotations": {"summary": "damaged"}, "recommended_actions": ["a", "b"]}, "a; b"),
        ({"annotations": {"summary": "slow", "action": "c"}, "recommended_actions": ["a"]}, "c"),
        ({}, ""),
    ],
)
def test_an_alert_says_what_to_do_wherever_its_sender_put_it(
    told: dict[str, object], what_to_do: str
):
    alert = AlertRow(
        fingerprint="1",
        status="firing",
        severity="critical",
        starts_at=0.0,
        ends_at=None,
        payload={"labels": {"alertname": "ChampionDamaged"}, **told},
    )
    (row,) = alert_rows([alert])
    assert (row["alert"], row["what to do"]) == ("ChampionDamaged", what_to_do)
