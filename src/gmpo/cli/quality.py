"""`gmpo quality`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from gmpo.cli.conventions import JsonOption, refuses_clearly
from gmpo.errors import DataError

if TYPE_CHECKING:
    from gmpo.serving.calibration import Calibration

__all__ = ["quality"]


@refuses_clearly
def quality(
    out: Annotated[Path, typer.Argument(help="JSON file for the threshold.")],
    store: Annotated[
        str, typer.Option(help="The gateway's store: a SQLite file or a PostgreSQL URL.")
    ],
    target: Annotated[float, typer.Option(help="Share of good answers that may fall back.")] = 0.05,
    model_version: Annotated[
        str | None, typer.Option(help="Only answers of this version; default: of all.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Newest answers that are read.")] = 20_000,
    as_json: JsonOption = False,
) -> None:
    """Set the threshold of the quality score from recorded answers, and say what it is worth."""
    from gmpo.serving.calibration import calibrate, labelled_answers, save_calibration
    from gmpo.store import open_store

    with open_store(store, read_only=True) as opened:
        answers = opened.events(
            kinds=["answer"], model_version=model_version, newest_first=True, limit=limit
        )
        feedback = opened.events(kinds=["feedback"], model_version=model_version)
    found, left_out = labelled_answers([*answers, *feedback])
    if not found:
        raise DataError(
            f"store {opened.where} has no answer to set a threshold by"
            + (f"; left out: {_counts(left_out)}" if left_out else "")
            + '; let the gateway serve with quality.mode = "observe" for a while, then try again'
        )
    calibration = calibrate(found, target=target)
    save_calibration(calibration, out)
    if as_json:
        print(calibration.model_dump_json())
        return
    for line in _told(calibration, left_out):
        Console().print(Text(line), soft_wrap=True)


def _told(found: Calibration, left_out: dict[str, int]) -> list[str]:
    out = _counts(left_out)
    lines = [
        f"threshold {found.threshold:.4f}: {100 * found.expected_false_fallback:.1f} % of good "
        f"answers are expected below it, with 95 % confidence at most "
        f"{100 * found.false_fallback_upper:.1f} %",
        f"{found.num_answers} answers: {found.num_right} right, {found.num_wrong} wrong, "
        f"{found.num_answers - found.num_right - found.num_wrong} not judged"
        + (f"; left out: {out}" if out else ""),
    ]
    if found.caught_share is None or found.ranking is None:
        lines.append(
            "nothing is known to be right and wrong, so what the score is worth is not known; have "
            "answers graded (quality.verify by references, gmpo serve --task or quality.task "
            "by a task's own scorer), or ask for feedback"
        )
        return lines
    correlation = "not defined" if found.correlation is None else f"{found.correlation:.2f}"
    lines.append(
        f"{100 * found.caught_share:.0f} % of the wrong answers are below it; correlation of score "
        f"and truth {correlation}; a right answer scores above a wrong one with probability "
        f"{found.ranking:.2f}"
    )
    return lines


def _counts(left_out: dict[str, int]) -> str:
    return ", ".join(f"{count} {why.replace('_', ' ')}" for why, count in left_out.items())
