"""The check of a device, on the CPU against itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from scripts import device_check
from tests.models import save_tiny
from tests.trl_trainers import tolerated

pytestmark = tolerated


def test_the_cpu_computes_what_the_cpu_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model, out = save_tiny(tmp_path / "model"), tmp_path / "out.json"
    assert device_check.main(["--device", "cpu", "--model", model, "--json", str(out)]) == 0
    assert "FAIL" not in capsys.readouterr().out
    report = json.loads(out.read_text())
    figures = {check["name"]: check["figure"] for check in report["checks"]}
    assert figures["fp32: update against the CPU's"] == 0.0
    assert figures["fp32: greedy completions are generate's"] == 1.0
    assert 0.99 < figures["bf16: cosine of the gradient with the CPU's in fp32"] < 1.0
    assert report["made_with"]["device"] == "cpu"


def test_another_gradient_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    right = device_check.GmpoSide.first_gradient
    calls: list[int] = []

    def wrong_later(self: device_check.GmpoSide, *, number: int) -> dict[str, torch.Tensor]:
        calls.append(number)
        gradient = right(self, number=number)
        sign = 1 if len(calls) == 1 else -1
        return {name: sign * each for name, each in gradient.items()}

    monkeypatch.setattr(device_check.GmpoSide, "first_gradient", wrong_later)
    model, out = save_tiny(tmp_path / "model"), tmp_path / "out.json"
    assert device_check.main(["--device", "cpu", "--model", model, "--json", str(out)]) == 1
