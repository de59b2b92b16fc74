"""What a training run shows on a terminal, or line by line when piped."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from gmpo.evaluation import Evaluation
from gmpo.forecast import Forecast
from gmpo.training import Report

__all__ = ["TrainingDisplay", "asked_to_stop", "evaluation_table", "forecast_table"]

_LINES_EVERY_ROUNDS = 10
"""Rounds between two lines when the output is not a terminal."""


class TrainingDisplay:
    """A progress bar with reward and speed on a terminal; a line every ten rounds elsewhere."""

    def __init__(self, console: Console, *, rounds: int) -> None:
        self._console = console
        self._rounds = rounds
        self._held_out = ""
        self._progress = Progress(
            TextColumn("round"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(
            "train", total=rounds, figures="evaluating", start=False
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def report(self, report: Report) -> None:
        """Show what the loop says."""
        if report.stage == "round":
            self._show_round(report)
        elif report.stage == "forecast":
            self._console.print(report.sentence, soft_wrap=True)
        elif report.stage in ("start", "checkpoint", "rolled_back"):
            pass  # a line would say nothing that a user waits for
        elif report.stage == "evaluation":
            self._held_out = f"held-out {report.evaluations[0].mean:.2f}"
        else:
            for evaluation in report.evaluations:
                sentence = f"{report.stage:>6}: {_sentence(evaluation)}"
                self._console.print(sentence, soft_wrap=True)

    def _show_round(self, report: Report) -> None:
        metrics = report.metrics
        figures = [f"reward {metrics['rollout/reward']:.2f}"]
        if self._held_out:
            figures.append(self._held_out)
        if "ratio/min" in metrics:
            figures.append(f"ratio {metrics['ratio/min']:.2f}..{metrics['ratio/max']:.2f}")
        figures.append(f"{metrics['time/tokens_per_second']:.0f} tok/s")
        line = "  ".join(figures)
        self._progress.start_task(self._task)
        self._progress.update(self._task, completed=report.round, figures=line)
        is_due = report.round % _LINES_EVERY_ROUNDS == 0 or report.round in (1, self._rounds)
        if is_due and not self._console.is_terminal:
            self._console.print(f"round {report.round}/{self._rounds}  {line}", soft_wrap=True)


@contextmanager
def asked_to_stop(
    say: Callable[[str], None], *, mended_by: str = "--resume"
) -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or SIGTERM has come; a second one ends the process at once.

    Args:
        say: told what the first one leads to.
        mended_by: how one goes on where a second one broke off.
    """
    came = False

    def note(number: int, _: FrameType | None) -> None:
        nonlocal came
        came = True
        signal.signal(number, signal.default_int_handler)
        say(
            "finishing what is under way (at most a round or an evaluation), then saving; once "
            f"more to stop at once, which {mended_by} mends too"
        )

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def evaluation_table(evaluations: Sequence[Evaluation], *, title: str) -> Table:
    """Accuracies or mean rewards with 95 % intervals, and what was cut or timed out."""
    table = Table(title=Text(title), title_justify="left")
    table.add_column("evaluation")
    measure = evaluations[0].measure if evaluations else "accuracy"
    for heading in ("items", measure, "95 %", "cut", "timeouts"):
        table.add_column(heading, justify="right")
    for evaluation in evaluations:
        low, high = evaluation.interval
        table.add_row(
            evaluation.name.replace("_", " "),
            str(evaluation.num_items),
            f"{evaluation.mean:.3f}",
            _span(low, high),
            str(evaluation.num_truncated),
            str(evaluation.num_timeouts),
        )
    return table


def forecast_table(forecast: Forecast) -> Table:
    """What a run will need, for `--dry-run`."""
    table = Table(title="forecast", title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    for name, value in forecast.as_dict().items():
        shown = f"{value:.2f} GiB" if name.endswith("_gib") else f"{value:,}"
        table.add_row(name.removesuffix("_gib").replace("_", " "), shown)
    return table


def _sentence(evaluation: Evaluation) -> str:
    low, high = evaluation.interval
    counts = f", {evaluation.num_truncated} cut by the limit" if evaluation.num_truncated else ""
    counts += f", {evaluation.num_timeouts} timed out" if evaluation.num_timeouts else ""
    counts += f", {evaluation.num_unrewarded} without a reward" if evaluation.num_unrewarded else ""
    return (
        f"{evaluation.name.replace('_', ' ')} {evaluation.measure} {evaluation.mean:.3f} "
        f"({_span(low, high)}) on {evaluation.num_items} held-out items{counts}"
    )


def _span(low: float, high: float) -> str:
    """An interval; a reward may be negative, where a dash between would be read as a sign."""
    return f"{low:.3f}-{high:.3f}" if low >= 0 else f"{low:.3f} to {high:.3f}"
