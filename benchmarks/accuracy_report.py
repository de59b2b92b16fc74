"""Times until an accuracy as ratios, a table and curves; what was never reached is said so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.results import write_figure

SIDES = ("trl", "gmpo")
LABELS = {"trl": "TRL without vLLM", "gmpo": "gmpo"}
BOUNDS = {
    (True, True): "",
    (False, True): "at least",
    (True, False): "at most",
    (False, False): "unknown",
}
"""What a ratio is, by whether TRL and gmpo reached the target."""
Run = Mapping[str, Any]


def summary(runs: Mapping[str, Run]) -> dict[str, Any]:
    """Of the seeds that both sides did: seconds, and TRL's over gmpo's with what the ratio is."""
    ratios = {str(seed): ratio_of(runs, seed) for seed in paired_seeds(runs)}
    figures: dict[str, Any] = {"num_seeds": len(ratios), "ratios": ratios}
    for side in SIDES:
        of_side = [each for each in runs.values() if each["side"] == side]
        if of_side:
            figures[side] = {
                "seconds": median(each["seconds"] for each in of_side),
                "num_rounds": median(each["num_rounds"] for each in of_side),
                "num_reached": sum(each["is_reached"] for each in of_side),
                "num_runs": len(of_side),
            }
    if ratios:
        values = [each["ratio"] for each in ratios.values()]
        figures |= {
            "ratio_median": median(values),
            "ratio_min": min(values),
            "ratio_max": max(values),
            "num_censored": sum(each["bound"] != "" for each in ratios.values()),
        }
    return figures


def paired_seeds(runs: Mapping[str, Run]) -> list[int]:
    seeds = {side: {r["seed"] for r in runs.values() if r["side"] == side} for side in SIDES}
    return sorted(seeds["trl"] & seeds["gmpo"])


def ratio_of(runs: Mapping[str, Run], seed: int) -> dict[str, Any]:
    trl, gmpo = runs[f"trl/{seed}"], runs[f"gmpo/{seed}"]
    return {
        "ratio": trl["seconds"] / gmpo["seconds"],
        "bound": BOUNDS[trl["is_reached"], gmpo["is_reached"]],
    }


def print_table(content: Mapping[str, Any], console: Console | None = None) -> None:
    """A row a seed and a line of ratios."""
    console = console or Console(width=120)
    setting, runs = content["setting"], content["runs"]
    table = Table(
        title=f"training until {setting['target']:g} of {setting['items']} held-out items are right"
    )
    names = ("seed", "TRL, s", "TRL, rounds", "gmpo, s", "gmpo, rounds", "TRL / gmpo")
    for name in names:
        table.add_column(name)
    for seed in sorted({run["seed"] for run in runs.values()}):
        cells: list[str] = []
        for side in SIDES:
            run = runs.get(f"{side}/{seed}")
            cells += ["", ""] if run is None else [seconds_of(run), str(run["num_rounds"])]
        ratio = content["summary"]["ratios"].get(str(seed))
        shown = "" if ratio is None else f"{ratio['bound']} {ratio['ratio']:.2f}".strip()
        table.add_row(str(seed), *cells, shown)
    console.print(table)
    figures = content["summary"]
    if figures["num_seeds"]:
        console.print(
            f"TRL / gmpo, seconds of training: {figures['ratio_median']:.2f} "
            f"({figures['ratio_min']:.2f}-{figures['ratio_max']:.2f}) over "
            f"{figures['num_seeds']} seeds, of which {figures['num_censored']} have a side that "
            "never got there and counts with its whole time"
        )


def seconds_of(run: Run) -> str:
    """With "> " where the target was not reached."""
    return f"{'' if run['is_reached'] else '> '}{run['seconds']:.0f}"


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Accuracy over seconds of training, a line a run, and the target."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for color, side in zip(("tab:orange", "tab:blue"), SIDES, strict=True):
        of_side = [run for run in content["runs"].values() if run["side"] == side]
        for number, run in enumerate(of_side):
            axis.plot(
                [point["seconds"] for point in run["curve"]],
                [point["accuracy"] for point in run["curve"]],
                marker="o",
                markersize=3,
                color=color,
                label=LABELS[side] if number == 0 else None,
            )
    target = content["setting"]["target"]
    axis.axhline(target, color="black", linestyle=":", label=f"target {target:g}")
    axis.set_xlabel("seconds of training, evaluations left out")
    axis.set_ylabel("held-out accuracy, greedy")
    axis.set_ylim(0, 1)
    axis.legend()
    write_figure(path, figure)
