"""Serving's detectors on blocks: a fault worked out by hand, then what must hold of any stream."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmpo.monitoring.anomalies import (
    SERVING_DETECTORS,
    WARM_UP_BLOCKS,
    AnomalyState,
    Figure,
    judge_block,
)
from gmpo.monitoring.answer_blocks import AnswerBlock
from gmpo.monitoring.severity import AnomalyReport, Level

HEALTHY = {
    "success": 1.0,
    "quality": 0.8,
    "log_latency": 0.5,
    "log_latency_p95": 1.5,
    "cut_share": 0.05,
    "mean_logprob": -0.5,
    "log_memory": 21.0,
}


def block(*, count: int = 30, **changes: float) -> dict[str, Figure]:
    return {name: Figure(value=v, count=count) for name, v in {**HEALTHY, **changes}.items()}


def run(
    blocks: list[dict[str, Figure]], state: AnomalyState | None = None
) -> tuple[list[AnomalyReport], AnomalyState]:
    state = state or AnomalyState()
    reports = []
    for figures in blocks:
        report, state = judge_block(figures, state)
        reports.append(report)
    return reports, state


def warm(**changes: float) -> AnomalyState:
    return run([block(**changes)] * WARM_UP_BLOCKS)[1]


def levels(reports: list[AnomalyReport]) -> list[Level]:
    return [report.level for report in reports]


def test_a_drop_of_quality_is_told_after_five_minutes():
    # Each block lies 20 deviations of 0.01 below, cut to 4: the sum grows by 4 - 0.5 = 3.5, and
    # its decades are sum / ln 10. The median of seven blocks has dropped with the fourth.
    reports, _ = run([block(quality=0.6)] * 7, warm())
    scores = [report.signals["quality_drop"]["score"] for report in reports]
    decades = [3.5 * number / math.log(10) for number in range(1, 8)]
    assert scores[:3] == [0.0, 0.0, 0.0]
    assert scores[3:5] == pytest.approx([(d - 4) / 4 for d in decades[3:5]])
    assert scores[5:] == [1.0, 1.0]
    # Severities are 0.8 times that: 0.42 0.72 0.8 0.8; a level needs two looks.
    assert levels(reports) == ["ok"] * 4 + ["warning", "critical", "critical"]
    assert reports[5].severity == pytest.approx(0.8)
    assert reports[5].families["performance"] == {"quality_drop": 1.0}
    assert reports[5].signals["quality_drop"]["baseline"] == pytest.approx(0.8)


def test_once_the_cause_is_over_so_is_the_alarm():
    _, state = run([block(quality=0.6)] * 50, warm())
    reports, _ = run([block()] * 6, state)
    # Four of the last seven blocks are healthy with the fourth; a level needs two looks.
    assert levels(reports) == ["critical"] * 4 + ["ok"] * 2


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("success_drop", {"success": 0.8}),
        ("quality_drop", {"quality": 0.6}),
        ("latency_rise", {"log_latency": 0.5 + math.log(2)}),
        ("latency_tail", {"log_latency_p95": 1.5 + math.log(4)}),
        ("cut_share_rise", {"cut_share": 0.4}),
        ("memory_growth", {"log_memory": 21 + math.log(2)}),
        ("token_probability_drop", {"mean_logprob": -0.8}),
        ("token_probability_rise", {"mean_logprob": -0.2}),
    ],
)
def test_each_detector_finds_its_own_change_and_no_other(name: str, changes: dict[str, float]):
    reports, _ = run([block(**changes)] * 20, warm())
    found = {n for scores in reports[-1].families.values() for n in scores}
    assert found == {name}
    assert reports[-1].severity == pytest.approx(SERVING_DETECTORS[name].weight)
    assert reports[-1].level == ("critical" if reports[-1].severity >= 0.7 else "warning")
    # The other way is no trouble.
    opposite = {n: 2 * HEALTHY[n] - value for n, value in changes.items() if n != "mean_logprob"}
    again, _ = run([block(**opposite)] * 20, warm())
    assert set(levels(again)) == {"ok"}


def test_what_nobody_would_feel_raises_no_alarm_however_certain_it_is():
    reports, state = run([block(quality=0.76, log_latency=0.5 + math.log(1.4))] * 300, warm())
    assert set(levels(reports)) == {"ok"}
    assert state.detectors["quality_drop"].total > 20


def test_an_outage_is_told_at_once_without_a_baseline():
    reports, _ = run([block(success=0.2)] * 2)
    assert levels(reports) == ["ok", "critical"]


def test_single_failures_among_few_answers_are_no_drop_of_success():
    # One of 20 every tenth block: a share of 0.005 over all.
    chance = [block(success=0.95 if n % 10 == 0 else 1.0, count=20) for n in range(400)]
    assert set(levels(run(chance, warm())[0])) == {"ok"}


def test_figures_of_fewer_than_ten_answers_are_not_judged():
    reports, state = run([block(count=9, success=0.0)] * 5)
    assert reports[-1].signals == {}
    assert state.detectors == {}
    assert levels(reports) == ["ok"] * 5


def test_signals_may_be_missing():
    without = {"success": Figure(value=1.0, count=30)}
    reports, _ = run([without] * 100)
    assert set(reports[-1].signals) == {"success_drop"}


def test_a_baseline_never_moves():
    before = warm()
    _, after = run([block(log_latency=0.5 + number / 500) for number in range(500)], before)
    assert after.baselines() == before.baselines()
    assert before.baselines()["latency_rise"] == {"center": 0.5, "scale": 0.05}


def noisy(seed: int, count: int) -> list[dict[str, Figure]]:
    chance = np.random.default_rng(seed)
    blocks = []
    for number in range(count):
        fault = 0.3 if number > 80 else 0.0
        moved = {name: float(v + 0.02 * chance.standard_t(3)) for name, v in HEALTHY.items()}
        blocks.append(block(**moved | {"quality": moved["quality"] - fault}))
    return blocks


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 100), cut=st.integers(1, 119))
def test_a_state_that_went_through_json_goes_on_as_though_it_had_not(seed: int, cut: int):
    blocks = noisy(seed, 120)
    whole, end = run(blocks)
    first, state = run(blocks[:cut])
    kept: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(state)))
    rest, other_end = run(blocks[cut:], AnomalyState.from_record(kept))
    assert [*first, *rest] == whole
    assert other_end == end
    assert whole[-1].level == "critical"


def test_a_restart_with_known_baselines_needs_no_warm_up():
    known = json.loads(json.dumps(warm().baselines()))
    reports, _ = run([block(quality=0.6)] * 6, AnomalyState.from_baselines(known))
    assert reports[-1].level == "critical"


def answer(**changes: Any) -> dict[str, Any]:
    return {
        "status": 200,
        "finish_reason": "stop",
        "latency_s": math.e,
        "quality": None,
        "mean_logprob": None,
    } | changes


def test_the_figures_of_a_block():
    gathered = AnswerBlock(began=0.0)
    assert gathered.figures() == {}
    gathered.add(answer(quality=0.5, mean_logprob=-1.0))
    gathered.add(answer(quality=1.0, mean_logprob=-3.0, latency_s=math.e**3))
    gathered.add(answer(finish_reason="length", latency_s=math.e**2))
    gathered.add(answer(status=500, latency_s=900.0, quality=0.0))
    gathered.add(answer(status=408))
    # Mistakes of clients, and clients that left, are no answers.
    for status in (400, 404, 413, 422, 429, 499):
        gathered.add(answer(status=status))
    figures = gathered.figures()
    assert figures["success"] == Figure(value=0.6, count=5)
    assert figures["cut_share"] == Figure(value=1 / 3, count=3)
    assert figures["log_latency"] == Figure(value=2.0, count=3)
    # Between the second and the third of 1, 2, 3, at 0.95 of the way: 1 + 2 0.95
    assert figures["log_latency_p95"] == Figure(value=pytest.approx(2.9), count=3)
    assert figures["quality"] == Figure(value=0.75, count=2)
    assert figures["mean_logprob"] == Figure(value=-2.0, count=2)


def test_a_block_takes_a_minute_and_twenty_answers():
    gathered = AnswerBlock(began=100.0)
    for _ in range(19):
        gathered.add(answer())
        gathered.add(answer(status=404))
    assert not gathered.is_full(1000.0)
    gathered.add(answer())
    assert not gathered.is_full(159.9)
    assert gathered.is_full(160.0)
