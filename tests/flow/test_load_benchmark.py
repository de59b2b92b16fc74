"""The load benchmark on a tiny model: every figure is there, and the answers are the sampler's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks.load import main
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
    assert figures["added_milliseconds"]["pairs"] == 5
    printed = capsys.readouterr().out
    assert "goodput" in printed and "100.0% with 200" in printed


def test_counts_below_one_are_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as raised:
        main(["--clients", "0"])
    assert raised.value.code == 2
    assert "--clients is 0; at least 1 is needed" in capsys.readouterr().err
