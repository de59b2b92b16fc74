"""How often the gate errs: its answers on simulated items, for candidates whose change is known.

Beside it the rule that is usual: 100 samples of each model, and back if accuracy fell by 5 %.
docs/gate.md quotes the table.

    python -m scripts.gate_simulation --json docs/results/gate.json
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from benchmarks.options import ends_clearly, results_file
from benchmarks.results import write_results
from tests.gate_decisions import SEED, answers, simulated

from gmpo.statistics import wilson_interval
from gmpo.tracking import provenance

REPEATS = 3000
OUTCOMES = ("pass", "inconclusive", "fail")
CHANGES = ((0.0,), (0.05,), (-0.05,), (-0.1,))
USUAL_ITEMS, USUAL_FALL = 100, 0.05


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is simulated; one change of true accuracy for each suite, as a fraction."""

    changes: tuple[float, ...]
    items: int = 1000
    samples: int = 1
    coin_flips: bool = False

    @property
    def sentence(self) -> str:
        points = ", ".join(f"{100 * change:+g}" for change in self.changes)
        kind = "coin flips" if self.coin_flips else "items"
        return f"{points} points, {self.items} {kind}, {self.samples} answers each"


def cases() -> list[Case]:
    whole = [*CHANGES, *(change * 3 for change in CHANGES), (-0.1, 0.0, 0.0), (-0.1, 0.05, 0.05)]
    return [
        *(Case(changes=changes, samples=samples) for samples in (1, 2) for changes in whole),
        *(Case(changes=(change,), items=items) for items in (100, 300) for change in (0.0, -0.1)),
        Case(changes=(0.0,), coin_flips=True),
    ]


@ends_clearly
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=results_file, required=True)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    arguments = parser.parse_args(argv)
    report: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "scripts.gate_simulation", *sys.argv[1:]]),
        "made_with": provenance(),
        "seed": SEED,
        "repeats": arguments.repeats,
        "cases": [],
    }
    for case in cases():
        decisions = simulated(**asdict(case), repeats=arguments.repeats)
        shares = {name: share([one.outcome == name for one in decisions]) for name in OUTCOMES}
        report["cases"].append({**asdict(case), **shares})
        print(case.sentence, " / ".join(shown(shares[name]) for name in OUTCOMES), flush=True)
    report["usual_rule"] = usual_rule(arguments.repeats)
    for name, found in report["usual_rule"].items():
        print("usual rule,", name, shown(found))
    write_results(arguments.json, report)
    return 0


def usual_rule(repeats: int) -> dict[str, dict[str, Any]]:
    """How often an unchanged model is called worse: by points or by a share, on whose items."""
    generator = np.random.default_rng(SEED)
    found: dict[str, list[bool]] = {}
    for _ in range(repeats):
        old, same_items = answers(0.0, USUAL_ITEMS, 1, generator)
        _, other_items = answers(0.0, USUAL_ITEMS, 1, generator)
        # Whole counts: 0.5 - 0.45 is not 0.05.
        before = int(old.sum())
        for name, new in (("the same items", same_items), ("other items", other_items)):
            fall = before - int(new.sum())
            by_points = fall > USUAL_FALL * USUAL_ITEMS
            found.setdefault(f"5 points, {name}", []).append(by_points)
            found.setdefault(f"5 % of its accuracy, {name}", []).append(20 * fall > before)
    return {name: share(worse) for name, worse in found.items()}


def share(happened: Sequence[bool]) -> dict[str, Any]:
    """Share of repeats, with its 95 % interval."""
    count = sum(happened)
    low, high = wilson_interval(count, len(happened))
    return {"count": count, "share": count / len(happened), "low_95": low, "high_95": high}


def shown(found: dict[str, Any]) -> str:
    return f"{found['share']:.3f}" if found["count"] else "0"


if __name__ == "__main__":
    raise SystemExit(main())
