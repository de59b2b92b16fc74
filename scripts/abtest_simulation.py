"""How often the experiment's statistics are wrong, and how soon they are right, by simulation.

Experiments in which both arms are alike are looked at again and again; an interval that ever
excludes 0 is a false positive. Four kinds of traffic: a rare success (2 %), a frequent one (70 %),
log-normal latencies with a heavy tail, and sessions whose requests are alike. Beside each the test
that is right only for one look, and for sessions the sequence that takes requests for evidence.

    python -m scripts.abtest_simulation --json docs/results/abtest.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from benchmarks.options import ends_clearly, results_file
from benchmarks.results import write_results
from scipy.special import ndtri

from gmpo.abtest.ratio import ALARM_ODDS, log_bayes_factors
from gmpo.abtest.sequences import boundary
from gmpo.statistics import wilson_interval
from gmpo.tracking import provenance

ALPHA, TUNED_FOR = 0.05, 1000
SIMULATIONS, CHUNK = 4000, 100
UNITS, BURN_IN, EVERY = 6000, 50, 5
"""Of one arm; the first look; units of each arm between looks."""
FIXED = float(ndtri(1 - ALPHA / 2))
SUCCESS = {"rare": 0.02, "frequent": 0.7}
EFFECTS = {"rare": 0.01, "frequent": 0.08, "latency": 0.1, "sessions": 0.05}
"""What the candidate has more, by kind of traffic."""
EARLY = 4000
"""Units of both arms of a small experiment, by which the power is told too."""


@dataclass(frozen=True, kw_only=True)
class Crossings:
    """Units of both arms at which each experiment's test first excluded 0; infinite if never."""

    sequence: np.ndarray
    fixed: np.ndarray
    by_request: np.ndarray


@ends_clearly
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=results_file, required=True)
    parser.add_argument("--simulations", type=int, default=SIMULATIONS)
    arguments = parser.parse_args(argv)
    count = arguments.simulations
    report: dict[str, Any] = {"made_with": provenance(), "simulations": count}
    for kind in EFFECTS:
        found = crossings(kind, effect=0.0, simulations=count)
        report[kind] = {
            name: rate(values) for name, values in vars(found).items() if has_meaning(kind, name)
        }
        print(kind, json.dumps(report[kind]))
    for kind, effect in EFFECTS.items():
        found = crossings(kind, effect=effect, simulations=count)
        report[f"{kind} {effect:+g}"] = stopping(found.sequence)
        print(kind, effect, json.dumps(report[f"{kind} {effect:+g}"]))
    report["ratio"] = ratio_alarms(count)
    print("ratio", json.dumps(report["ratio"]))
    write_results(arguments.json, report)
    return 0


def has_meaning(kind: str, test: str) -> bool:
    return test != "by_request" or kind == "sessions"


def crossings(
    kind: str, *, effect: float, simulations: int, units: int = UNITS, seed: int = 0
) -> Crossings:
    """First crossings of so many experiments, each looked at every few units after the burn-in."""
    parts = []
    for first in range(0, simulations, CHUNK):
        rng = np.random.default_rng([seed, first, len(kind)])
        size = min(CHUNK, simulations - first)
        arms = [draw(kind, shift, rng, size=size, units=units) for shift in (0.0, effect)]
        parts.append(_first_crossings(arms[0], arms[1]))
    return Crossings(
        **{
            name: np.concatenate([part[name] for part in parts])
            for name in ("sequence", "fixed", "by_request")
        }
    )


def draw(
    kind: str, shift: float, rng: np.random.Generator, *, size: int, units: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each unit's sum over its requests, sum of squares, and number of them; [size, units]."""
    if kind in SUCCESS:
        values = (rng.random((size, units)) < SUCCESS[kind] + shift).astype(float)
        return values, values, np.ones_like(values)
    if kind == "latency":
        # Log seconds: Student's t with 5 degrees of freedom has a heavier tail than log-normal.
        values = rng.standard_t(5, (size, units)) * 0.5 + shift
        return values, values**2, np.ones_like(values)
    requests = rng.geometric(1 / 3, (size, units))
    taste = np.clip(0.7 + shift + rng.normal(0, 0.2, (size, units)), 0, 1)
    successes = rng.binomial(requests, taste).astype(float)
    return successes, successes, requests.astype(float)


def _first_crossings(
    control: tuple[np.ndarray, ...], candidate: tuple[np.ndarray, ...]
) -> Mapping[str, np.ndarray]:
    looks = np.arange(BURN_IN, control[0].shape[1] + 1, EVERY) - 1
    both = 2 * (looks + 1)
    means, by_unit, by_request = [], [], []
    for sums, squares, counts in (control, candidate):
        total, size = np.cumsum(counts, axis=1)[:, looks], looks + 1
        mean = np.cumsum(sums, axis=1)[:, looks] / total
        means.append(mean)
        by_unit.append(_variance(sums, counts, looks, mean))
        spread = np.cumsum(squares, axis=1)[:, looks] / total - mean**2
        by_request.append(spread / total)
        assert size[0] == BURN_IN
    difference = np.abs(means[1] - means[0])
    error, naive = (np.sqrt(np.maximum(sum(v), 0)) for v in (by_unit, by_request))
    wide = boundary(both, alpha=ALPHA, tuned_for=TUNED_FOR)
    with np.errstate(invalid="ignore"):
        return {
            "sequence": _first(difference > wide * error, error, both),
            "fixed": _first(difference > FIXED * error, error, both),
            "by_request": _first(difference > wide * naive, naive, both),
        }


def _variance(
    sums: np.ndarray, counts: np.ndarray, looks: np.ndarray, mean: np.ndarray
) -> np.ndarray:
    """Of the mean over requests with whole units as evidence; as `gmpo.abtest.estimates`."""
    n = looks + 1
    ss, sc, cc = (
        np.cumsum(product, axis=1)[:, looks] for product in (sums**2, sums * counts, counts**2)
    )
    total = np.cumsum(counts, axis=1)[:, looks]
    influence = (ss - 2 * mean * sc + mean**2 * cc) * (n / total) ** 2
    return influence / (n - 1) / n


def _first(crossed: np.ndarray, error: np.ndarray, both: np.ndarray) -> np.ndarray:
    crossed = crossed & (error > 0)
    return np.where(crossed.any(axis=1), both[crossed.argmax(axis=1)], np.inf)


def rate(first: np.ndarray) -> dict[str, float]:
    """Share of experiments that ever crossed, with the upper end of its 95 % interval."""
    wrong = int(np.isfinite(first).sum())
    low, high = wilson_interval(wrong, len(first))
    return {"share": wrong / len(first), "low_95": low, "high_95": high}


def stopping(first: np.ndarray) -> dict[str, float | None]:
    """Share of experiments that found the difference, and after how many units of both arms."""
    share = float(np.isfinite(first).mean())
    return {
        "power": share,
        f"power_by_{EARLY}_units": float((first <= EARLY).mean()),
        "median_units": float(np.median(first)) if share > 0.5 else None,
        "max_units": 2 * UNITS,
    }


def ratio_alarms(simulations: int, *, units: int = 20_000) -> dict[str, Any]:
    """False alarms of the test of the shares, and when a leak to 52 : 48 is found."""
    found = {}
    for name, share in (("alike", 0.5), ("52 to 48", 0.52)):
        first = []
        for start in range(0, simulations, CHUNK):
            rng = np.random.default_rng([1, start])
            size = min(CHUNK, simulations - start)
            ones = np.cumsum(rng.random((size, units)) < share, axis=1)
            looks = np.arange(99, units, 100)
            counts = np.stack([ones, np.arange(1, units + 1) - ones], axis=-1)[:, looks]
            alarms = log_bayes_factors(counts, np.array([0.5, 0.5])) > np.log(ALARM_ODDS)
            first.append(np.where(alarms.any(axis=1), looks[alarms.argmax(axis=1)] + 1, np.inf))
        at = np.concatenate(first)
        median = float(np.median(at))
        found[name] = {
            **rate(at),
            "median_units": median if np.isfinite(median) else None,
            "max_units": units,
        }
    return found


if __name__ == "__main__":
    raise SystemExit(main())
