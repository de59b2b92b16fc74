"""A study's report as rows of text, and as tables for a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gmpo.stability import FIGURES
from gmpo.study.comparison import Comparison
from gmpo.study.report import ArmSummary, StudyReport, limits
from gmpo.text_tables import open_table

__all__ = ["comparison_rows", "headline", "improvement_rows", "render_report", "stability_rows"]

_Rows = list[list[str]]
"""The first row is the head."""


def headline(report: StudyReport) -> list[str]:
    """What the study says, a sentence for each arm that was compared."""
    return [_verdict_sentence(report, arm.label) for arm in report.arms[1:]]


def stability_rows(report: StudyReport) -> _Rows:
    """The article's stability table: a column an arm, mean and standard deviation over seeds."""
    rows = [["", *(arm.label for arm in report.arms)]]
    for name in ("loss_variance", "gradient_norm_deviation"):
        rows.append([FIGURES[name].title, *(_mean(arm, name) for arm in report.arms)])
    ranges = [
        "-" if a.ratio_range is None else f"{a.ratio_range[0]:.4g} to {a.ratio_range[1]:.4g}"
        for a in report.arms
    ]
    rows.append(["importance ratio, all runs", *ranges])
    rows.append(["log-ratio range, nats", *(_mean(arm, "log_ratio_range") for arm in report.arms)])
    target = "" if report.target is None else f" {report.target:.3f}"
    reached = [
        f"{_mean(arm, 'rounds_to_target')} ({arm.reached} of {arm.runs} runs)"
        if arm.reached
        else f"0 of {arm.runs} runs"
        for arm in report.arms
    ]
    rows.append([f"rounds to reward{target}", *reached])
    rows.append(["crashes", *(f"{arm.crashes} of {arm.runs} runs" for arm in report.arms)])
    for name in list(FIGURES)[4:]:
        unit = FIGURES[name].unit
        title = FIGURES[name].title + (f", {unit}" if unit else "")
        rows.append([title, *(_mean(arm, name) for arm in report.arms)])
    return rows


def improvement_rows(report: StudyReport) -> _Rows:
    """The article's four improvement figures with their intervals."""
    rows = [["improvement", "of", "1 - ratio", "95 %", "p", "pairs", "verdict"]]
    for name, found in report.improvements():
        interval = found.improvement_interval
        rows.append(
            [
                name.replace("_", " "),
                f"{found.candidate} over {found.baseline}",
                _percent(found.improvement),
                "-"
                if interval is None
                else f"{_percent(interval[0]).removesuffix(' %')} to {_percent(interval[1])}",
                "-" if found.p_value is None else f"{found.p_value:.2g}",
                _pairs(found),
                _verdict(found),
            ]
        )
    return rows


def comparison_rows(report: StudyReport, candidate: str) -> _Rows:
    """Every figure of one arm against the first, paired by seed."""
    rows = [["figure", "effect", "95 %", "p", "would be seen", "pairs", "verdict"]]
    for found in report.comparisons:
        if found.candidate != candidate:
            continue
        interval = (
            "-" if found.interval is None else f"{found.interval[0]:.3g} to {found.interval[1]:.3g}"
        )
        rows.append(
            [
                _title(found),
                "-" if found.effect is None else _effect(found),
                interval,
                "-" if found.p_value is None else f"{found.p_value:.2g}",
                "-" if found.detectable is None else _detectable(found),
                _pairs(found),
                _verdict(found),
            ]
        )
    return rows


def render_report(report: StudyReport) -> RenderableType:
    """The report for a terminal."""
    parts: list[RenderableType] = [
        *(Text(text) for text in headline(report)),
        Text(),
        _table(stability_rows(report), title="stability, mean ± deviation over seeds"),
        Text(),
        _table(improvement_rows(report), title="the article's improvement figures"),
    ]
    for arm in report.arms[1:]:
        title = f"{arm.label} against {report.plan.baseline}, paired by seed"
        # The pairs are in the HTML: a terminal is narrow.
        rows = [[*row[:5], row[6]] for row in comparison_rows(report, arm.label)]
        parts += [Text(), _table(rows, title=title)]
    parts += [Text(), Text("what this cannot show")]
    parts += [Padding(Text(f"- {text}", overflow="fold"), (0, 0, 0, 2)) for text in limits(report)]
    return Group(*parts)


def _table(rows: _Rows, *, title: str) -> Table:
    table = open_table(rows[0], title=title)
    for row in rows[1:]:
        shown = [cell.replace("no difference seen", "none seen") for cell in row]
        table.add_row(*(Text(cell) for cell in shown))
    return table


def _mean(arm: ArmSummary, name: str) -> str:
    mean, deviation = arm.means[name], arm.deviations[name]
    if mean is None:
        return "-"
    return f"{mean:.4g}" if deviation is None else f"{mean:.4g} ± {deviation:.2g}"


def _pairs(found: Comparison) -> str:
    """How many, and how many seeds less than both arms have."""
    return f"{found.pairs}" + (f" (-{found.left_out})" if found.left_out else "")


def _effect(found: Comparison) -> str:
    return f"x {found.effect:.3g}" if found.compared == "ratio" else f"{found.effect:+.3g}"


def _detectable(found: Comparison) -> str:
    return f"x {found.detectable:.3g}" if found.compared == "ratio" else f"±{found.detectable:.3g}"


def _percent(share: float | None) -> str:
    if share is None:
        return "-"
    return f"{100 * share:+.3g} %" if share > -10 else "below -1000 %"


def _verdict(found: Comparison) -> str:
    """With which side is the steadier one, where there is one, and how sure it is."""
    if found.verdict in ("no difference seen", "not measured"):
        return found.verdict
    better = "lower" if found.figure == "crashes" else FIGURES[found.figure].better
    side = "" if better == "neither" else ", better" if better == found.verdict else ", worse"
    return f"{found.verdict}{side}" + ("" if found.is_confirmed else ", by t alone")


def _verdict_sentence(report: StudyReport, candidate: str) -> str:
    found = [c for c in report.comparisons if c.candidate == candidate]
    seen = [c for c in found if c.verdict in ("lower", "higher")]
    where = f"{candidate} against {report.plan.baseline}"
    if not seen:
        return f"{where}: no difference seen in any of {len(found)} figures."
    names = "; ".join(f"{_title(c)} ({_verdict(c)})" for c in seen)
    unsure = sum(not c.is_confirmed for c in seen)
    doubt = (
        ""
        if not unsure
        else f" {unsure} of these by the t interval alone: the exact test does not confirm them, "
        "so run more seeds before believing them."
    )
    return (
        f"{where}: different in {len(seen)} of {len(found)} figures, {names}; no difference seen "
        f"in the others.{doubt}"
    )


def _title(found: Comparison) -> str:
    return "crashes" if found.figure == "crashes" else FIGURES[found.figure].title
