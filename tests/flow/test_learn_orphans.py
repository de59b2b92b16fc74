"""A controller killed by SIGKILL in the midst of a training run: what it leaves behind, nothing."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.commands import COMMAND
from tests.flow.test_learn import NAME, learning_recipe, opened, rows
from tests.tiny_runs import metric_lines, write_recipe

from gmpo.run_process import is_trained_in
from gmpo.store import open_store

SECONDS_UNTIL_GONE = 15.0
ROUNDS = 40
PLAN = """
check_samples = 0
small_rounds = 1
safety_items = 120
growth_limits = { latency = 4.0, length = 1.5 }
degradation_limit = 0.08
"""

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="Linux alone tells a child of its parent's end"
)


def _is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def _below(process: int) -> list[int]:
    """Processes that one has begun, and those that they have."""
    found: list[int] = []
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            found += [child, *_below(child)]
    return found


def _wait_until(holds, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not holds():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_controller_that_is_killed_while_it_trains_leaves_no_process_and_its_cycle_is_completed(
    tmp_path: Path,
):
    with opened(tmp_path) as place:
        first = place.store.champion(NAME)
        data = place.file("batch", rows(60))
        suite = place.file("old", rows(400, start=1000))
    assert first is not None
    (tmp_path / "plan.toml").write_text(PLAN)
    recipe = write_recipe(tmp_path / "recipe.toml", learning_recipe(rounds=ROUNDS))
    command = [
        *(str(COMMAND), "learn", "--recipe", recipe, "--plan", str(tmp_path / "plan.toml")),
        *("--store", str(tmp_path / "store.db"), "--name", NAME, "--suite", f"old={suite}"),
        *("--data", data, "--approval", "auto"),
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as controller:
        cycles = tmp_path / "learn" / NAME
        found: list[Path] = []

        def has_a_round() -> bool:
            found[:] = [file.parent for file in cycles.glob("*/update*/run/metrics.jsonl")]
            return bool(found) and bool(metric_lines(found[0], "round"))

        _wait_until(has_a_round, controller)
        begun = _below(controller.pid)
        assert any(b"train" in Path(f"/proc/{one}/cmdline").read_bytes() for one in begun), begun
        controller.kill()
    deadline = time.monotonic() + SECONDS_UNTIL_GONE
    while left := [one for one in begun if _is_alive(one)]:
        assert time.monotonic() < deadline, f"processes {left} outlive their controller"
        time.sleep(0.05)
    (trained,) = found
    assert not is_trained_in(trained)
    assert len(metric_lines(trained, "round")) < ROUNDS
    with open_store(str(tmp_path / "store.db")) as store:
        lease = store.lease(f"learn/{NAME}")
        assert lease is not None
        store.drop_lease(lease)  # as if its 30 seconds were over
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "goes on at update" in again.stderr
    with open_store(str(tmp_path / "store.db")) as store:
        (cycle,) = store.cycles(NAME)
        assert cycle.state == "promoted", cycle.payload["reports"]
        champion = store.champion(NAME)
        assert champion is not None
        assert champion.version == cycle.payload["result"]["new_model_version"] != first.version
