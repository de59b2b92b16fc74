"""Pictures of a tuning study: trials one after the other, parameters' shares, both objectives."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from gmpo.errors import RunFolderError
from gmpo.tuning.report import TuningReport

__all__ = ["plot_tuning"]

# Okabe and Ito's palette, which any common colour blindness tells apart.
_BLUE, _ORANGE, _GREEN, _RED, _GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#777777"
_DPI = 110


def plot_tuning(report: TuningReport, folder: Path) -> list[Path]:
    """The PNG files drawn: `history.png`, `importance.png` and `front.png`.

    Raises:
        RunFolderError: they cannot be written.
    """
    figures = {
        "history.png": _history(report),
        "importance.png": _importance(report),
        "front.png": _front(report),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            # Without the version that draws it, the same study gives the same bytes.
            figure.savefig(folder / name, metadata={"Software": None})
    except OSError as error:
        raise RunFolderError(
            f"plots cannot be written to {folder}: {error.strerror}; free space or permissions"
        ) from None
    return [folder / name for name in figures]


def _history(report: TuningReport) -> Figure:
    figure, ax = _new("Objective of the trials, on the items that choose", width=10)
    scored = [(t.number, t.objective or 0.0) for t in report.trials if t.outcome == "scored"]
    pruned = [
        (t.number, t.during[max(t.during)])
        for t in report.trials
        if t.outcome == "pruned" and t.during
    ]
    diverged = [(t.number, 0.0) for t in report.trials if t.outcome == "diverged"]
    for points, marker, colour, name in (
        (scored, "o", _BLUE, "scored"),
        (pruned, "x", _ORANGE, "pruned, at its last evaluation"),
        (diverged, "v", _RED, "diverged: 0"),
    ):
        if points:
            ax.plot(
                *zip(*points, strict=True), marker, color=colour, label=f"{name} ({len(points)})"
            )
    if scored:
        numbers, values = zip(*scored, strict=True)
        best = [max(values[: end + 1]) for end in range(len(values))]
        ax.step(numbers, best, where="post", color=_GREEN, linewidth=2, label="best so far")
    own = next((t.objective for t in report.trials if t.number == report.own), None)
    if own is not None:
        ax.axhline(own, color="black", linestyle="--", linewidth=1, label="the recipe itself")
    ax.set_xlabel("trial")
    ax.set_ylabel("0.7 accuracy + 0.3 stability")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _finish(figure, ax)
    return figure


def _importance(report: TuningReport) -> Figure:
    figure, ax = _new("What tells the best trials apart (PED-ANOVA)", width=9)
    shares = report.importances
    if shares is None:
        _not_measured(ax)
        return figure
    names = list(shares)
    ax.barh(range(len(names)), [shares[name] for name in names], color=_BLUE)
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.xaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))
    ax.set_xlabel("share of the importance of all parameters")
    return figure


def _front(report: TuningReport) -> Figure:
    figure, ax = _new("Accuracy and stability of the scored trials", width=8)
    scored = {t.number: t.score for t in report.trials if t.score is not None}
    if not scored:
        _not_measured(ax)
        return figure
    for number, score in scored.items():
        is_best = number in report.front
        ax.plot(
            score.stability,
            score.accuracy,
            "D" if is_best else "o",
            color=_RED if is_best else _BLUE,
            markersize=7 if is_best else 5,
        )
        if is_best or number == report.own:
            text = f" {number}, the recipe" if number == report.own else f" {number}"
            ax.annotate(text, (score.stability, score.accuracy))
    ax.plot([], [], "D", color=_RED, label="none is better in both")
    ax.plot([], [], "o", color=_BLUE, label="another is")
    ax.set_xlabel(f"stability ({report.plan.stability})")
    ax.set_ylabel("accuracy")
    _finish(figure, ax)
    return figure


def _new(title: str, *, width: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, 5), dpi=_DPI, layout="constrained")
    ax = figure.add_subplot()
    ax.set_title(title, loc="left", fontweight="bold")
    ax.grid(color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    return figure, ax


def _finish(figure: Figure, ax: Axes) -> None:
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    else:
        _not_measured(ax)


def _not_measured(ax: Axes) -> None:
    ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", color=_GREY, size=14)
    ax.set_xticks([])
    ax.set_yticks([])
