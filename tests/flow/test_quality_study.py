"""The quality score calibrated on a tiny model's answers, over a real connection."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scripts.quality_study import main
from tests.models import save_tiny


@pytest.mark.verify
@pytest.mark.real_model
def test_answers_are_asked_judged_and_calibrated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "results" / "quality.json"
    words = ["--answers", "120", "--target", "0.2", "--threads", "2", "--json", str(out)]
    assert main(words) == 0
    calibration = json.loads(out.read_text())["calibration"]
    assert calibration["num_answers"] == 120
    assert calibration["num_right"] + calibration["num_wrong"] == 120
    assert 0 < calibration["num_right"] < 120
    assert "120 answers: " in capsys.readouterr().out


def test_a_model_that_answers_nothing_right_gives_no_threshold_and_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "results" / "quality.json"
    words = ["--model", save_tiny(tmp_path / "tiny"), "--dtype", "fp32", "--answers", "12"]
    assert main([*words, "--threads", "1", "--json", str(out)]) == 2
    assert "0 good answers of 12 are too few" in capsys.readouterr().err
    assert not out.exists()


def test_no_answers_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["--answers", "0", "--json", str(tmp_path / "a.json")])
    assert "--answers is 0; at least 1 is needed" in capsys.readouterr().err
