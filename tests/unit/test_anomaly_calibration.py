"""What the calibration counts, by hand; and that what is written down keeps the promise."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scripts.anomaly_calibration import (
    CHANGE,
    CHANGES,
    KINDS,
    Kind,
    delay,
    entered,
    rate,
    stream,
    summed,
)

ROOT = Path(__file__).resolve().parents[2]


def test_a_level_is_entered_when_it_is_reached_from_below():
    levels = ["ok", "warning", "critical", "warning", "critical", "ok", "critical"]
    # Critical three times; from "ok" it passes warning too.
    assert entered(levels) == {"warning": 2, "critical": 3}
    assert entered(["critical"]) == {"warning": 1, "critical": 1}
    assert entered([]) == {"warning": 0, "critical": 0}


def test_rates_are_a_week_with_the_wider_bound():
    # None in four weeks: the bound is -ln 0.05 = 2.996 over 4.
    none = rate([0, 0, 0, 0])
    assert none["upper_95"] == pytest.approx(-math.log(0.05) / 4)
    some = rate([3, 0, 1, 0])
    assert (some["times"], some["a_week"], some["share_of_weeks"]) == (4, 1.0, 0.5)
    assert some["most_in_a_week"] == 3
    # Poisson: half of chi-squared's 0.95 quantile with 10 degrees of freedom, 18.307, over 4; the
    # weeks' own deviation is sqrt(6 / 3), which gives 1 + 1.645 sqrt(2) / 2 = 2.163.
    assert some["upper_95"] == pytest.approx(18.307 / 2 / 4, abs=1e-3)
    # All in one week of nine: 1 + 1.645 3 / 3, and Poisson's 31.410 / 2 / 9 is less.
    assert rate([9, *[0] * 8])["upper_95"] == pytest.approx(2.645)


def test_delays_are_null_where_fewer_were_found():
    assert summed([2.0, 3.0, 4.0, math.inf]) == {
        "found": 0.75,
        "median_minutes": 4.0,
        "p90_minutes": None,
    }


def test_a_stream_changes_when_it_should():
    kind = Kind(answers=50)
    blocks = list(stream(kind, CHANGE + 200, 0, {"log_latency": 1.0, "success": -0.5}))
    early, late = blocks[:CHANGE], blocks[CHANGE:]

    def mean(part: list, signal: str) -> float:
        return float(np.mean([figures[signal].value for figures in part]))

    assert mean(late, "log_latency") - mean(early, "log_latency") == pytest.approx(1.0, abs=0.05)
    assert mean(early, "success") == pytest.approx(0.995, abs=0.003)
    assert mean(late, "success") == pytest.approx(0.495, abs=0.02)
    assert mean(late, "quality") == pytest.approx(mean(early, "quality"), abs=0.01)


def test_an_outage_is_found_at_once():
    found = delay(KINDS["normal"], CHANGES["successes 99.5 % to 0 %"], 0)
    assert found == {"warning": 2, "critical": 2}


def test_what_is_written_down_is_below_one_false_critical_a_week():
    report = json.loads((ROOT / "docs/results/anomaly_calibration.json").read_text())
    assert set(report["nothing_changes"]) == set(KINDS)
    assert set(report["changes"]["normal"]) == set(CHANGES)
    for kind, rates in report["nothing_changes"].items():
        assert rates["critical"]["upper_95"] < 1, kind
    for changes in report["changes"].values():
        assert all(found["warning"]["found"] == 1 for found in changes.values())
