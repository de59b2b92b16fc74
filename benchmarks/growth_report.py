"""Growth curves as tables, a plot, and an answer: what does a further completion cost?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.results import write_figure

FIGURES = {
    "rollout_seconds": "rollout, s",
    "update_seconds": "update, s",
    "peak_gib": "peak memory, GiB",
}
CURVES = ("group", "group, long prompts", "prompt", "completion")
LABELS = {"gmpo": "gmpo", "trl": "TRL without vLLM"}
Content = Mapping[str, Any]
Entry = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Growth:
    """A figure's growth with completion tokens, as the group gets larger.

    Attributes:
        short: slope behind short prompts, units a thousand completion tokens.
        long: behind long ones.
        expected: ratio of the two, were each completion's prompt run by itself.
    """

    short: float
    long: float
    expected: float

    @property
    def ratio(self) -> float:
        """Near 1 where completions alone cost; NaN where short prompts show no growth."""
        return self.long / self.short if self.short > 0 else math.nan

    @property
    def follows(self) -> str:
        """What it grows with: whether the ratio is nearer to 1 or to the expected one, as logs."""
        if math.isnan(self.ratio):
            return "neither: no growth behind short prompts"
        is_nearer_to_one = self.ratio < math.sqrt(self.expected)
        return "completion tokens" if is_nearer_to_one else "group x prompt"


def points_of(of_side: Mapping[str, Entry], curve: str) -> list[Entry]:
    """The curve's points that were measured, by size."""
    found = [entry for entry in of_side.values() if entry["curve"] == curve]
    return sorted(found, key=lambda entry: int(entry["value"]))


def growth_of(of_side: Mapping[str, Entry], figure: str) -> Growth | None:
    """How the figure grows with group size, behind short and long prompts; None for a single point.

    Only group sizes that both curves have are compared.
    """
    short, long = (points_of(of_side, curve) for curve in CURVES[:2])
    sizes = {point["value"] for point in short} & {point["value"] for point in long}
    short, long = ([p for p in points if p["value"] in sizes] for points in (short, long))
    if len(sizes) < 2:
        return None
    lengths = [
        points[0]["prompt_tokens"] + points[0]["completion_length"] for points in (short, long)
    ]
    return Growth(
        short=slope(short, figure), long=slope(long, figure), expected=lengths[1] / lengths[0]
    )


def slope(points: Sequence[Entry], figure: str) -> float:
    """Least-squares slope of the medians, units a thousand completion tokens."""
    tokens = [point["completion_tokens"] / 1000 for point in points]
    return float(np.polyfit(tokens, [point[figure]["median"] for point in points], 1)[0])


def print_tables(content: Content, console: Console | None = None) -> None:
    """Medians with ranges point by point, then slopes and what they say."""
    console = console or Console(width=140)
    table = Table(title="one round of 4 prompts, 4 optimizer steps: median (min to max)")
    for name in ("side", "varied", "size", "prompt tokens", "completion tokens", *FIGURES.values()):
        table.add_column(name)
    for side, label in LABELS.items():
        for curve in CURVES:
            for point in points_of(content.get(side, {}), curve):
                table.add_row(
                    label,
                    curve,
                    str(point["value"]),
                    f"{point['prompt_tokens']:.0f}",
                    str(point["completion_tokens"]),
                    *(shown(point[figure]) for figure in FIGURES),
                )
    console.print(table)
    print_slopes(content, console)


def print_slopes(content: Content, console: Console) -> None:
    table = Table(title="growth with group size, a thousand completion tokens")
    columns = ("side", "figure", "short prompts", "long prompts", "long / short")
    for name in (*columns, "if each completion ran its prompt", "grows with"):
        table.add_column(name)
    for side, label in LABELS.items():
        for figure, title in FIGURES.items():
            growth = growth_of(content.get(side, {}), figure)
            if growth is not None:
                table.add_row(
                    label,
                    title,
                    f"{growth.short:.3f}",
                    f"{growth.long:.3f}",
                    f"{growth.ratio:.2f}",
                    f"{growth.expected:.2f}",
                    growth.follows,
                )
    console.print(table)
    console.print(
        "grows with completion tokens: the slopes' ratio is nearer to 1 than to what running the "
        "prompt for every completion would give, on a logarithmic scale"
    )


def shown(figures: Mapping[str, float]) -> str:
    return f"{figures['median']:.2f} ({figures['min']:.2f}-{figures['max']:.2f})"


def draw(content: Content, path: Path) -> None:
    """A row of plots a figure: over group size, prompt length and completion length."""
    figure = Figure(figsize=(12, 9), layout="constrained")
    axes = figure.subplots(len(FIGURES), 3, squeeze=False)
    shown_curves = (CURVES[:2], CURVES[2:3], CURVES[3:])
    names = ("group size", "prompt tokens", "completion tokens a row")
    for row, (quantity, title) in zip(axes, FIGURES.items(), strict=True):
        for axis, drawn, name in zip(row, shown_curves, names, strict=True):
            for curve in drawn:
                draw_curve(axis, content, curve, quantity)
            axis.set_xlabel(name)
            axis.set_ylabel(title)
            if axis.lines:
                # The usual margin is a share of the data's range: from 0 it cuts the top points.
                axis.set_ylim(0, 1.05 * axis.dataLim.ymax)
                axis.legend(fontsize=8)
    write_figure(path, figure, dpi=120)


def draw_curve(axis: Axes, content: Content, curve: str, quantity: str) -> None:
    for side, label in LABELS.items():
        points = points_of(content.get(side, {}), curve)
        if points:
            sizes = [
                point["prompt_tokens"] if curve == "prompt" else point["value"] for point in points
            ]
            medians = [point[quantity]["median"] for point in points]
            note = ", long prompts" if curve == CURVES[1] else ""
            axis.plot(sizes, medians, marker="o", label=label + note)
