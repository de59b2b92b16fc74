"""Events become columns, figures of a span and their course."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmpo.dashboard.traffic import Traffic, TrafficLog
from gmpo.dashboard.trends import (
    Span,
    headlines,
    latency_boxes,
    steady_figure,
    thinned,
    trend,
)
from gmpo.store import Event


def answer(time: float, *, version: str | None = "v1", **payload: Any) -> Event:
    whole = {
        "status": 200,
        "latency_s": 1.0,
        "first_token_s": None,
        "completion_tokens": 10,
        "quality": None,
        "mean_logprob": -0.5,
        "fell_back": False,
    }
    return Event(kind="answer", time=time, payload={**whole, **payload}, model_version=version)


def judged(kind: str, time: float, request: str | None, **payload: Any) -> Event:
    return Event(kind=kind, time=time, payload=payload, request_id=request)


def read(*events: Event) -> Traffic:
    log = TrafficLog()
    log.add(events)
    return log.traffic()


def test_answers_become_columns_and_what_is_not_known_is_nan():
    traffic = read(
        answer(10, latency_s=0.25, quality=0.5),
        answer(11, version="v2", status=499, mean_logprob=None),
        answer(12, version=None, status=429, completion_tokens=None),
    )
    assert traffic.versions == ("v1", "v2")
    assert traffic.version.tolist() == [0, 1, -1]
    assert traffic.time.tolist() == [10, 11, 12]
    assert traffic.latency.tolist() == [0.25, 1, 1]
    assert traffic.is_whole.tolist() == [True, False, False]
    assert traffic.quality[0] == 0.5
    assert math.isnan(traffic.quality[1])
    assert math.isnan(traffic.tokens[2])
    # exp(-0.5) for the whole answer; others have no probability.
    assert traffic.token_probability[0] == pytest.approx(0.6065306597)
    assert np.isnan(traffic.token_probability[1:]).all()


def test_a_log_that_grows_knows_the_same_as_one_read_at_once():
    events = [answer(t, version=f"v{t % 3}", latency_s=t) for t in range(10)]
    events += [judged("outcome", t, f"r{t}", success=t % 2) for t in range(4)]
    log = TrafficLog()
    for event in events:
        log.add([event])
        log.traffic()
    at_once = read(*events)
    for name, value in vars(log.traffic()).items():
        np.testing.assert_array_equal(value, getattr(at_once, name), err_msg=name)


def test_a_request_is_judged_once_by_its_outcome_before_its_feedback():
    traffic = read(
        judged("outcome", 1, "a", success=0),
        judged("outcome", 2, "b", success=None),
        judged("feedback", 3, "b", thumbs="up"),
        judged("feedback", 4, "a", thumbs="up"),  # the outcome stays
        judged("outcome", 5, "a", success=1),  # a later outcome replaces it, at its first time
        judged("feedback", 6, "c", score=0.25, comment_length=3),
        judged("feedback", 7, "d", comment_length=9),  # says nothing about success
        judged("feedback", 8, "e", thumbs="up"),
        judged("verdict", 9, "e", is_correct=False, by="checker"),  # before what a user thinks
        judged("verdict", 10, "f", is_correct=None, reference="5"),
    )
    seen = dict(zip(traffic.judged_at.tolist(), traffic.judgements.tolist(), strict=True))
    assert seen == {3: 1.0, 1: 1.0, 6: 0.25, 9: 0.0}


def test_what_nobody_judged_is_no_part_of_the_accuracy():
    traffic = read(
        judged("outcome", 1, "a", success=1, judged_by="presumed"),
        judged("outcome", 2, "b", success=0, judged_by="fault"),
        judged("outcome", 3, "c", success=0, judged_by="quality"),
        judged("outcome", 4, "d", success=1, judged_by="verifier"),
        judged("outcome", 5, "e", success=1, judged_by="presumed"),
        judged("outcome", 6, "e", success=0, judged_by="feedback"),
        judged("outcome", 7, "f", success=1),  # of before this was on record
        judged("verdict", 8, "a", is_correct=False, by="checker"),
    )
    seen = dict(zip(traffic.judged_at.tolist(), traffic.judgements.tolist(), strict=True))
    assert seen == {4: 1.0, 6: 0.0, 7: 1.0, 8: 0.0}


def test_what_cannot_be_read_is_counted_and_left_out():
    traffic = read(
        answer(1, latency_s="slow"),
        judged("outcome", 2, "a", success=3),
        judged("feedback", 3, "b", thumbs="sideways"),
        Event(kind="metric", time=4, payload={"memory_bytes": "?"}),
        answer(5),
    )
    assert traffic.num_malformed == 3
    assert traffic.time.tolist() == [5]
    assert len(traffic.judgements) == 0


def test_headlines_of_a_span_and_of_the_one_before():
    # Before: (0, 10]. Now: (10, 20]; 429 counts in nothing.
    traffic = read(
        answer(0.5, latency_s=4.0),
        answer(5, latency_s=2.0, mean_logprob=-1.0),
        answer(11, latency_s=1.0, completion_tokens=30, mean_logprob=-0.2),
        answer(12, latency_s=3.0, completion_tokens=None, mean_logprob=-0.6),
        answer(20, latency_s=5.0, completion_tokens=20, mean_logprob=-1.0),
        answer(20, status=429, latency_s=900.0),
        judged("outcome", 5, "a", success=1),
        judged("outcome", 11, "b", success=1),
        judged("outcome", 12, "c", success=0),
    )
    found = headlines(traffic, Span(start=10, end=20))
    assert found["accuracy"].now == 0.5
    assert found["accuracy"].change == -0.5
    assert found["latency"].now == 3.0
    assert found["latency"].before == 3.0
    assert found["latency_p95"].now == pytest.approx(4.8)
    assert found["stability"].now is None  # of so few
    assert found["throughput"].now == pytest.approx(0.3)
    # Traffic began at 0.5, so the span before has 9.5 seconds.
    assert found["throughput"].before == pytest.approx(2 / 9.5)
    assert found["tokens_per_second"].now == pytest.approx(5.0)


def test_headlines_of_nothing_are_none():
    found = headlines(read(), Span(start=0, end=60))
    assert all(one.now is None and one.before is None for one in found.values())
    assert all(one.change is None for one in found.values())


def test_stability_is_the_geometric_over_the_arithmetic_mean():
    # sqrt(0.4 * 0.9) = 0.6, and (0.4 + 0.9) / 2 = 0.65.
    mixed = [answer(15, quality=(0.4, 0.9)[n % 2], mean_logprob=-1.0) for n in range(20)]
    equal = [answer(5, quality=0.7, mean_logprob=-1.0) for _ in range(20)]
    span = Span(start=10, end=20)
    found = headlines(read(*equal, *mixed), span)["stability"]
    assert found.now == pytest.approx(0.6 / 0.65)
    assert found.before == 1.0
    assert headlines(read(*mixed, answer(16, quality=0.0)), span)["stability"].now == 0.0
    assert headlines(read(*mixed[1:]), span)["stability"].now is None
    # Without scores it is of token probabilities: ln 0.4 and ln 0.9.
    without = read(*(answer(15, mean_logprob=math.log((0.4, 0.9)[n % 2])) for n in range(20)))
    assert steady_figure(without, span) == "token_probability"
    assert headlines(without, span)["stability"].now == pytest.approx(0.6 / 0.65)


def test_one_answer_has_no_stability_and_a_rate_over_at_least_a_second():
    found = headlines(read(answer(60)), Span(start=0, end=60))
    assert found["stability"].now is None
    assert found["throughput"].now == pytest.approx(1.0)


def test_a_trend_is_the_mean_of_each_part_that_holds_values():
    # 60 seconds in 60 parts of one; 1.5 and 1.9 fall into the second.
    times = np.array([1.9, 1.5, 59.5, 60.0, 0.0, 61.0, 30.0])
    values = np.array([1.0, 3.0, 5.0, 7.0, 100.0, 100.0, math.nan])
    found = trend(times, values, Span(start=0, end=60))
    assert found.time.tolist() == [1.5, 59.5]
    assert found.value.tolist() == [2.0, 6.0]
    assert found.count.tolist() == [2, 2]
    assert found.low.tolist() == pytest.approx([1.2, 5.2])
    assert found.high.tolist() == pytest.approx([2.8, 6.8])


def test_the_band_of_a_share_is_wilsons():
    found = trend(
        np.full(10, 30.0), np.repeat([1.0, 0.0], [8, 2]), Span(start=0, end=60), is_share=True
    )
    assert found.value.tolist() == [0.8]
    # Wilson's 95 % interval of 8 in 10.
    assert found.low[0] == pytest.approx(0.4902, abs=1e-4)
    assert found.high[0] == pytest.approx(0.9433, abs=1e-4)


def test_few_judgements_make_few_parts():
    # 100 judgements make 100 // 40 = 2 parts, but at least 6 of ten seconds each; 2,400 make 60.
    few = trend(np.linspace(0.1, 60, 100), np.ones(100), Span(start=0, end=60), is_share=True)
    assert few.time.tolist() == pytest.approx([5, 15, 25, 35, 45, 55])
    many = trend(np.linspace(0.1, 60, 2400), np.ones(2400), Span(start=0, end=60), is_share=True)
    assert len(many.time) == 60


def test_boxes_of_whole_answers_by_version():
    events = [answer(1, version="a", latency_s=float(s)) for s in range(101)]
    events += [answer(2, version="b", status=500), answer(3, version="c", latency_s=7.0)]
    boxes = latency_boxes(read(*events), Span(start=0, end=10))
    assert boxes.versions == ("a", "c")
    assert boxes.counts == (101, 1)
    assert (boxes.q05[0], boxes.q25[0], boxes.q50[0], boxes.q75[0], boxes.q95[0]) == (
        *(pytest.approx(level) for level in (5, 25, 50, 75, 95)),
    )
    assert boxes.q05[1] == boxes.q95[1] == 7.0
    assert latency_boxes(read(), Span(start=0, end=10)).versions == ()


def test_a_short_line_is_not_thinned():
    x, y = np.arange(4.0), np.array([1.0, math.nan, 2.0, 3.0])
    kept_x, kept_y = thinned(x, y, max_points=4)
    assert kept_x is x
    assert kept_y is y


@given(
    st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=1, max_size=300),
    st.integers(2, 50),
)
def test_thinning_keeps_the_extremes_and_the_order(values: list[float], max_points: int):
    x, y = np.arange(float(len(values))), np.array(values)
    kept_x, kept_y = thinned(x, y, max_points=max_points)
    assert len(kept_x) <= max_points
    assert (np.diff(kept_x) > 0).all()
    assert np.array_equal(y[kept_x.astype(int)], kept_y, equal_nan=True)
    if not np.isnan(y).all():
        assert np.nanmax(kept_y) == np.nanmax(y)
        assert np.nanmin(kept_y) == np.nanmin(y)
