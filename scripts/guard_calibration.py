"""How often the guard raises an alarm on healthy runs, with an interval.

Small runs of five kinds are recorded (those that are there already are read), each is judged round
by round, and every run is judged again on traces resampled from it: blocks of ten rounds of the
run's later half, put behind its first half, so that a run lasts three times as long. The first
interval counts runs; the second counts resampled traces, which share their runs and say how alarms
grow with length rather than how runs differ; the third counts runs once more, judged from round 21
on as an attempt after a roll-back is, which costs a roll-back where nothing is wrong.

    python -m scripts.guard_calibration --seeds 0 1 2 --runs runs/guard --json guard.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from scripts.tiny_policy import sums_recipe, warm_policy
from tests.models import save_tiny
from tests.tiny_runs import tiny_recipe

from gmpo.config import RunConfig
from gmpo.guard import GuardState, decide
from gmpo.guard_events import GuardEvent
from gmpo.statistics import wilson_interval
from gmpo.tracking import provenance, read_lines
from gmpo.training import train

ROUNDS = 60
BLOCK = 10
TRIAL_ROUND = 21
Trace = Sequence[Mapping[str, float | None]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/guard"), help="folder of the runs")
    parser.add_argument("--resamples", type=int, default=5, help="longer traces a run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every alarm here too")
    arguments = parser.parse_args()

    traces = {}
    for seed in arguments.seeds:
        for name, make in recipes(arguments.runs).items():
            folder = arguments.runs / f"{name}-{seed}"
            if not (folder / "evaluations.jsonl").is_file():
                train(make(seed), folder=folder, warn=lambda _: None)
            lines = read_lines(folder, "metrics.jsonl")
            traces[folder.name] = [line for line in lines if line["kind"] == "round"]
    recorded = {name: alarms(trace) for name, trace in traces.items()}
    on_trial = {name: alarms(trace, trial_from=TRIAL_ROUND) for name, trace in traces.items()}
    longer = {
        f"{name} resample {number}": alarms(resampled(trace, number))
        for name, trace in traces.items()
        for number in range(arguments.resamples)
    }
    report: dict[str, Any] = {"made_with": provenance(), "rounds": ROUNDS}
    judged = {"recorded": recorded, "resampled": longer, "on_trial": on_trial}
    for what, found in judged.items():
        report[what] = rate(found)
        print(f"{what}: {sentence(report[what])}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def recipes(root: Path) -> dict[str, Callable[[int], RunConfig]]:
    """Five kinds of healthy run, by seed."""
    half = warm_policy(root / "policies" / "half", steps=250)
    little = warm_policy(root / "policies" / "little", steps=150)
    fresh = root / "policies" / "random"
    if not fresh.exists():
        save_tiny(fresh)

    def sums(model: str, **changes: Any) -> Callable[[int], RunConfig]:
        rate, schedule = changes.pop("rate", 1e-4), changes.pop("schedule", "constant")
        quiet = {"every_rounds": 0, "few_shot": 0, "sampled": False}
        return lambda seed: sums_recipe(
            model,
            training=steps(seed, rate, schedule),
            evaluation=quiet,
            **changes,
        )

    return {
        "half": sums(half),
        "little": sums(little),
        "little-cosine-grpo": sums(little, schedule="cosine", objective={"name": "grpo"}),
        "little-slow": sums(little, rate=3e-5),
        "format": lambda seed: tiny_recipe(
            str(fresh),
            reward__format_pattern=r"(?s)\d.*",
            training=steps(seed, 1e-3, "constant"),
            tracking={"groups_per_round": 0},
        ),
    }


def steps(seed: int, rate: float, schedule: str) -> dict[str, Any]:
    return {
        "rounds": ROUNDS,
        "steps_per_round": 4,
        "learning_rate": rate,
        "schedule": schedule,
        "seed": seed,
    }


def alarms(trace: Trace, *, trial_from: int | None = None) -> list[GuardEvent]:
    state, found = GuardState(), []
    for number, metrics in enumerate(trace, start=1):
        is_on_trial = trial_from is not None and number >= trial_from
        events, state = decide(metrics, state, round_number=number, is_on_trial=is_on_trial)
        found += events
    return found


def resampled(trace: Trace, seed: int) -> Trace:
    """The run's first half as it was, then blocks of its later half, three times the length."""
    chance = np.random.default_rng(seed)
    half = len(trace) // 2
    starts = chance.integers(half, len(trace) - BLOCK + 1, size=(3 * len(trace) - half) // BLOCK)
    return [*trace[:half], *(trace[start + place] for start in starts for place in range(BLOCK))]


def rate(found: Mapping[str, list[GuardEvent]]) -> dict[str, Any]:
    alarmed = {
        name: [asdict(event) for event in events] for name, events in found.items() if events
    }
    low, high = wilson_interval(len(alarmed), len(found))
    # Without any alarm: the one-sided 95 % bound, 1 - 0.05^(1/n); 60 runs bound the rate by 4.9 %.
    none_bound = 1 - 0.05 ** (1 / len(found)) if not alarmed else None
    return {
        "runs": len(found),
        "with_alarm": len(alarmed),
        "interval_95": [low, high],
        "upper_bound_95_without_alarm": none_bound,
        "alarms": alarmed,
    }


def sentence(figures: Mapping[str, Any]) -> str:
    low, high = figures["interval_95"]
    bound = figures["upper_bound_95_without_alarm"]
    end = "" if bound is None else f"; one-sided 95 % bound {bound:.1%}"
    return (
        f"{figures['with_alarm']} of {figures['runs']} healthy traces raised an alarm "
        f"(95 % interval {low:.1%} to {high:.1%}{end})"
    )


if __name__ == "__main__":
    raise SystemExit(main())
