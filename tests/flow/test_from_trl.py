"""The example of a TRL user's script: the same data and functions through both trainers."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
from tests.models import save_tiny
from tests.trl_trainers import tolerated

pytestmark = tolerated
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "trainer" / "from_trl.py"


@pytest.mark.parametrize(("trainer", "last"), [("trl", "loss .*, 8 steps"), ("gmpo", "run .*")])
def test_a_trl_users_script_runs_through_both_trainers(
    trainer: str,
    last: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    model = save_tiny(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), model, "--trainer", trainer])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    # Two rounds of 32 rollouts, each earning 0, 0.5 or 1.
    rewards = re.findall(r"^.*step (\d) of 8: reward (\d\.\d{3})$", printed, flags=re.MULTILINE)
    assert [step for step, _ in rewards] == ["4", "8"]
    assert all(
        float(reward) * 64 == pytest.approx(round(float(reward) * 64), abs=0.04)
        for _, reward in rewards
    )
    assert re.search(rf"^trained by {trainer}: {last}", printed, flags=re.MULTILINE | re.IGNORECASE)
