"""An experiment's report for a terminal and as a picture."""

from __future__ import annotations

import math
import time
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gmpo.abtest.analysis import analyse_records
from gmpo.abtest.records import EVENT_KINDS, read_records
from gmpo.abtest.report import ArmSummary, ExperimentReport, MetricResult
from gmpo.abtest.wording import NAMES, moment, value_words
from gmpo.errors import RunFolderError
from gmpo.store import Experiment, Store
from gmpo.text_tables import open_table

__all__ = [
    "METRIC_COLUMNS",
    "judgement_lines",
    "metric_rows",
    "plot_experiment",
    "render_experiment",
    "report_of",
]

METRIC_COLUMNS = ("metric", "role", "control", "candidate", "difference", "interval", "says")
"""What the texts of `metric_rows` are."""

# Okabe and Ito's palette, which any common colour blindness tells apart.
_BLUE, _GREY = "#0072B2", "#777777"


def report_of(
    store: Store, experiment: Experiment, *, now: float | None = None
) -> ExperimentReport:
    """What the store shows of an experiment.

    Args:
        store: with its records.
        experiment: which one.
        now: time of the look, unix seconds; None is now, or a stopped one's last record.

    Raises:
        ConfigError: its settings are not a plan.
        StoreError: the store cannot be read.
    """
    records = read_records(store.events(kinds=EVENT_KINDS, experiment=experiment.name))
    if now is None and experiment.status != "stopped":
        now = time.time()
    return analyse_records(experiment, records, now=now)


def render_experiment(report: ExperimentReport) -> RenderableType:
    """Recommendation, arms, metrics and what was left out."""
    plan, ratio = report.plan, report.ratio
    parts: list[RenderableType] = [
        Text(report.recommendation),
        Text(),
        Text(
            f"{report.name}: control {plan.models['control']}, candidate "
            f"{plan.models['candidate']}; {report.num_units} units in {report.hours:.1f} hours, "
            f"at most {plan.max_units}"
        ),
        Text(
            "units "
            + ", ".join(f"{arm} {ratio.counts[arm]}" for arm in ratio.counts)
            + f"; other shares than asked for: {'YES' if ratio.alarm else 'no'} "
            f"(p = {ratio.p_value:.2g})"
        ),
        *[Text(f"success of {line}") for line in judgement_lines(report)],
        *_covariate_lines(report),
        Text(),
        _metrics(report),
    ]
    parts += [Text(f"note: {warning}") for warning in report.warnings]
    if report.counts:
        counted = ", ".join(f"{name} {count}" for name, count in sorted(report.counts.items()))
        parts.append(Text(f"counted: {counted}"))
    return Group(*parts)


def _covariate_lines(report: ExperimentReport) -> list[Text]:
    """How much noise covariates took out of the primary metric; nothing where none came."""
    primary = report.primary
    if primary.variance_kept == 1.0:
        return []
    return [
        Text(
            f"covariates left {100 * primary.variance_kept:.0f} % of the variance of "
            f"{NAMES[primary.metric]}"
        )
    ]


def plot_experiment(report: ExperimentReport, path: Path) -> Path:
    """The primary metric's confidence sequence over the units.

    Raises:
        RunFolderError: the file cannot be written.
    """
    figure = Figure(figsize=(9, 5), dpi=110, layout="constrained")
    ax = figure.add_subplot()
    result = report.primary
    is_ratio = result.scale == "ratio"
    ax.set_title(
        f"{report.name}: {NAMES[result.metric]}, candidate "
        f"{'over' if is_ratio else 'less'} control",
        loc="left",
        fontweight="bold",
    )
    ax.axhline(1.0 if is_ratio else 0.0, color="black", linewidth=1, linestyle="--")
    points = [p for p in report.path if math.isfinite(p.interval.low + p.interval.high)]
    if points:
        units = [point.num_units for point in points]
        low = [point.interval.low for point in points]
        high = [point.interval.high for point in points]
        ax.fill_between(units, low, high, color=_BLUE, alpha=0.2, linewidth=0)
        ax.plot(units, [point.estimate for point in points], color=_BLUE, linewidth=2)
    else:
        ax.text(
            0.5, 0.5, "not judged yet", transform=ax.transAxes, ha="center", color=_GREY, size=14
        )
    ax.set_xlabel("units of both arms")
    ax.set_ylabel(f"{100 * (1 - result.alpha):g} % confidence sequence")
    ax.grid(color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Without the version that draws it, the same report gives the same bytes.
        figure.savefig(path, metadata={"Software": None})
    except OSError as error:
        raise RunFolderError(f"{path} cannot be written: {error.strerror}") from None
    return path


def _metrics(report: ExperimentReport) -> Table:
    """`metric_rows` with several lines in a cell, so that 80 columns are enough."""
    at = moment(report.time)
    heads = ("metric", "control", "candidate", "difference", "says")
    table = open_table(heads, title=f"at {at}, valid at every look")
    table.leading = 1
    for result in _results(report):
        margin = "" if result.margin is None else f"\nmargin {_margin(result)}"
        name = NAMES[result.metric].replace(" (", "\n(")
        table.add_row(
            f"{name}\n{result.role}{margin}",
            *[
                f"{value_words(result.metric, arm.value)}\n{arm.num_units} units"
                for arm in (result.control, result.candidate)
            ],
            f"{_change(result, result.estimate, unit=_unit(result))}\n{_interval(result, unit='')}",
            result.state,
        )
    return table


def judgement_lines(report: ExperimentReport) -> list[str]:
    """Of each arm, what its requests' success comes from; none where no success is known."""
    return [
        f"{arm} comes from " + ", ".join(f"{name} {count}" for name, count in counts.items())
        for arm, counts in report.judgements.items()
        if counts
    ]


def metric_rows(report: ExperimentReport) -> list[list[str]]:
    """Every metric in words, the primary one first; the columns are `METRIC_COLUMNS`."""
    return [_row(result) for result in _results(report)]


def _results(report: ExperimentReport) -> tuple[MetricResult, ...]:
    return (report.primary, *report.guardrails, *report.shadow)


def _row(result: MetricResult) -> list[str]:
    margin = "" if result.margin is None else f", margin {_margin(result)}"
    return [
        NAMES[result.metric],
        f"{result.role}{margin}",
        _arm(result.metric, result.control),
        _arm(result.metric, result.candidate),
        _change(result, result.estimate, unit=_unit(result)),
        _interval(result, unit=_unit(result)),
        result.state,
    ]


def _arm(metric: str, arm: ArmSummary) -> str:
    return f"{value_words(metric, arm.value)} ({arm.num_units})"


def _margin(result: MetricResult) -> str:
    assert result.margin is not None
    return f"{100 * result.margin:g}{_unit(result)}"


def _interval(result: MetricResult, *, unit: str) -> str:
    if result.interval is None:
        return "burn-in"
    ends = (result.interval.low, result.interval.high)
    return " to ".join(_change(result, end, unit=unit) for end in ends)


def _unit(result: MetricResult) -> str:
    return " %" if result.scale == "ratio" else " points"


def _change(result: MetricResult, value: float, *, unit: str) -> str:
    """By how much the candidate is more or less, in percent or points."""
    if math.isnan(value):
        return "unknown"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return f"{100 * (value - 1 if result.scale == 'ratio' else value):+.2f}{unit}"
