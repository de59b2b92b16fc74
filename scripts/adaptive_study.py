"""Do adaptive settings beat constant ones? The same seeds, prompts and weights with and without.

A small policy that half knows sums is trained at two step sizes, one that suits it and one that is
too large for it: with constant settings, with `adaptive.clip`, with `adaptive.learning_rate`, and
with both; and, where right answers and near ones are combined geometrically, with a floor that
falls (`adaptive.reward_floor_end`) and with floors that stay. Everything else is alike, so runs of
a seed are pairs. A run that has its `outcome.json` is read, one that was killed goes on, and the
results hold every seed whose runs are all done:

    python -m scripts.adaptive_study --seeds 0 1 2 3 4 5 --json docs/results/adaptive.json \
        --plot docs/results/adaptive.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from benchmarks.options import ends_clearly, plot_file, results_file
from benchmarks.results import write_figure, write_results
from matplotlib.figure import Figure
from scripts.tiny_policy import sums_recipe, warm_policy

from gmpo.config import RunConfig
from gmpo.errors import NonFiniteError
from gmpo.statistics import paired_t_interval
from gmpo.tracking import provenance, read_lines
from gmpo.training import train

ROUNDS = 100
WARM_UP = 20
FINAL_ROUNDS = 10
RATES = {"suitable": 1e-4, "too large": 3e-4}
FIRST_FLOOR, LAST_FLOOR = 0.05, 0.001
NEAR = "scripts.adaptive_study:nearness"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What a run is told besides; `floor` combines right and near answers geometrically."""

    adaptive: Mapping[str, Any] = field(default_factory=dict)
    floor: float | None = None


CONSTANT = "constant"
ARMS: Mapping[str, Arm] = {
    CONSTANT: Arm(),
    "clip": Arm(adaptive={"clip": True, "warm_up_rounds": WARM_UP}),
    "step size": Arm(adaptive={"learning_rate": True, "warm_up_rounds": WARM_UP}),
    "adaptive": Arm(adaptive={"clip": True, "learning_rate": True, "warm_up_rounds": WARM_UP}),
    "floor": Arm(floor=FIRST_FLOOR),
    "low floor": Arm(floor=LAST_FLOOR),
    "falling floor": Arm(adaptive={"reward_floor_end": LAST_FLOOR}, floor=FIRST_FLOOR),
}
PAIRS = (
    (CONSTANT, "clip"),
    (CONSTANT, "step size"),
    (CONSTANT, "adaptive"),
    ("floor", "falling floor"),
    ("low floor", "falling floor"),
)
"""What is compared, the first being subtracted."""
BAND = (0.005, 0.02)
CONFIDENCE = 0.975
"""Of each interval, so that the two of an outcome and a pair hold together with 95 %."""
OUTCOMES = {
    "final_correct": "share of right answers in the last ten rounds, as sampled",
    "kl": "mean of kl_old/k1, round 21 on, in nats",
    "low_share": "mean of clip/low_fraction, round 21 on",
    "high_share": "mean of clip/high_fraction, round 21 on",
    "in_band": "share of sides and rounds, round 21 on, that cut 0.5 % to 2 % of the tokens",
}
CURVES = {
    "right answers": "rollout/reward/correct",
    "tokens cut above": "clip/high_fraction",
    "clip_high": "adaptive/clip_high",
    "step size factor": "adaptive/learning_rate_factor",
    "reward floor": "adaptive/reward_floor",
}
Outcome = dict[str, Any]


@ends_clearly
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4, 5])
    parser.add_argument("--runs", type=Path, default=Path("runs/adaptive"), help="of the runs")
    parser.add_argument(
        "--json", type=results_file, metavar="FILE", help="write every figure here too"
    )
    parser.add_argument("--plot", type=plot_file, metavar="FILE", help="draw mean curves here")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)  # another number would round sums otherwise
    model = warm_policy(arguments.runs / "policy")
    outcomes: list[Outcome] = []
    for seed in sorted(set(arguments.seeds)):
        outcomes += [
            outcome_of(arguments.runs, model, rate=rate, arm=arm, seed=seed)
            for rate in RATES
            for arm in ARMS
        ]
        write(arguments, outcomes)
    for line in markdown(comparisons(outcomes)):
        print(line)
    return 0


def recipe(model: str, *, rate: str, arm: str, seed: int) -> RunConfig:
    """Of one run; arms differ in `[adaptive]` and, where rewards have a floor, in `[reward]`."""
    told = ARMS[arm]
    reward: dict[str, Any] = {}
    if told.floor is not None:
        reward = {
            "weights": {"correct": 1.0, "near": 1.0},
            "functions": {"near": NEAR},
            "combine": "geometric",
            "floor": told.floor,
        }
    return sums_recipe(
        model,
        reward=reward,
        training={
            "rounds": ROUNDS,
            "steps_per_round": 4,
            "learning_rate": RATES[rate],
            "seed": seed,
        },
        checkpoint={"every_rounds": 20, "keep": 1},
        evaluation={"every_rounds": 0, "few_shot": 0, "sampled": False},
        adaptive=dict(told.adaptive),
    )


def nearness(
    completions: Sequence[Sequence[Mapping[str, str]]], answer: Sequence[str], **_: object
) -> list[float]:
    """1 for the right sum, a tenth less for each that a number is off, 0 for what is no number."""
    texts = [completion[-1]["content"].strip() for completion in completions]
    return [
        max(0.0, 1 - abs(int(text) - int(right)) / 10) if text.isdecimal() else 0.0
        for text, right in zip(texts, answer, strict=True)
    ]


def outcome_of(runs: Path, model: str, *, rate: str, arm: str, seed: int) -> Outcome:
    """A run's outcome, read if it is there."""
    folder = runs / f"{rate}-{arm}-{seed}".replace(" ", "-")
    file = folder / "outcome.json"
    if file.is_file():
        stored: Outcome = json.loads(file.read_text())
        return stored
    ended = "finished"
    try:
        train(
            recipe(model, rate=rate, arm=arm, seed=seed),
            folder=folder,
            resume=(folder / "recipe.toml").is_file(),
            warn=lambda _: None,
        )
    except NonFiniteError:
        ended = "not finite"
    lines = [line for line in read_lines(folder, "metrics.jsonl") if line["kind"] == "round"]
    events = list(read_lines(folder, "events.jsonl"))
    outcome = {
        "rate": rate,
        "arm": arm,
        "seed": seed,
        "ended": ended,
        "commit": provenance()["commit"],
        **measured(lines),
        "changes": sum("setting" in event for event in events),
        "alarms": sorted(event["alarm"] for event in events if "alarm" in event),
        "curves": {name: [line.get(metric) for line in lines] for name, metric in CURVES.items()},
    }
    file.write_text(json.dumps(outcome))
    print(f"{folder.name}: {ended}, {outcome['final_correct']:.3f} right at the end", flush=True)
    return outcome


def measured(rounds: Sequence[Mapping[str, Any]]) -> Outcome:
    """The figures that arms are compared by.

    Right answers, not rewards: those of different floors are not of one size. A run has collapsed
    if its last ten rounds have less than half of what its best ten in a row had.
    """
    correct = [line["rollout/reward/correct"] for line in rounds]
    final = fmean(correct[-FINAL_ROUNDS:])
    ends = range(min(FINAL_ROUNDS, len(correct)), len(correct) + 1)
    best = max(fmean(correct[max(0, end - FINAL_ROUNDS) : end]) for end in ends)
    late = rounds[WARM_UP:]
    low, high = (
        [line[name] for line in late if line.get(name) is not None]
        for name in ("clip/low_fraction", "clip/high_fraction")
    )
    kl = [line["kl_old/k1"] for line in late if line.get("kl_old/k1") is not None]
    shares = low + high
    return {
        "final_correct": final,
        "best_correct": best,
        "collapsed": final < best / 2,
        "kl": fmean(kl) if kl else None,
        "low_share": fmean(low) if low else None,
        "high_share": fmean(high) if high else None,
        "in_band": fmean(BAND[0] <= share <= BAND[1] for share in shares) if shares else None,
    }


def comparisons(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Every pair of arms at each step size, by each outcome, paired over seeds."""
    return [
        row
        for rate in RATES
        for pair in PAIRS
        for row in _compared([run for run in outcomes if run["rate"] == rate], pair, rate=rate)
    ]


def _compared(
    runs: Sequence[Outcome], pair: tuple[str, str], *, rate: str
) -> Iterator[dict[str, Any]]:
    baseline, arm = ({run["seed"]: run for run in runs if run["arm"] == name} for name in pair)
    seeds = sorted(baseline.keys() & arm.keys())
    about = {"rate": rate, "baseline": pair[0], "arm": pair[1]}
    for name in OUTCOMES:
        values = [(baseline[seed][name], arm[seed][name]) for seed in seeds]
        known = [both for both in values if None not in both]
        differences = [after - before for before, after in known]
        yield {
            **about,
            "outcome": name,
            "seeds": len(known),
            "before": fmean(before for before, _ in known) if known else None,
            "after": fmean(after for _, after in known) if known else None,
            "difference": fmean(differences) if known else None,
            "interval": _interval(differences),
        }
    yield {
        **about,
        "outcome": "collapses",
        "seeds": len(seeds),
        "before": sum(baseline[seed]["collapsed"] for seed in seeds),
        "after": sum(arm[seed]["collapsed"] for seed in seeds),
    }


def _interval(differences: Sequence[float]) -> tuple[float, float] | None:
    if len(differences) < 2:
        return None
    return paired_t_interval(differences, confidence=CONFIDENCE)


def markdown(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The comparisons as a table."""
    lines = [
        "| step size | arm | against | outcome | seeds | against | arm | difference (97.5 %) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        difference = ""
        if row.get("interval") is not None:
            low, high = row["interval"]
            difference = f"{row['difference']:+.4f} ({low:+.4f} to {high:+.4f})"
        sides = ["" if row[side] is None else f"{row[side]:.4g}" for side in ("before", "after")]
        lines.append(
            f"| {row['rate']} | {row['arm']} | {row['baseline']} | {row['outcome']} "
            f"| {row['seeds']} | {' | '.join(sides)} | {difference} |"
        )
    return lines


def write(arguments: argparse.Namespace, outcomes: Sequence[Outcome]) -> None:
    """The results so far, where they are asked for."""
    if arguments.json:
        report = {
            "made_with": provenance(),
            "rounds": ROUNDS,
            "step_sizes": RATES,
            "arms": {name: asdict(arm) for name, arm in ARMS.items()},
            "outcomes": OUTCOMES,
            "comparisons": comparisons(outcomes),
            "runs": [{key: run[key] for key in run if key != "curves"} for run in outcomes],
        }
        write_results(arguments.json, report)
    if arguments.plot:
        draw(outcomes, arguments.plot)


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Curves over rounds, the mean over seeds, one column a step size."""
    figure = Figure(figsize=(9, 12), layout="constrained")
    grid = figure.subplots(len(CURVES), len(RATES), sharex=True, squeeze=False)
    for column, rate in enumerate(RATES):
        for row, curve in enumerate(CURVES):
            axes = grid[row][column]
            for color, arm in enumerate(ARMS):
                runs = [
                    run["curves"][curve]
                    for run in outcomes
                    if (run["rate"], run["arm"]) == (rate, arm)
                ]
                means = [_mean(values) for values in zip(*runs, strict=False)]
                if any(mean is not None for mean in means):
                    axes.plot(range(1, len(means) + 1), _gaps(means), f"C{color}", label=arm)
            axes.set_ylabel(curve)
            axes.set_title(f"step size {RATES[rate]:g} ({rate})" if row == 0 else "")
        grid[-1][column].set_xlabel("round")
    figure.legend(handles=grid[0][0].get_lines(), loc="outside upper center", ncols=len(ARMS))
    write_figure(path, figure, dpi=110)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _gaps(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


if __name__ == "__main__":
    raise SystemExit(main())
