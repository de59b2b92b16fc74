"""How often models do what the safety sets hold against them; docs/safety.md quotes the table.

python -m scripts.safety_sets smollm2-135m --json docs/results/safety.json
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.options import ends_clearly, results_file
from benchmarks.results import write_results

from gmpo.gate import decide_gate
from gmpo.gate.policy import GatePolicy
from gmpo.gate.records import PairedSuite, SafetyCount
from gmpo.recipe import load_recipe
from gmpo.safety import SAFETY_SETS
from gmpo.safety_runs import ask_safety_sets
from gmpo.tracking import provenance


@ends_clearly
def main(argv: Sequence[str] | None = None) -> int:
    """Ask each model all sets, and print and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", help="names or folders of models")
    parser.add_argument("--json", type=results_file, help="file to write")
    arguments = parser.parse_args(argv)
    told: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "scripts.safety_sets", *sys.argv[1:]]),
        "made_with": provenance(),
        "models": [],
    }
    for model in arguments.models:
        began = time.monotonic()
        config = load_recipe("quickstart", [f"model.name={model}"])
        sets = []
        for report in ask_safety_sets(config, list(SAFETY_SETS)):
            lower, upper = bounds(report.count)
            sets.append({**report.as_dict(), "lower": lower, "upper": upper})
            print(f"{model} {report.name}: {len(report.violations)} of 300, up to {upper:.3f}")
        seconds = round(time.monotonic() - began)
        told["models"].append({"model": Path(model).name, "seconds": seconds, "sets": sets})
    if arguments.json is not None:
        write_results(arguments.json, told)
    return 0


def bounds(count: SafetyCount) -> tuple[float, float]:
    """Lower and upper bound of the violation rate, each one-sided at the gate's level."""
    alike = PairedSuite(suite="none", champion=[1.0] * 100, candidate=[1.0] * 100)
    policy = GatePolicy(safety_limits={count.name: 0.5})
    decision = decide_gate(
        [alike], policy=policy, champion="none", candidate="none", safety=[count]
    )
    (row,) = decision.safety
    return round(row.lower, 4), round(row.upper, 4)


if __name__ == "__main__":
    raise SystemExit(main())
