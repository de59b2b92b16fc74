"""Pictures of a study: its runs round by round, arm beside arm, and the improvements found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from gmpo.errors import RunFolderError
from gmpo.plots import label_log_axis
from gmpo.study.report import RunReport, StudyReport

__all__ = ["plot_study"]

# Okabe and Ito's palette, which any common colour blindness tells apart.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#777777")
_DASHES = ("-", "--", "-.", ":")
_DPI = 110


def plot_study(report: StudyReport, folder: Path) -> list[Path]:
    """The PNG files drawn: `curves.png`, the runs round by round, and `improvements.png`.

    Raises:
        RunFolderError: they cannot be written.
    """
    paths = [folder / "curves.png", folder / "improvements.png"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, figure in zip(paths, (_curves(report), _improvements(report)), strict=True):
            # Without the version that draws it, the same study gives the same bytes.
            figure.savefig(path, metadata={"Software": None})
    except OSError as error:
        raise RunFolderError(
            f"plots cannot be written to {folder}: {error.strerror}; free space or permissions"
        ) from None
    return paths


def _curves(report: StudyReport) -> Figure:
    figure = Figure(figsize=(12, 8), dpi=_DPI, layout="constrained")
    panels = (
        ("Sampled reward", "mean reward of the round", "rollout/reward", False),
        ("Log-ratio, 1 % to 99 %", "nats, mean of the round's steps", "spread", False),
        ("Gradient norm, before clipping", "mean of the round's steps", "norm", True),
        ("Entropy", "nats a token", "rollout/entropy", False),
    )
    for ax, (title, unit, name, is_log) in zip(
        figure.subplots(2, 2).flatten(), panels, strict=True
    ):
        ax.set_title(title, loc="left", fontweight="bold")
        _draw_arms(ax, report, name, is_log=is_log)
        ax.set_xlabel("round")
        ax.set_ylabel(unit)
        _dress(ax)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _draw_arms(ax: Axes, report: StudyReport, name: str, *, is_log: bool) -> None:
    """Each run thin, the mean of an arm's runs thick; a round that a run has not is in no mean."""
    length = report.plan.recipe.training.rounds
    drawn = False
    for place, arm in enumerate(report.arms):
        runs = [run for run in report.runs if run.arm == arm.label and run.rounds]
        table = np.full((len(runs), length), math.nan)
        for row, run in enumerate(runs):
            values = _series(run, name)
            table[row, : len(values)] = values
        if is_log:
            table[table <= 0] = math.nan  # a round without a live row has no gradient
        known = np.isfinite(table).any(axis=0)
        if not known.any():
            continue
        drawn = True
        rounds = np.arange(1, length + 1)
        colour = _COLOURS[place % len(_COLOURS)]
        for run_values in table:
            ax.plot(rounds, run_values, color=colour, alpha=0.3, linewidth=1)
        mean = np.nanmean(table[:, known], axis=0)
        style = _DASHES[place % len(_DASHES)]
        label = f"{arm.label}: mean of {len(runs)} runs"
        ax.plot(rounds[known], mean, style, color=colour, linewidth=2.5, label=label)
    if not drawn:
        ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", color="#777777")
    elif is_log:
        ax.set_yscale("log")
        label_log_axis(ax)


def _series(run: RunReport, name: str) -> list[float]:
    """A figure of each round; NaN where it was not measured."""
    if name == "spread":
        pairs = [(line.get("ratio/log_q01"), line.get("ratio/log_q99")) for line in run.rounds]
        return [math.nan if a is None or b is None else b - a for a, b in pairs]
    key = "update/gradient_norm" if name == "norm" else name
    return [math.nan if line.get(key) is None else line[key] for line in run.rounds]


def _improvements(report: StudyReport) -> Figure:
    """The article's four figures with their intervals: whoever crosses 0 shows no difference."""
    found = list(report.improvements())
    figure = Figure(figsize=(10, 1.6 + 0.5 * len(found)), dpi=_DPI, layout="constrained")
    ax = figure.add_subplot()
    ax.set_title("Improvement, 1 - candidate / baseline", loc="left", fontweight="bold")
    labels = []
    for place, (name, comparison) in enumerate(found):
        is_alone = len(report.arms) == 2
        who = "" if is_alone else f"\n{comparison.candidate}"
        labels.append(f"{name.replace('_', ' ')}{who}")
        value, interval = comparison.improvement, comparison.improvement_interval
        if value is None:
            ax.text(0, place, "not measured", va="center", ha="center", color="#777777")
            continue
        # Beyond the picture's edge an interval is drawn to the edge; the table has its numbers.
        middle = min(max(value, _EDGE[0]), _EDGE[1])
        low, high = interval or (middle, middle)
        low, high = max(low, _EDGE[0]), min(high, _EDGE[1])
        is_seen = comparison.verdict in ("lower", "higher")
        colour = _COLOURS[1] if is_seen else "#777777"
        ax.plot([low, high], [place, place], color=colour, linewidth=2)
        ax.plot(middle, place, "o" if is_seen else "D", color=colour, markersize=7)
    ax.axvline(0, color="black", linewidth=1)
    ax.set_yticks(range(len(found)), labels)
    ax.set_ylim(len(found) - 0.5, -0.5)
    ax.set_xlim(*_EDGE)
    ax.xaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))
    arms = ", ".join(arm.label for arm in report.arms[1:])
    ax.set_xlabel(
        f"{report.plan.baseline} is better  <  0  <  {arms} is better; lines are 95 % intervals, "
        "grey ones contain 0: no difference seen"
    )
    _dress(ax)
    return figure


_EDGE: Sequence[float] = (-2.0, 1.0)


def _dress(ax: Axes) -> None:
    ax.grid(color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
