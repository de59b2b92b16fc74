"""`gmpo learn --demo`, whole, with the real model."""

from __future__ import annotations

from pathlib import Path

import pytest

from gmpo.continual.demo import run_demo


@pytest.mark.verify
@pytest.mark.real_model
def test_what_is_bad_never_reaches_the_users(tmp_path: Path):
    start, *cycles = run_demo(tmp_path / "demo", threads=2, tell=lambda *_: None, warn=print)
    by_number = {told["cycle"]: told for told in cycles}
    assert list(by_number) == [1, 2, 3, 4, 5]
    assert "poisoned" in by_number[3]["reason"]
    assert by_number[4]["reason"] == "Safety test failed"
    assert by_number[5]["outcome"] == "promoted"
    for told in cycles:
        assert told["served"]["old"]["items"] == 1000
        assert told["served"]["old"]["accuracy"] >= start["served"]["old"]["accuracy"] - 0.05
        assert told["traffic"]["failed"] == 0
    assert set(by_number[3]["step_seconds"]) == {"validate", "served"}
    assert by_number[5]["step_seconds"]["update"] > by_number[5]["step_seconds"]["small_update"] > 0
    before, after = by_number[4]["served"], by_number[5]["served"]
    assert after["new"]["accuracy"] > before["new"]["accuracy"] + 0.1
    assert after["old"]["accuracy"] > before["old"]["accuracy"] - 0.05
