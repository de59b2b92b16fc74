"""Small studies of a tiny model, and reward functions that end their process."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from gmpo.stability import FIGURES, RunFigures
from gmpo.study.comparison import Comparison
from gmpo.study.plan import StudyPlan, make_plan
from gmpo.study.report import ArmSummary, RunReport, StudyReport

_CALLS = 0


def starts_with_a_digit_or_letter(completions: list[list[dict[str, str]]], **_: Any) -> list[float]:
    """1 or 0; as GMPO_TEST_DEATHS says, it kills the process it runs in.

    The variable is JSON: {"cell": name of the run that dies, "call": at the how manieth call,
    "times": how often, "folder": where deaths are counted}.
    """
    global _CALLS
    _CALLS += 1
    deaths = json.loads(os.environ.get("GMPO_TEST_DEATHS", "null"))
    if deaths and deaths["call"] == _CALLS and any(deaths["cell"] in word for word in sys.argv):
        so_far = len(list(Path(deaths["folder"]).iterdir()))
        if so_far < deaths["times"]:
            (Path(deaths["folder"]) / str(so_far)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
    firsts = [completion[0]["content"][:1] for completion in completions]
    return [float(first.isdigit() or first.islower()) for first in firsts]


def outcomes(study: Path) -> list[tuple[str, str]]:
    """Cell and outcome of every process of a study, in order."""
    lines = (study / "attempts.jsonl").read_text().splitlines()
    return [(line["cell"], line["outcome"]) for line in map(json.loads, lines)]


def run_figures_of(value: float, *, crash: str | None = None) -> RunFigures:
    """A run all of whose figures have one value."""
    return RunFigures(
        values=dict.fromkeys(FIGURES, value),
        ratio_min=0.5,
        ratio_max=2.0,
        rounds_done=3,
        crash=crash,  # type: ignore[arg-type]
        could_collapse=False,
    )


def plan_of(recipe: str, **changes: Any) -> StudyPlan:
    settings: dict[str, Any] = {"objectives": ["grpo", "gmpo"], "seeds": [0, 1]}
    return make_plan(recipe, **{**settings, **changes})


def report_of(plan: StudyPlan, folder: Path, comparisons: list[Comparison]) -> StudyReport:
    """A report with figures of no meaning."""
    rounds = tuple(
        {"kind": "round", "round": number, "rollout/reward": 0.1 * number, "rollout/entropy": 2.0}
        for number in (1, 2, 3)
    )
    return StudyReport(
        folder=folder,
        plan=plan,
        target=None,
        arms=tuple(
            ArmSummary(
                label=arm.label,
                objective=arm.recipe.objective.name,
                clip=arm.recipe.objective.clip_description(),
                runs=2,
                crashes=0,
                means=dict.fromkeys(FIGURES, 0.5),
                deviations=dict.fromkeys(FIGURES, 0.1),
                reached=2,
                ratio_range=(0.5, 2.0),
            )
            for arm in plan.arms
        ),
        comparisons=tuple(comparisons),
        runs=tuple(
            RunReport(
                arm=cell.arm,
                seed=cell.seed,
                outcome="finished",
                figures=run_figures_of(0.5),
                processes=1,
                seconds=1.0,
                rounds=rounds,
            )
            for cell in plan.cells()
        ),
        same_prompts=True,
        same_start=True,
        made_with=({"gmpo": "0.1.0", "commit": None},),
    )
