"""Does the forecast of memory hold? Runs recipes of different shapes and compares.

Each recipe trains the default model for one round of two or more steps, one after the other in
processes of their own:

    python -m scripts.forecast_check --json docs/results/forecast.json

A case counts as right within 20 %. The forecast is that of `forecast.json` in the run folder; what
is measured is the largest resident memory of the whole process, or on CUDA the most allocated.
The C library's allocator keeps what was freed in small pieces; `MALLOC_MMAP_THRESHOLD_=1000000` in
the environment lets it give pieces of a megabyte back, and is noted beside the result.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.options import ends_clearly, results_file
from benchmarks.results import write_results

from gmpo.leash import leashed
from gmpo.tracking import provenance, read_lines

ALLOWED_ERROR = 0.2

SMALL_EVALUATION = (
    "training.rounds=1",
    "evaluation.items=2",
    "evaluation.max_new_tokens=1",
    "evaluation.every_rounds=0",
    "evaluation.sampled=false",
)
# Half of all completions earn 1 whatever the model can do, so that groups are live from the start.
LIVE_GROUPS = ("reward.weights={format = 1.0}", "reward.format_pattern='(?s).*[^aeiou0-4. ]'")
LONG_COMPLETIONS = (
    *("svamp_cpu", "sampling.prompts_per_round=4", "training.steps_per_round=2"),
    *("sampling.max_new_tokens=96", "sampling.max_rows=32", "evaluation.few_shot=0"),
)
CASES: dict[str, tuple[str, ...]] = {
    "short": ("quickstart",),
    "long completions": LONG_COMPLETIONS,
    "long prompts, large groups": (
        *("svamp_cpu", "task.kind=gsm8k", "sampling.prompts_per_round=8"),
        *("sampling.group_size=16", "sampling.max_new_tokens=12", "training.steps_per_round=2"),
        *("sampling.max_rows=128", "evaluation.few_shot=0"),
    ),
    "long completions, adapters": (*LONG_COMPLETIONS, "lora.rank=16"),
    "long completions, layers run again": (
        *LONG_COMPLETIONS,
        "training.gradient_checkpointing=true",
    ),
}


@ends_clearly
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=CASES, action="append", help="this case; repeatable")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", type=results_file, help="add the results to this file")
    arguments = parser.parse_args(argv)
    made_with = provenance()  # before the results change the tree, if their file is in it
    rows = []
    for name in arguments.only or CASES:
        settings = (f"model.device={arguments.device}", f"model.dtype={arguments.dtype}")
        row = {
            "case": name,
            "device": arguments.device,
            "dtype": arguments.dtype,
            "mmap_threshold": os.environ.get("MALLOC_MMAP_THRESHOLD_"),
        }
        row |= measure(*CASES[name], *SMALL_EVALUATION, *LIVE_GROUPS, *settings)
        row["made_with"] = made_with
        rows.append(row)
        print(
            f"{name} ({arguments.device}, {arguments.dtype}): forecast {row['forecast_gib']:.2f} "
            f"GiB, measured {row['measured_gib']:.2f} GiB, error {row['error']:+.1%}",
            flush=True,
        )
        if arguments.json:
            add(arguments.json, [row])
    if any(abs(row["error"]) > ALLOWED_ERROR for row in rows):
        sys.exit(f"not within {ALLOWED_ERROR:.0%}")
    return 0


def measure(recipe: str, *overrides: str) -> dict[str, Any]:
    """Train in a process of its own; forecast and measured peak in GiB."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = ["train", recipe, "--run", run, *sets(overrides)]
        leash = leashed(command, ended_by=signal.SIGKILL)
        process = subprocess.Popen(leash, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"{recipe} {' '.join(overrides)} failed: {status}")
        forecast = json.loads((run / "forecast.json").read_text())
        metrics = list(read_lines(run, "metrics.jsonl"))
    needs = forecast["memory"]
    peak = resident_gib(usage)
    if "model.device=cuda" in overrides:
        peak = max(row["memory/peak_gib"] for row in metrics if row["kind"] == "round")
    return {
        "recipe": recipe,
        "overrides": list(overrides),
        "forecast_gib": needs["peak_gib"],
        "measured_gib": peak,
        "error": needs["peak_gib"] / peak - 1,
        "parts": {key: value for key, value in needs.items() if key.endswith("_gib")},
        "time": forecast["time"],
        "measured_round_seconds": forecast["measured"]["round_seconds"],
    }


def sets(overrides: Sequence[str]) -> Iterator[str]:
    for override in overrides:
        yield from ("--set", override)


def resident_gib(usage: resource.struct_rusage) -> float:
    return usage.ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def add(path: Path, rows: list[dict[str, Any]]) -> None:
    """Results of the same case, device, precision and allocator are replaced."""
    old = json.loads(path.read_text())["runs"] if path.exists() else []

    def key(row: dict[str, Any]) -> tuple[str | None, ...]:
        return row["case"], row["device"], row["dtype"], row["mmap_threshold"]

    keys = [key(row) for row in rows]
    kept = [row for row in old if key(row) not in keys]
    write_results(path, {"runs": [*kept, *rows]})


if __name__ == "__main__":
    raise SystemExit(main())
