"""What the dashboard costs over a long store: processor time of each look at its page, and memory.

The page's script is run as for a visitor, without a browser: first over all events, then again and
again while a few more come. Another process makes the store: the memory is the page's alone.

    python -m scripts.dashboard_load --json docs/results/dashboard.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.options import ends_clearly, results_file
from benchmarks.results import write_results
from streamlit.testing.v1 import AppTest
from tests.dashboard_stores import answers, fill, outcomes

import gmpo.dashboard
from gmpo.dashboard.settings import VARIABLE, DashboardSettings
from gmpo.tracking import provenance

EVENTS, LOOKS, BETWEEN = 200_000, 10, 40
"""In the store; looks after the first; events that come before each of them."""
PAGE = Path(gmpo.dashboard.__file__).with_name("page.py")


@ends_clearly
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=results_file, required=True)
    parser.add_argument("--events", type=int, default=EVENTS)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder) / "store.db", events=arguments.events)
    report = {
        "command": shlex.join(["python", "-m", "scripts.dashboard_load", *sys.argv[1:]]),
        "made_with": provenance(),
        **figures,
    }
    print(json.dumps(figures, indent=1))
    write_results(arguments.json, report)
    return 0


def measure(path: Path, *, events: int) -> dict[str, Any]:
    """Seconds of processor time and MiB, over a store of so many events."""
    maker = multiprocessing.get_context("spawn").Process(target=write, args=(path, events, 0))
    maker.start()
    maker.join()
    assert maker.exitcode == 0, "the store could not be written"
    os.environ[VARIABLE] = DashboardSettings(store=str(path), runs=()).as_json()
    app = AppTest.from_file(str(PAGE), default_timeout=600)
    first = cpu_seconds(lambda: look(app))
    later = []
    for number in range(1, LOOKS + 1):
        write(path, BETWEEN, number)
        later.append(cpu_seconds(lambda: look(app)))
    return {
        "events": events,
        "first_look_seconds": first,
        "later_look_seconds": later,
        "later_look_median": statistics.median(later),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
    }


def write(path: Path, number: int, seed: int) -> None:
    """Events of the last half hour, three answers to each outcome."""
    now = time.time()
    num_answers = -(-3 * number // 4)
    answered = list(answers(num_answers, start=now - 1800, end=now - 1, seed=seed))
    fill(path, [*answered, *outcomes(answered, every=3, seed=seed)])


def look(app: AppTest) -> None:
    app.run()
    assert not app.exception, app.exception


def cpu_seconds(work: Callable[[], None]) -> float:
    """Of all this process's threads, which a busy machine changes least."""
    began = time.process_time()
    work()
    return time.process_time() - began


if __name__ == "__main__":
    raise SystemExit(main())
