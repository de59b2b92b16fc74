"""How often serving's detectors cry wolf, and how soon they see what has changed, by simulation.

Streams of blocks as a gateway judges them, a block a minute, in which nothing changes: normal and
heavy-tailed answers, few and many of them, traffic whose mix wanders, and traffic with a daily
cycle. What counts is how many times a week a level is entered that is wrong. Then the same streams
with one thing changed after six hours, and the minutes until it is told.

    python -m scripts.anomaly_calibration --json docs/results/anomaly_calibration.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from benchmarks.options import ends_clearly, results_file
from benchmarks.results import write_results
from scipy.stats import chi2

from gmpo.monitoring.anomalies import AnomalyState, Figure, judge_block
from gmpo.monitoring.severity import LEVELS
from gmpo.tracking import provenance

DAY, WEEK = 24 * 60, 7 * 24 * 60
CHANGE, PATIENCE = 6 * 60, 6 * 60
"""Block with which a change begins, and blocks that it is given to be seen in."""
LATENCY, QUALITY, LOGPROB, SUCCESS, CUT = 0.7, 0.8, -0.6, 0.995, 0.05
"""Median log seconds, mean quality, median nats a token, and shares of a healthy stream."""
SPREADS = {"log_latency": 0.8, "quality": 0.15, "mean_logprob": 0.25}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of traffic.

    Attributes:
        answers: in a block.
        tails: degrees of freedom of Student's t; None for normal answers.
        wander: deviation of a block's level from the stream's, in deviations of one answer; these
            are correlated by 0.95 from one block to the next.
        daily: amplitude of a daily cycle, likewise.
    """

    answers: int
    tails: float | None = None
    wander: float = 0.0
    daily: float = 0.0


KINDS: Mapping[str, Kind] = {
    "normal": Kind(answers=30),
    "fewest answers": Kind(answers=20),
    "many answers": Kind(answers=300),
    "heavy tails": Kind(answers=30, tails=2.5),
    "wandering mix": Kind(answers=30, wander=0.1),
    "daily cycle": Kind(answers=30, daily=0.2),
    "daily cycle, heavy tails": Kind(answers=30, daily=0.2, tails=2.5),
}

CHANGES: Mapping[str, Mapping[str, float]] = {
    "successes 99.5 % to 90 %": {"success": -0.095},
    "successes 99.5 % to 80 %": {"success": -0.195},
    "successes 99.5 % to 0 %": {"success": -0.995},
    "quality down 0.15": {"quality": -0.15},
    "quality down 0.3": {"quality": -0.3},
    "latency times 2": {"log_latency": math.log(2)},
    "latency times 4": {"log_latency": math.log(4)},
    "token probability times 0.7": {"mean_logprob": math.log(0.7)},
    "token probability times 1.4": {"mean_logprob": math.log(1.4)},
    "cut answers 5 % to 40 %": {"cut_share": 0.35},
    "memory times 2": {"log_memory": math.log(2)},
}


@ends_clearly
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=results_file, required=True)
    parser.add_argument("--weeks", type=int, default=20, help="streams of each kind")
    parser.add_argument("--streams", type=int, default=20, help="streams with each change")
    arguments = parser.parse_args(argv)
    report: dict[str, Any] = {"made_with": provenance(), "weeks": arguments.weeks}
    report["nothing_changes"] = {}
    for name, kind in KINDS.items():
        # Not the streams with which the detectors' settings were chosen, whose seeds are smaller.
        found = [entered(judged(kind, WEEK, 500 + seed)) for seed in range(arguments.weeks)]
        rates = {level: rate([one[level] for one in found]) for level in LEVELS[1:]}
        report["nothing_changes"][name] = rates
        print(name, json.dumps(rates), flush=True)
    report["streams"], report["changes"] = arguments.streams, {}
    for name in ("normal", "heavy tails"):
        report["changes"][name] = {}
        for change, shift in CHANGES.items():
            delays = [delay(KINDS[name], shift, seed) for seed in range(arguments.streams)]
            summary = {level: summed([one[level] for one in delays]) for level in LEVELS[1:]}
            report["changes"][name][change] = summary
            print(name, change, json.dumps(summary), flush=True)
    write_results(arguments.json, report)
    return 0


def judged(
    kind: Kind, blocks: int, seed: int, shift: Mapping[str, float] | None = None
) -> list[str]:
    """Levels block by block of one stream."""
    state = AnomalyState()
    levels = []
    for figures in stream(kind, blocks, seed, shift or {}):
        report, state = judge_block(figures, state)
        levels.append(report.level)
    return levels


def stream(
    kind: Kind, blocks: int, seed: int, shift: Mapping[str, float]
) -> Iterator[dict[str, Figure]]:
    """Figures of blocks; what changes does so with block `CHANGE`."""
    chance = np.random.default_rng([seed, kind.answers])
    shifted = np.arange(blocks) >= CHANGE
    answers = {
        name: level_of_blocks(kind, blocks, chance)[:, None]
        + noise(kind, (blocks, kind.answers), chance)
        for name in SPREADS
    }
    centers = {"log_latency": LATENCY, "quality": QUALITY, "mean_logprob": LOGPROB}
    values = {
        name: centers[name]
        + SPREADS[name] * answers[name]
        + (shift.get(name, 0.0) * shifted)[:, None]
        for name in SPREADS
    }
    shares = {
        name: chance.binomial(kind.answers, share + shift.get(name, 0.0) * shifted) / kind.answers
        for name, share in (("success", SUCCESS), ("cut_share", CUT))
    }
    columns = {
        "log_latency": np.median(values["log_latency"], axis=1),
        "log_latency_p95": np.quantile(values["log_latency"], 0.95, axis=1),
        "quality": np.clip(values["quality"], 0, 1).mean(axis=1),
        "mean_logprob": np.median(np.minimum(values["mean_logprob"], 0), axis=1),
        **shares,
        "log_memory": 21
        + 0.05 * noise(kind, (blocks,), chance)
        + shift.get("log_memory", 0.0) * shifted,
    }
    for place in range(blocks):
        yield {
            name: Figure(value=float(column[place]), count=kind.answers)
            for name, column in columns.items()
        }


def noise(kind: Kind, shape: tuple[int, ...], chance: np.random.Generator) -> np.ndarray:
    """Around 0; normal with deviation 1, or with heavier tails."""
    if kind.tails is None:
        return chance.standard_normal(shape)
    return chance.standard_t(kind.tails, shape)


def level_of_blocks(kind: Kind, blocks: int, chance: np.random.Generator) -> np.ndarray:
    """How far each block's level lies from the stream's, in deviations of one answer."""
    begin = chance.uniform(0, DAY)
    cycle = kind.daily * np.sin(2 * np.pi * (begin + np.arange(blocks)) / DAY)
    level = np.zeros(blocks)
    pushes = chance.standard_normal(blocks) * kind.wander * math.sqrt(1 - 0.95**2)
    for place in range(1, blocks):
        level[place] = 0.95 * level[place - 1] + pushes[place]
    return cycle + level


def entered(levels: list[str]) -> dict[str, int]:
    """How often each level was entered from below."""
    places = [LEVELS.index(level) for level in ("ok", *levels)]
    steps = list(itertools.pairwise(places))
    return {
        level: sum(before < number <= after for before, after in steps)
        for number, level in enumerate(LEVELS)
        if number
    }


def rate(counts: list[int]) -> dict[str, float]:
    """Times a week and a one-sided bound at 95 %.

    The larger of Poisson's bound, which holds where weeks are alike, and of the normal bound on the
    mean of weeks, which knows that one bad baseline gives many false alarms in its own week.
    """
    total, weeks = sum(counts), len(counts)
    poisson = float(chi2.ppf(0.95, 2 * (total + 1))) / 2 / weeks
    by_week = total / weeks + 1.645 * float(np.std(counts, ddof=1)) / math.sqrt(weeks)
    return {
        "times": total,
        "a_week": total / weeks,
        "upper_95": max(poisson, by_week),
        "most_in_a_week": max(counts),
        "share_of_weeks": sum(count > 0 for count in counts) / weeks,
    }


def delay(kind: Kind, shift: Mapping[str, float], seed: int) -> dict[str, float]:
    """Blocks from the change until a level is there; infinite if it never is."""
    levels = judged(kind, CHANGE + PATIENCE, 1000 + seed, shift)[CHANGE:]
    places = [LEVELS.index(level) for level in levels]
    return {
        level: next((place + 1 for place, now in enumerate(places) if now >= number), math.inf)
        for number, level in enumerate(LEVELS)
        if number
    }


def summed(delays: list[float]) -> dict[str, float | None]:
    """Share found, and minutes to it; null where fewer are found than that."""
    median, most = np.quantile(delays, [0.5, 0.9], method="higher")
    return {
        "found": sum(map(math.isfinite, delays)) / len(delays),
        "median_minutes": float(median) if math.isfinite(median) else None,
        "p90_minutes": float(most) if math.isfinite(most) else None,
    }


if __name__ == "__main__":
    raise SystemExit(main())
