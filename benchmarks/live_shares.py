"""How the update's time depends on the share of live groups: both sides on the same completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.comparison import Bench, Sides, hold_to_trl
from benchmarks.results import Results, write_figure
from benchmarks.spread import paired_ratios, spread

SHARES = (Fraction(1, 8), Fraction(2, 8), Fraction(4, 8), Fraction(1))
SIDES = ("trl", "gmpo")


def live_counts(prompts_per_round: int) -> list[int]:
    """Live groups of each point: those shares of a round that are whole groups."""
    counts = [share * prompts_per_round for share in SHARES]
    return [int(count) for count in counts if count.denominator == 1]


def run_live_shares(bench: Bench, sides: Sides, results: Results, *, wanted: int) -> None:
    """Updates of both sides at every share, until the file has as many of each as wanted.

    TRL draws the same completions at every share, because round and weights are the same; only the
    rewards are others, given by place.

    Raises:
        UpdatesDiffer: gmpo's update of a replayed round is not TRL's, see `hold_to_trl`.
    """
    points: dict[str, Any] = results.content.setdefault("live_shares", {})
    total = bench.workload.prompts_per_round
    for number in range(1, wanted + 1):
        for live in live_counts(total):
            point = points.setdefault(f"{live}/{total}", {"samples": []})
            if len(point["samples"]) >= number:
                continue
            sample = replayed(sides, number=number, live=live)
            exact = hold_to_trl(bench, sides, sample, number=number, live_groups=live)
            if exact is not None:
                sample["exact"] = exact
            point["samples"].append(sample)
            point |= summary(point["samples"])
            results.save()
            bench.say(
                f"{live} of {total} groups alive, {number} of {wanted}: update "
                f"{sample['trl_seconds']:.2f} / {sample['gmpo_seconds']:.2f} s, cosine "
                f"{sample['cosine']:.4f}"
            )


def replayed(sides: Sides, *, number: int, live: int) -> dict[str, Any]:
    """Seconds of TRL's update in a round of its own, then of gmpo's on TRL's completions."""
    theirs = sides.trl.ask("round", number=number, live_groups=live)
    ours = sides.gmpo.ask("replay", number=number)
    return {
        "trl_seconds": theirs["update_seconds"],
        "gmpo_seconds": ours["update_seconds"],
        "tokens": theirs["tokens"],
        "difference": ours["difference"],
        "cosine": ours["cosine"],
        "gradient_cosine": ours["gradient_cosine"],
    }


def summary(samples: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Seconds of each side and TRL's over gmpo's: median, smallest, largest."""
    seconds = {side: [sample[f"{side}_seconds"] for sample in samples] for side in SIDES}
    ratios = paired_ratios(seconds["trl"], seconds["gmpo"])
    return {
        **{f"{side}_update_seconds": spread(seconds[side]).as_dict() for side in SIDES},
        "update_ratio": spread(ratios).as_dict(),
    }


def finished(points: Mapping[str, Any]) -> dict[str, Any]:
    return {name: point for name, point in points.items() if point["samples"]}


def print_live_shares(points: Mapping[str, Any], console: Console | None = None) -> None:
    table = Table(title="update seconds by live groups: median (min to max)")
    for name in ("live groups", "TRL", "gmpo", "TRL / gmpo", "samples"):
        table.add_column(name)
    for name, point in finished(points).items():
        table.add_row(
            name,
            *(shown(point[f"{side}_update_seconds"]) for side in SIDES),
            shown(point["update_ratio"]),
            str(len(point["samples"])),
        )
    (console or Console(width=120)).print(table)


def shown(figures: Mapping[str, float]) -> str:
    return f"{figures['median']:.2f} ({figures['min']:.2f}-{figures['max']:.2f})"


def draw_live_shares(points: Mapping[str, Any], path: Path) -> None:
    """Update seconds of both sides over the share of live groups."""
    drawn = finished(points)
    shares = [float(Fraction(name)) for name in drawn]
    figure = Figure(figsize=(5, 4), layout="constrained")
    axis = figure.subplots()
    for side, label in zip(SIDES, ("TRL without vLLM", "gmpo"), strict=True):
        spreads = [point[f"{side}_update_seconds"] for point in drawn.values()]
        middles = [each["median"] for each in spreads]
        below = [each["median"] - each["min"] for each in spreads]
        above = [each["max"] - each["median"] for each in spreads]
        axis.errorbar(shares, middles, yerr=[below, above], marker="o", capsize=3, label=label)
    axis.set_xlabel("share of live groups")
    axis.set_ylabel("update, seconds")
    axis.update_datalim([(0, 0)], updatex=False)  # the margin above is a share of the whole axis
    axis.set_ylim(bottom=0)
    axis.legend()
    write_figure(path, figure)
