"""The load benchmark on a tiny model: every figure is there, and the answers are the sampler's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from benchmarks.load import Difference, main, quantile_difference
from tests.models import save_tiny


def test_a_short_load_is_measured_from_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder, out = save_tiny(tmp_path / "tiny"), tmp_path / "out" / "load.json"
    main(
        [
            *("--model", folder, "--dtype", "fp32", "--clients", "4", "--seconds", "2"),
            *("--rows", "4", "--max-tokens", "8", "--prompts", "6", "--latency-pairs", "5"),
            *("--json", str(out), "--threads", "1"),
        ]
    )
    figures = json.loads(out.read_text())
    assert figures["answers"] >= 8
    assert figures["answered_200"] == 1 and figures["answered_429"] == 0
    served = figures["served"]
    assert served["num_equal"] == served["num_compared"] == figures["answers"]
    assert served["num_mixed_up"] == 0
    assert served["tokens_per_second"] > 0 and min(figures["offline_tokens_per_second"]) > 0
    assert 0 < figures["goodput"] < 1.5
    added = figures["added_milliseconds"]
    assert added["pairs"] == 5
    for name in ("p50", "p99", "engine_p99"):
        assert added[name]["low"] <= added[name]["high"]
    printed = capsys.readouterr().out
    assert "goodput" in printed and "100.0% with 200" in printed
    assert "the engine asked twice differs from itself by" in printed


def test_a_difference_of_quantiles_by_hand():
    # Medians 2 and 5; each pair is 3 apart, so that every drawn sample's medians are too.
    less = np.array([1.0, 2.0, 9.0])
    assert quantile_difference(less, less + 3, 0.5) == Difference(value=3, low=3, high=3)
    # One pair of 100 is the tail: a third of the draws miss it, a quarter have it twice or more.
    more = np.concatenate([np.full(99, 1.0), [101.0]])
    found = quantile_difference(np.full(100, 1.0), more, 0.99)
    # Rank 0.99 x 99 = 98.01 of 0..99: 0.01 of the way from 1 to 101 is 2, less 1.
    assert found.value == pytest.approx(1) and found.low == 0 and found.high == pytest.approx(100)


def test_counts_below_one_are_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as raised:
        main(["--clients", "0"])
    assert raised.value.code == 2
    assert "--clients is 0; at least 1 is needed" in capsys.readouterr().err
