"""How often the guard raises an alarm on healthy runs, with an interval.

Small runs of five kinds are recorded (those that are there already are read), each is judged round
by round, and every run is judged again on traces resampled from it: blocks of ten rounds of the
run's later half, put behind its first half, so that a run lasts three times as long. The first
interval counts runs; the second counts resampled traces, which share their runs and say how alarms
grow with length rather than how runs differ; the third counts runs once more, judged from round 21
on as an attempt after a roll-back is, which costs a roll-back where nothing is wrong. Made-up runs
of `tests/guard_traces.py` are many: some learn, and some stay as they are and are on trial.

How far apart a spike of the gradient and healthy rounds lie is told besides: the largest healthy
rounds beside their baseline, and which share of spikes of one round, put into each run in turn, is
found in that round. `--others` judges runs that were recorded elsewhere, of any recipe, and keeps
in the JSON file what the guard read of them.

    python -m scripts.guard_calibration --seeds 0 1 2 --runs runs/guard --json guard.json
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.options import ends_clearly, results_file
from benchmarks.results import write_results
from scripts.tiny_policy import sums_recipe, warm_policy
from tests.guard_traces import healthy, steady
from tests.models import save_tiny
from tests.tiny_runs import tiny_recipe

from gmpo.config import RunConfig
from gmpo.guard import GuardState, decide
from gmpo.guard_events import GuardEvent
from gmpo.guard_signals import SIGNALS
from gmpo.statistics import wilson_interval
from gmpo.tracking import provenance, read_lines
from gmpo.training import train

ROUNDS = 60
BLOCK = 10
TRIAL_ROUND = 21
SPIKE_ROUNDS = (10, 30, 50)
SPIKE_FACTORS = (3, 10, 30)
"""Times the largest norm of the run as it was."""
NORM = "update/gradient_norm"
Trace = Sequence[Mapping[str, float | None]]


@ends_clearly
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/guard"), help="folder of the runs")
    parser.add_argument("--resamples", type=int, default=5, help="longer traces a run")
    parser.add_argument("--made-up", type=int, default=300, help="made-up runs of each kind")
    parser.add_argument("--others", type=Path, nargs="*", default=[], help="folders of other runs")
    parser.add_argument(
        "--json", type=results_file, metavar="FILE", help="write every alarm here too"
    )
    arguments = parser.parse_args(argv)

    torch.set_num_threads(1)  # another number would round sums otherwise

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
    judged |= made_up(arguments.made_up)
    for what, found in judged.items():
        report[what] = rate(found)
        print(f"{what}: {sentence(report[what])}")
    report["largest_gradient"] = largest_gradient(list(traces.values()))
    print(f"largest healthy gradient norm: {report['largest_gradient']}")
    report["spikes_found"] = {
        f"{factor} times the largest": spikes_found(list(traces.values()), factor)
        for factor in SPIKE_FACTORS
    }
    print(f"spikes of one round found in it: {report['spikes_found']}")
    report["others"] = {folder.name: other_run(folder) for folder in arguments.others}
    for name, other in report["others"].items():
        print(f"{name}: {len(other['alarms'])} alarms in {len(other['rounds'])} rounds")
    if arguments.json:
        write_results(arguments.json, report)
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


def made_up(runs: int) -> dict[str, dict[str, list[GuardEvent]]]:
    """Alarms by seed of runs that learn, and of runs that stay as they are on trial."""
    return {
        "made_up": {str(seed): alarms(healthy(seed)) for seed in range(runs)},
        "made_up_on_trial": {
            str(seed): alarms(steady(seed), trial_from=TRIAL_ROUND) for seed in range(runs)
        },
    }


def largest_gradient(traces: Sequence[Trace]) -> dict[str, float]:
    """The healthy round that lies highest above its run's baseline, once that is fixed."""
    times, deviations = [], []
    for trace in traces:
        state = GuardState()
        for number, metrics in enumerate(trace, start=1):
            fixed = state.tracks["gradient_spike"].baseline if state.tracks else None
            norm = metrics[NORM]
            if fixed is not None and norm:
                above = math.log(norm) - fixed.center
                times.append(math.exp(above))
                deviations.append(above / fixed.scale)
            _, state = decide(metrics, state, round_number=number)
    return {
        "rounds": len(times),
        "times_baseline": max(times),
        "deviations": max(deviations),
    }


def spikes_found(traces: Sequence[Trace], factor: float) -> dict[str, int]:
    """How many spikes of one round, this many times the run's largest norm, are found in it."""
    found = 0
    for trace in traces:
        spike = factor * max(metrics[NORM] or 0.0 for metrics in trace)
        for place in SPIKE_ROUNDS:
            spiked = [*trace[: place - 1], {**trace[place - 1], NORM: spike}]
            found += any(
                event.alarm == "gradient_spike" and event.round == place for event in alarms(spiked)
            )
    return {"spikes": len(traces) * len(SPIKE_ROUNDS), "found": found}


def other_run(folder: Path) -> dict[str, Any]:
    """Alarms of a run that another command recorded, and what the guard read of its rounds."""
    trace = [line for line in read_lines(folder, "metrics.jsonl") if line["kind"] == "round"]
    read = {signal.metric for signal in SIGNALS.values()} | {
        *("update/loss", "update/skipped_steps_total", "rollout/groups", "rollout/dead_groups"),
        *("rollout/errors_total", "rollout/tokens"),
    }
    return {
        "made_with": json.loads((folder / "run.json").read_text()),
        "alarms": [asdict(event) for event in alarms(trace)],
        "rounds": [{name: line[name] for name in sorted(read) if name in line} for line in trace],
    }


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
