"""What a study's report says of its own figures, and how many pairs each is of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tests.studies import plan_of, report_of, run_figures_of
from tests.tiny_runs import tiny_recipe, write_recipe

from gmpo.stability import RunFigures
from gmpo.study.comparison import compare_arms
from gmpo.study.html import study_html
from gmpo.study.report import StudyReport, limits
from gmpo.study.tables import improvement_rows


def reached(after: float | None, *, crash: str | None = None) -> RunFigures:
    """A run that reached the target after so many rounds, or never."""
    figures = run_figures_of(0.5, crash=crash)
    return replace(figures, values={**figures.values, "rounds_to_target": after})


@pytest.fixture
def report(tmp_path: Path) -> StudyReport:
    """Four pairs: in one a run crashed, in one GRPO never reached the target, in one neither."""
    recipe = write_recipe(tmp_path / "tiny.toml", tiny_recipe("no model"))
    plan = plan_of(recipe, seeds=[0, 1, 2, 3, 4])
    arms = {
        "grpo": [reached(8), reached(None), reached(None), reached(None, crash="diverged")],
        "gmpo": [reached(4), reached(4), reached(None), reached(4)],
    }
    by_seed = {label: dict(enumerate([*runs, reached(6)])) for label, runs in arms.items()}
    found = compare_arms(by_seed["grpo"], by_seed["gmpo"], names=("grpo", "gmpo"))
    made = report_of(plan, tmp_path, found)
    runs = tuple(replace(run, figures=by_seed[run.arm][run.seed]) for run in made.runs)
    return replace(made, target=0.5, runs=runs)


def test_runs_that_never_reached_the_target_are_named(report: StudyReport):
    (said,) = [text for text in limits(report) if text.startswith("Convergence speed")]
    assert said == (
        "Convergence speed of gmpo over grpo is of 2 of 4 pairs without a crash: of the others a "
        "run never reached the target (grpo: 2, gmpo: 1). Such a run is slower than any that did, "
        "so the figure flatters the arm that has more of them."
    )
    none_to_reach = replace(report, target=None)
    assert not [text for text in limits(none_to_reach) if text.startswith("Convergence speed")]
    first_pair = [run for run in report.runs if run.seed in (0, 4)]
    all_reached = replace(report, runs=tuple(first_pair))
    assert not [text for text in limits(all_reached) if text.startswith("Convergence speed")]


def test_improvements_say_of_how_many_pairs_they_are(report: StudyReport):
    head, *rows = improvement_rows(report)
    shown = {row[0]: row[head.index("pairs")] for row in rows}
    assert shown == {
        "loss stability": "4 (-1)",
        "gradient stability": "4 (-1)",
        "ratio stability": "4 (-1)",
        "convergence speed": "2 (-3)",
    }
    found = {improvement["name"]: improvement for improvement in report.as_dict()["improvements"]}
    speed = found["convergence_speed"]
    assert (speed["pairs"], speed["left_out"]) == (2, 3)


def test_seeds_that_were_added_after_runs_had_begun_are_told(report: StudyReport):
    def said(*before: int) -> list[str]:
        plan = replace(report.plan, num_seeds_before=before)
        return [text for text in limits(replace(report, plan=plan)) if "added" in text]

    assert said() == []
    (once,) = said(3)
    assert once.startswith("Seeds were added after runs had begun: 3 at first, now 5. Whoever adds")
    assert "3 at first, then 4, now 5." in said(3, 4)[0]
    added = replace(report, plan=replace(report.plan, num_seeds_before=(3,)))
    assert once in study_html(added, [])
    assert added.as_dict()["plan"]["num_seeds_before"] == [3]
