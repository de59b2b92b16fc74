"""The table of speed against mismatch, over a tiny model and over made-up figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.workloads import Workload
from scripts import precision
from tests.models import save_tiny


def figures(*, mean: float, largest: float, recomputes: bool) -> dict[str, Any]:
    of_speed = {"median": 100.0, "min": 90.0, "max": 110.0}
    return {
        "rollout_tokens_per_second": of_speed,
        "update_seconds": of_speed,
        "peak_gib": 2.0,
        "mismatch": {"mean": mean, "p99": mean, "max": largest, "num_tokens": 10},
        "recomputes_old_logprobs": recomputes,
    }


def test_every_precision_of_the_recipe_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    measured: list[str] = []

    def stub(_: Workload, precision: str, *__: object) -> dict[str, object]:
        measured.append(precision)
        return figures(mean=0.001, largest=0.01, recomputes=False)

    monkeypatch.setattr(precision, "measured", stub)
    command = ["--json", str(tmp_path / "x.json"), "--model", save_tiny(tmp_path / "model")]
    assert precision.main([*command, "--threads", "1"]) == 0
    assert measured == ["fp32", "bf16"]


def test_mismatch_has_mean_quantile_and_largest():
    # 0 to 100 thousandths: the 99 % quantile is the hundredth of 101 values.
    gaps = [number / 1000 for number in range(101)]
    assert precision.mismatch_of(gaps) == pytest.approx(
        {"mean": 0.05, "p99": 0.099, "max": 0.1, "num_tokens": 101}
    )


@pytest.mark.parametrize(
    ("mean", "largest", "recomputes", "keeps"),
    [
        (0.005, 0.1, False, True),
        (0.006, 0.1, False, False),
        (0.005, 0.11, False, False),
        (0.02, 0.9, True, True),
    ],
)
def test_bounds_are_kept_within_them_or_by_recomputing(
    mean: float, largest: float, recomputes: bool, keeps: bool
):
    of_default = figures(mean=mean, largest=largest, recomputes=recomputes)
    assert precision.keeps_bounds(of_default) == keeps
    text = precision.table({"default": "bf16", "precisions": {"bf16": of_default}})
    assert f"takes bf16 here, and {'keeps' if keeps else 'BREAKS'} the bounds" in text
    text = precision.table({"default": "fp32", "precisions": {"bf16": of_default}})
    assert "takes fp32 here, which was not measured" in text


@pytest.mark.usefixtures("forked")
def test_the_command_writes_a_table_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(precision, "choose_dtype", lambda name, *, device: "bf16")
    path = tmp_path / "precision.json"
    command = ["--json", str(path), "--model", save_tiny(tmp_path / "model")]
    # A process less, for time's sake; that both are measured is held above.
    command += ["--repeats", "1", "--threads", "1", "--precisions", "fp32"]
    assert precision.main(command) == 0
    said = capsys.readouterr().out
    assert "| fp32 |" in said and "takes bf16 here, which was not measured" in said
    found = json.loads(path.read_text())["precisions"]["fp32"]
    # 2 rounds of 8 prompts x 8 completions of 32 tokens.
    assert found["mismatch"]["num_tokens"] == 2 * 8 * 8 * 32
    assert 0 <= found["mismatch"]["mean"] <= found["mismatch"]["p99"] <= found["mismatch"]["max"]
    assert found["mismatch"]["max"] < 1e-3 and not found["recomputes_old_logprobs"]
    assert path.with_suffix(".png").is_file()
    before = path.read_text()
    assert precision.main(command) == 0
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "0"], "--repeats is 0; at least 1 is needed"),
        (["--threads", "0"], "--threads 0 must lie in 1 to"),
    ],
)
def test_a_wrong_number_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        precision.parse(["--json", "x.json", *arguments])
    assert message in capsys.readouterr().err
