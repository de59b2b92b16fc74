"""Pictures of scores: each model on each suite with intervals, and the gains over the first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gmpo.errors import RunFolderError
from gmpo.suites.scores import ScoreTable

__all__ = ["plot_scores"]

# Okabe and Ito's palette: told apart with any common colour blindness.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#777777")
_MARKERS = "osD^vP*"
_SPREAD = 0.6  # of a column's width, shared by its models


def plot_scores(tables: Sequence[ScoreTable], path: Path) -> Path:
    """A PNG with a row of panels a metric: scores left, gains over the first model right.

    Raises:
        RunFolderError: the picture cannot be written.
    """
    has_gains = any(table.gains for table in tables)
    columns = 2 if has_gains else 1
    suites = max(len(table.titles) for table in tables) + 1
    figure = Figure(
        figsize=(columns * max(4.5, 1.1 * suites + 1.5), 3.6 * len(tables)),
        dpi=100,
        layout="constrained",
    )
    panels = figure.subplots(len(tables), columns, squeeze=False)
    for row, table in zip(panels, tables, strict=True):
        _scores_panel(row[0], table)
        if has_gains:
            _gains_panel(row[1], table)
    try:
        figure.savefig(path)
    except OSError as error:
        raise RunFolderError(
            f"the plot cannot be written to {path}: {error.strerror}; free space or permissions"
        ) from None
    return path


def _scores_panel(ax: Axes, table: ScoreTable) -> None:
    columns = _columns(table)
    for number, (label, scores) in enumerate(table.scores.items()):
        known = {**scores, **({"average": table.averages[label]} if table.averages else {})}
        points = {
            name: (known[name].mean, known[name].interval) for name in columns if name in known
        }
        _draw(ax, columns, points, number=number, of=len(table.scores), label=label)
    _dress(ax, table, title=f"{table.metric.name} with 95 % intervals", y="% of items")
    ax.update_datalim([(0, 0)], updatex=False)  # the margin above is a share of the whole axis
    ax.set_ylim(bottom=0)


def _gains_panel(ax: Axes, table: ScoreTable) -> None:
    columns = _columns(table)
    labels = list(table.scores)
    for number, label in enumerate(labels[1:], start=1):
        points = {
            gain.suite: (gain.difference, gain.interval)
            for gain in table.gains
            if gain.label == label
        }
        _draw(ax, columns, points, number=number, of=len(labels), label=f"{label} - {labels[0]}")
    ax.axhline(0, color="black", linewidth=0.8)
    _dress(ax, table, title=f"{table.metric.name}: gain over {labels[0]}", y="points")


def _columns(table: ScoreTable) -> list[str]:
    return [*table.titles, "average"] if table.averaged else [*table.titles]


def _draw(
    ax: Axes,
    columns: Sequence[str],
    points: dict[str, tuple[float, tuple[float, float]]],
    *,
    number: int,
    of: int,
    label: str,
) -> None:
    shift = _SPREAD * ((number + 0.5) / of - 0.5)
    places = [columns.index(name) + shift for name in points]
    means = [100 * mean for mean, _ in points.values()]
    below = [100 * (mean - low) for mean, (low, _) in points.values()]
    above = [100 * (high - mean) for mean, (_, high) in points.values()]
    ax.errorbar(
        places,
        means,
        yerr=[below, above],
        fmt=_MARKERS[number % len(_MARKERS)],
        color=_COLORS[number % len(_COLORS)],
        capsize=3,
        markersize=5,
        label=label,
    )


def _dress(ax: Axes, table: ScoreTable, *, title: str, y: str) -> None:
    names = [table.titles.get(name, name) for name in _columns(table)]
    ax.set_xticks(range(len(names)), names, rotation=20, ha="right")
    ax.set_xlim(-0.6, len(names) - 0.4)
    ax.set_title(title, loc="left", fontsize=10)
    ax.set_ylabel(y)
    ax.grid(axis="y", color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.legend(fontsize=8)
