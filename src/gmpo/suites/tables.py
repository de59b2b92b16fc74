"""Scores, gains, counts and contamination as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from gmpo.contamination import Contamination
from gmpo.outcomes import SuiteOutcomes
from gmpo.suites.scores import Gain, Score, ScoreTable

__all__ = ["contamination_table", "counts_table", "gains_tables", "scores_table"]


def scores_table(table: ScoreTable) -> Table:
    """Models in rows, suites in columns, percent with 95 % intervals; then gains in points."""
    shown = _table(f"{table.metric.name}, % (95 % interval)")
    shown.add_column("model")
    columns = list(table.titles)
    for name in columns:
        items = {scores[name].num_items for scores in table.scores.values() if name in scores}
        heading = f"{table.titles[name]}\nn={'/'.join(map(str, sorted(items)))}"
        shown.add_column(heading, justify="right")
    if table.averaged:
        shown.add_column(_average_heading(table), justify="right")
    for label, scores in table.scores.items():
        cells = [_score(scores.get(name)) for name in columns]
        average = [_score(table.averages[label])] if table.averaged else []
        shown.add_row(Text(label), *cells, *average)
    for by_suite in _gains_by_model(table):
        shown.add_section()
        names = [*columns, "average"] if table.averaged else columns
        shown.add_row(_pair(by_suite), *[_gain(by_suite.get(name)) for name in names])
    return shown


def gains_tables(table: ScoreTable) -> list[Table]:
    """For each model but the first, the tests of its differences from the first."""
    return [_gains_table(table, by_suite) for by_suite in _gains_by_model(table)]


def counts_table(outcomes: Sequence[SuiteOutcomes]) -> Table:
    """What was cut, timed out or gave no answer, apart from what was wrong."""
    shown = _table("completions, and what became of them")
    for heading in ("model", "suite", "asked"):
        shown.add_column(heading)
    names = {
        "completions": "comple-\ntions",
        "truncated": "cut",
        "no_answer": "no\nanswer",
        "timeouts": "time-\nouts",
    }
    if any(one.counts()["scorer_errors"] for one in outcomes):
        names["scorer_errors"] = "scorer\nerrors"
    for heading in ("token\nlimit", *names.values()):
        shown.add_column(heading, justify="right")
    for one in outcomes:
        counts = one.counts()
        figures = [str(counts[name]) for name in names]
        shown.add_row(Text(one.label), one.title, _asked(one), str(one.max_tokens), *figures)
    return shown


def contamination_table(found: Sequence[Contamination]) -> Table:
    """Items of suites that training texts hold, by suite."""
    shown = _table("evaluation items in the training data, by the share of runs that one row has")
    shown.add_column("suite")
    for heading in ("items", "any run", "half or more", "all"):
        shown.add_column(heading, justify="right")
    for one in found:
        shown.add_row(
            one.title,
            str(one.num_items),
            str(len(one.matches)),
            str(sum(match.coverage >= 0.5 for match in one.matches)),
            str(sum(match.is_whole for match in one.matches)),
        )
    return shown


def _gains_table(table: ScoreTable, by_suite: Mapping[str, Gain]) -> Table:
    first = next(iter(by_suite.values()))
    shown = _table(f"{first.label} - {first.baseline}, {table.metric.name}, item by item")
    shown.add_column("suite")
    won_and_lost = () if first.only_candidate is None else ("won", "lost")
    for heading in ("items", "points", *won_and_lost, "p", "p (Holm)"):
        shown.add_column(heading, justify="right")
    shown.add_column("difference")
    for name, gain in by_suite.items():
        counts = [_count(gain.only_candidate), _count(gain.only_baseline)] if won_and_lost else []
        shown.add_row(
            table.titles.get(name, name),
            str(gain.num_items),
            f"{100 * gain.difference:+.1f}",
            *counts,
            _p_value(gain.p_value),
            _p_value(gain.adjusted_p),
            gain.verdict,
        )
    return shown


def _asked(outcomes: SuiteOutcomes) -> Text:
    way = outcomes.way
    told = "greedy" if way.name == "greedy" else f"{way.num_samples} samples"
    if way.best_of > 1:
        told += f",\nbest of {way.best_of}"
    if outcomes.asked_with is not None and outcomes.asked_with.mix is not None:
        told += f",\n{outcomes.asked_with.mix.weight:g} mixed in"
    return Text(told)


def _table(title: str) -> Table:
    # As wide as its title, which would else be folded over a narrow table.
    return Table(
        title=Text(title), title_justify="left", box=box.SIMPLE_HEAVY, min_width=len(title) + 1
    )


def _gains_by_model(table: ScoreTable) -> list[dict[str, Gain]]:
    labels = dict.fromkeys(gain.label for gain in table.gains)
    return [{gain.suite: gain for gain in table.gains if gain.label == label} for label in labels]


def _pair(by_suite: Mapping[str, Gain]) -> Text:
    first = next(iter(by_suite.values()))
    return Text(f"{first.label} - {first.baseline}")


def _average_heading(table: ScoreTable) -> str:
    if len(table.averaged) == len(table.titles):
        return "average"
    return f"average\nof {len(table.averaged)}"


def _score(score: Score | None) -> str:
    return "-" if score is None else f"{100 * score.mean:.1f}\n{_span(score.interval)}"


def _gain(gain: Gain | None) -> str:
    if gain is None:
        return "-"
    return f"{100 * gain.difference:+.1f}\n{_span(gain.interval, signed=True)}"


def _span(interval: tuple[float, float], *, signed: bool = False) -> str:
    low, high = (100 * end for end in interval)
    return f"{low:+.1f} to {high:+.1f}" if signed else f"{low:.1f}-{high:.1f}"


def _count(value: int | None) -> str:
    return "" if value is None else str(value)


def _p_value(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"
