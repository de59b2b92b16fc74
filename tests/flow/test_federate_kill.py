"""A federation whose process is killed, with real processes that it leaves behind."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from tests.federations import federation, plan_file, run, same_models, write_items
from tests.forks import COMMAND, forked_starts
from tests.models import save_tiny


def test_a_federation_that_was_killed_goes_on_to_the_same_weights(tmp_path: Path):
    model = save_tiny(tmp_path / "tiny")
    items = write_items(tmp_path, model)
    asked = federation(tmp_path, model, items, rounds=1)
    place = tmp_path / "killed"
    command = subprocess.Popen(
        [COMMAND, "federate", "run", plan_file(tmp_path, asked), "--folder", place],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    # The first client is done, the second is under way.
    mark = place / "rounds" / "001" / "clients" / "south" / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not mark.exists():
        assert command.poll() is None, command.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    command.kill()
    command.communicate()
    with forked_starts():
        (report,) = run(place, None)
        run(tmp_path / "whole", asked)
    assert report.outcome == "accepted"
    assert same_models(place / "models" / "001", tmp_path / "whole" / "models" / "001")
