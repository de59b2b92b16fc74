"""The check of the memory forecast notes the tree as it was before the check wrote to it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from scripts import forecast_check


def test_every_row_has_the_commit_from_before_the_first_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "forecast.json"

    def provenance() -> dict[str, str]:
        return {"commit": "0123456789ab-dirty" if file.exists() else "0123456789ab"}

    def measure(*_: str) -> dict[str, Any]:
        return {"forecast_gib": 1.0, "measured_gib": 1.0, "error": 0.0}

    monkeypatch.setattr(forecast_check, "provenance", provenance)
    monkeypatch.setattr(forecast_check, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["forecast_check", "--json", str(file)])
    forecast_check.main()
    rows = json.loads(file.read_text())["runs"]
    assert [row["case"] for row in rows] == list(forecast_check.CASES)
    assert [row["made_with"] for row in rows] == [{"commit": "0123456789ab"}] * len(rows)
