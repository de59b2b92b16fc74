"""Does the guard find faults that are put into runs on purpose, and do the runs recover?

Each run learns sums with a small policy that was warmed up. From round 26 on, after the guard has
fixed its baselines, something is broken, for as many rounds as `FAULTS` says; the hooks are here,
put around the loop's own sampling and update. Rounds are counted as they are sampled, those of
attempts that were given up too, so that a fault passes while the guard tries again. Every fault
runs with three guards on the same seeds: `mend` is `guard.mode = "mend"` at its defaults,
`mend-tenth` the same with `learning_rate_factor = 0.1`, and `warn` mends nothing. Runs without a
fault say what healthy is. A run that has its `outcome.json` is read, not run again.

    python -m scripts.fault_injection --seeds 0 1 2 --json docs/results/fault_injection.json
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any
from unittest.mock import patch

import torch
from benchmarks.options import ends_clearly, results_file
from scripts.tiny_policy import sums_recipe, warm_policy
from torch import nn

from gmpo import training
from gmpo.assembly import TrainingParts
from gmpo.checkpoint import TrainingState
from gmpo.config import RunConfig
from gmpo.errors import GuardStopped, NonFiniteError
from gmpo.inputs import Given
from gmpo.inspection import summarize_run
from gmpo.rounds import sample_round
from gmpo.saved_rounds import SampledRound
from gmpo.statistics import wilson_interval
from gmpo.steps import RoundUpdate, update_policy
from gmpo.tracking import provenance, read_lines

ROUNDS = 80
FIRST_ROUND = 26
FOUND_WITHIN = 30
FINAL_ROUNDS = 10
LEARNING_RATE = 1e-4
RATE_TIMES = 30
NOISE = 0.5
"""Of the standard deviation of each weight matrix."""
FAULTS = {
    "none": 0.0,
    "learning_rate": math.inf,
    "reward_sign": 10,
    "weights": 1,
    "mismatch": 2,
    "mismatch_lasting": math.inf,
    "nan_reward": 10,
}
"""Rounds that each fault lasts; a step size stays wrong until it is changed, and a sampler with
other weights until a person repairs it."""
GUARDS: Mapping[str, Mapping[str, Any]] = {
    "mend": {"mode": "mend", "skip_steps": True},
    "mend-tenth": {"mode": "mend", "skip_steps": True, "learning_rate_factor": 0.1},
    "warn": {"mode": "warn"},
}
Outcome = dict[str, Any]


@ends_clearly
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--guards", nargs="+", choices=GUARDS, default=list(GUARDS))
    parser.add_argument("--runs", type=Path, default=Path("runs/faults"), help="folder of the runs")
    parser.add_argument(
        "--json", type=results_file, metavar="FILE", help="write every outcome here too"
    )
    arguments = parser.parse_args(argv)

    torch.set_num_threads(1)  # another number would round sums otherwise
    model = warm_policy(arguments.runs / "policies" / "half", steps=250)
    outcomes = []
    for seed in arguments.seeds:
        for fault in arguments.faults:
            for guard in arguments.guards if fault != "none" else ("mend",):
                folder = arguments.runs / f"{fault}-{guard}-seed{seed}"
                outcomes.append(outcome_of(folder, model, fault=fault, guard=guard, seed=seed))
    rows = table(outcomes)
    print(markdown(rows))
    if arguments.json:
        commits = ", ".join(sorted({str(each["commit"]) for each in outcomes}))
        report = {
            "made_with": {**provenance(), "commit": commits},
            "settings": settings(),
            "table": rows,
            "runs": [
                {key: value for key, value in each.items() if key not in ("settings", "commit")}
                for each in outcomes
            ],
        }
        text = json.dumps(report, indent=1, allow_nan=False)
        arguments.json.write_text(text + "\n")
    return 0


def settings() -> dict[str, Any]:
    """What the runs have in common."""
    lasting = {name: None if rounds == math.inf else rounds for name, rounds in FAULTS.items()}
    return {
        "rounds": ROUNDS,
        "first_round": FIRST_ROUND,
        "found_within": FOUND_WITHIN,
        "final_rounds": FINAL_ROUNDS,
        "learning_rate": LEARNING_RATE,
        "learning_rate_times": RATE_TIMES,
        "noise": NOISE,
        "guards": GUARDS,
        "rounds_of_fault": lasting,
    }


def recipe(model: str, *, guard: str, seed: int, rounds: int = ROUNDS) -> RunConfig:
    """Sums with the reward of `Injection.reward`, under one of `GUARDS`."""
    return sums_recipe(
        model,
        training={
            "rounds": rounds,
            "steps_per_round": 4,
            "learning_rate": LEARNING_RATE,
            "seed": seed,
        },
        reward={
            "weights": {"sum": 1.0},
            "functions": {"sum": "scripts.fault_injection:Injection.reward"},
            "on_error": "drop",
        },
        checkpoint={"every_rounds": 5, "keep": 6},
        evaluation={"every_rounds": 0, "few_shot": 0, "sampled": False},
        guard=GUARDS[guard],
    )


class Injection:
    """One fault around a run's own sampling and update.

    Args:
        fault: a key of `FAULTS`.
        seed: of the noise in weights.
        first_round: that is broken, of the rounds sampled by this process, counted from 1.
    """

    def __init__(self, fault: str, *, seed: int, first_round: int = FIRST_ROUND) -> None:
        self.fault = fault
        self.rounds_sampled = 0
        self._first = first_round
        self._chance = torch.Generator().manual_seed(seed)

    @property
    def is_on(self) -> bool:
        """Whether the round that is being sampled or trained is a broken one."""
        return 0 <= self.rounds_sampled - self._first < FAULTS[self.fault]

    @contextmanager
    def around(self) -> Iterator[None]:
        """The loop with the fault in it."""
        with (
            patch.object(training, "sample_round", self.sample),
            patch.object(training, "update_policy", self.update),
        ):
            yield

    def reward(
        self, completions: list[list[dict[str, str]]], answer: list[str], **_: Any
    ) -> list[float]:
        """1 for the sum and 0 for anything else, unless the fault is in here."""
        pairs = zip(completions, answer, strict=True)
        rewards = [float(turns[0]["content"].strip() == str(right)) for turns, right in pairs]
        if self.is_on and self.fault == "reward_sign":
            return [-reward for reward in rewards]
        if self.is_on and self.fault == "nan_reward":
            return [math.nan] * len(rewards)
        return rewards

    def sample(self, parts: TrainingParts, state: TrainingState) -> SampledRound:
        """The round's rollouts, of other weights than the trainer's if that is the fault."""
        self.rounds_sampled += 1
        weights = list(parts.policy.model.parameters())
        if self.is_on and self.fault == "weights":
            self._disturb(weights)
            parts.publish_weights(state.step)
        if not (self.is_on and self.fault.startswith("mismatch")):
            return sample_round(parts, state)
        kept = [weight.detach().clone() for weight in weights]
        self._disturb(weights)
        parts.publish_weights(state.step)
        sampled = sample_round(parts, state)
        with torch.no_grad():
            for weight, before in zip(weights, kept, strict=True):
                weight.copy_(before)
        parts.publish_weights(state.step)
        return sampled

    def update(self, parts: TrainingParts, *arguments: Any, **named: Any) -> RoundUpdate:
        """The round's optimizer steps, with a step size that is too large if that is the fault."""
        if self.is_on and self.fault == "learning_rate":
            table = parts.config.training
            rate = {"learning_rate": RATE_TIMES * table.learning_rate}
            config = parts.config.model_copy(update={"training": table.model_copy(update=rate)})
            parts = replace(parts, config=config)
        return update_policy(parts, *arguments, **named)

    @torch.no_grad()
    def _disturb(self, weights: Sequence[nn.Parameter]) -> None:
        for weight in weights:
            noise = torch.randn(weight.shape, generator=self._chance)
            weight += NOISE * weight.std() * noise


def outcome_of(folder: Path, model: str, *, fault: str, guard: str, seed: int) -> Outcome:
    """The run's outcome, read if it is there and was made with these settings."""
    file = folder / "outcome.json"
    if file.is_file():
        outcome: Outcome = json.loads(file.read_text())
        if outcome["settings"] == settings():
            return outcome
    # What a killed study left cannot go on: how long the fault has lasted is not saved.
    shutil.rmtree(folder, ignore_errors=True)
    config = recipe(model, guard=guard, seed=seed)
    ended = broken_run(config, folder, Injection(fault, seed=seed))
    named = {"fault": fault, "guard": guard, "seed": seed, "commit": provenance()["commit"]}
    outcome = {**named, **measured(folder, ended), "settings": settings()}
    file.write_text(json.dumps(outcome, indent=1))
    print(f"{folder.name}: {ended}, final reward {outcome['final_reward']}", flush=True)
    return outcome


def broken_run(config: RunConfig, folder: Path, injection: Injection) -> str:
    """Train with the fault; how the run ended."""
    given = Given(rewards={"sum": injection.reward})
    try:
        with injection.around():
            training.train(config, folder=folder, given=given, warn=lambda _: None)
    except GuardStopped:
        return "stopped by the guard"
    except NonFiniteError:
        return "not finite"
    return "finished"


def measured(folder: Path, ended: str, *, first_round: int = FIRST_ROUND) -> Outcome:
    """What a run's folder says of fault and mending."""
    events = list(read_lines(folder, "events.jsonl"))
    # Of the first attempt alone: later ones repeat the rounds before the fault with it.
    late = [each for each in events if each["attempt"] or each["round"] >= first_round]
    first = late[0] if late else None
    rounds = [line for line in read_lines(folder, "metrics.jsonl") if line["kind"] == "round"]
    rewards = [line["rollout/reward"] for line in rounds]
    known = [reward for reward in rewards[-FINAL_ROUNDS:] if reward is not None]
    summary = summarize_run(folder)
    return {
        "ended": ended,
        "events_before_fault": [each["alarm"] for each in events if each not in late],
        "first_alarm": None if first is None else first["alarm"],
        "rounds_to_alarm": None if first is None else first["round"] - first_round + 1,
        "alarms": summary.alarms,
        "went_back_to": [each["to_round"] for each in events if each["taken"] == "roll_back"],
        "rollbacks": summary.rollbacks,
        "skipped_steps": summary.skipped_steps_total,
        "rounds": len(rounds),
        "final_reward": fmean(known) if known else None,
    }


def table(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """A row for each fault and guard.

    A run has recovered if it was finished, and its reward of the last ten rounds is not below that
    of the worst run without a fault.
    """
    healthy = {each["seed"]: each["final_reward"] for each in outcomes if each["fault"] == "none"}
    cells: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        cells.setdefault((outcome["fault"], outcome["guard"]), []).append(outcome)
    return [_row(fault, guard, runs, healthy) for (fault, guard), runs in cells.items()]


def _row(
    fault: str, guard: str, runs: Sequence[Outcome], healthy: Mapping[int, float]
) -> dict[str, Any]:
    delays = [each["rounds_to_alarm"] for each in runs if each["rounds_to_alarm"] is not None]
    found = sum(delay <= FOUND_WITHIN for delay in delays)
    finals = [each["final_reward"] for each in runs if each["final_reward"] is not None]
    recovered = [
        each["ended"] == "finished" and each["final_reward"] >= min(healthy.values())
        for each in runs
        if healthy and each["final_reward"] is not None
    ]
    behind = [
        healthy[each["seed"]] - each["final_reward"]
        for each in runs
        if each["seed"] in healthy and each["final_reward"] is not None
    ]
    return {
        "fault": fault,
        "guard": guard,
        "runs": len(runs),
        "found": found,
        "found_interval_95": list(wilson_interval(found, len(runs))),
        "rounds_to_alarm": [min(delays), median(delays), max(delays)] if delays else None,
        "first_alarms": dict(Counter(each["first_alarm"] for each in runs if each["first_alarm"])),
        "rollbacks": [each["rollbacks"] for each in runs],
        "skipped_steps": [each["skipped_steps"] for each in runs],
        "ended": dict(Counter(each["ended"] for each in runs)),
        "final_reward": [min(finals), fmean(finals), max(finals)] if finals else None,
        "behind_healthy_same_seed": fmean(behind) if behind else None,
        "recovered": sum(recovered) if healthy else None,
    }


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| fault | guard | found within 30 rounds | rounds to the alarm | first alarm | roll-backs "
        "| ended | final reward | behind its healthy twin | recovered |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        delay, final = row["rounds_to_alarm"], row["final_reward"]
        behind = row["behind_healthy_same_seed"]
        lines.append(
            f"| {row['fault']} | {row['guard']} | {row['found']} of {row['runs']} "
            f"| {'-' if delay is None else f'{delay[1]:g} ({delay[0]} to {delay[2]})'} "
            f"| {_counted(row['first_alarms']) or '-'} | {', '.join(map(str, row['rollbacks']))} "
            f"| {_counted(row['ended'])} "
            f"| {'-' if final is None else f'{final[1]:.3f} ({final[0]:.3f} to {final[2]:.3f})'} "
            f"| {'-' if behind is None else f'{behind:+.3f}'} "
            f"| {row['recovered']} of {row['runs']} |"
        )
    return "\n".join(lines)


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in counts.items())


if __name__ == "__main__":
    raise SystemExit(main())
