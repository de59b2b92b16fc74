"""What a tuning study found: its trials, and which of them beat the recipe on unseen items."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gmpo.errors import StudyError
from gmpo.recipe import dump_recipe
from gmpo.statistics import crossed_interval
from gmpo.study import cell_folder, ended_cells
from gmpo.study.plan import Cell
from gmpo.tracking import RunFolder, builds_of
from gmpo.tuning.plan import TuningPlan
from gmpo.tuning.score import (
    ACCURACY_WEIGHT,
    FAILED,
    STABILITY_WEIGHT,
    Score,
    final_score,
    held_out_outcomes,
)
from gmpo.tuning.search import Search, TrialRecord
from gmpo.tuning.space import recipe_with
from gmpo.tuning.trials import OWN, arm_name, candidates, judged_folder, judged_plan, trial_folder

__all__ = [
    "JudgedArm",
    "JudgedRun",
    "Judgement",
    "TuningReport",
    "build_tuning_report",
    "judgements",
    "verdict",
    "winning_recipe",
    "write_report",
]

_CONFIDENCE = 0.95
_FEWEST_SEEDS = 2


@dataclass(frozen=True, kw_only=True)
class JudgedRun:
    """One run of the last comparison: its score, and 1 or 0 for each item by its id."""

    score: Score
    outcomes: Mapping[str, float]
    crashed: bool


@dataclass(frozen=True, kw_only=True)
class JudgedArm:
    """The recipe, or a candidate, over its fresh seeds.

    Attributes:
        number: of the trial; None for the recipe itself.
        runs: that came to an end.
        crashes: of these, how many diverged or were stopped by the guard; they score 0.
        accuracy: mean over runs and items.
        stability: mean over runs.
        objective: mean over runs and items.
        interval: 95 % of the objective, over other seeds and other items; None for one run.
    """

    number: int | None
    runs: int
    crashes: int
    accuracy: float
    stability: float
    objective: float
    interval: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A candidate against the recipe, paired by seed and by item.

    Attributes:
        number: of the trial.
        seeds: that both have.
        objective: mean difference, candidate less recipe.
        objective_interval: holds for all candidates together with 95 % probability.
        accuracy: mean difference of accuracy alone.
        accuracy_interval: likewise.
    """

    number: int
    seeds: int
    objective: float
    objective_interval: tuple[float, float]
    accuracy: float
    accuracy_interval: tuple[float, float]

    @property
    def beats_recipe(self) -> bool:
        """Whether the whole interval of the objective lies above 0."""
        return self.objective_interval[0] > 0


@dataclass(frozen=True, kw_only=True)
class TuningReport:
    """All that a study says.

    Attributes:
        folder: of the study.
        plan: what was searched.
        trials: in order.
        own: number of the trial that is the recipe itself; None if the space leaves it out.
        front: trials that none beats in both accuracy and stability.
        importances: of parameters, largest first; None if they cannot be told.
        arms: of the last comparison, the recipe first; empty if there was none.
        judgements: of the candidates, in the order of their objective in the search.
        missing: runs of the last comparison that did not come to an end.
        made_with: builds of gmpo that the runs were begun with, as `builds_of` tells them.
    """

    folder: Path
    plan: TuningPlan
    trials: tuple[TrialRecord, ...]
    own: int | None
    front: tuple[int, ...]
    importances: Mapping[str, float] | None
    arms: tuple[JudgedArm, ...]
    judgements: tuple[Judgement, ...]
    missing: tuple[str, ...]
    made_with: tuple[Mapping[str, str | None], ...]

    @property
    def winner(self) -> TrialRecord | None:
        """Of the candidates that beat the recipe, the one that does by most."""
        better = [found for found in self.judgements if found.beats_recipe]
        if not better:
            return None
        best = max(better, key=lambda found: found.objective)
        return next(trial for trial in self.trials if trial.number == best.number)

    def count(self, outcome: str) -> int:
        """Trials of this outcome."""
        return sum(trial.outcome == outcome for trial in self.trials)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: two studies of one plan, run by one process, give the same."""
        winner = self.winner
        return {
            "made_with": [dict(build) for build in self.made_with],
            "plan": self.plan.as_dict(),
            "trials": [_trial(trial) for trial in self.trials],
            "own": self.own,
            "front": list(self.front),
            "importances": None if self.importances is None else dict(self.importances),
            "judged": [asdict(arm) for arm in self.arms],
            "judgements": [
                {**asdict(found), "beats_recipe": found.beats_recipe} for found in self.judgements
            ],
            "missing": list(self.missing),
            "winner": None if winner is None else winner.number,
            "verdict": verdict(self),
        }


def build_tuning_report(search: Search) -> TuningReport:
    """What the trials and the runs of the last comparison say, of those that have ended.

    Raises:
        StudyError: a finished run's evaluation is gone.
        DataError: a line of a run's files is damaged.
    """
    plan = search.plan
    trials = tuple(search.records())
    own = plan.own_values()
    chosen = candidates(search)
    arms: dict[int | None, dict[int, JudgedRun]] = {None: {}}
    arms |= {record.number: {} for record in chosen}
    missing: list[str] = []
    runs = [trial_folder(search.folder, trial.number) for trial in trials]
    if chosen:
        numbers: dict[str, int | None] = {OWN: None}
        numbers |= {arm_name(record.number): record.number for record in chosen}
        folder = judged_folder(search.folder)
        ended = ended_cells(folder)
        for cell in judged_plan(plan, chosen).cells():
            if cell.name in ended:
                runs.append(cell_folder(folder, cell))
                crashed = ended[cell.name].outcome == "diverged"
                run = _run(cell_folder(folder, cell), cell, plan, crashed=crashed)
                arms[numbers[cell.arm]][cell.seed] = run
            else:
                missing.append(cell.name)
    return TuningReport(
        folder=search.folder,
        plan=plan,
        trials=trials,
        own=next((trial.number for trial in trials if dict(trial.values) == own), None),
        front=tuple(search.front()),
        importances=search.importances(),
        arms=tuple(_arm(number, runs) for number, runs in arms.items() if runs),
        judgements=tuple(judgements(arms)),
        missing=tuple(missing),
        made_with=builds_of(runs),
    )


def judgements(arms: Mapping[int | None, Mapping[int, JudgedRun]]) -> list[Judgement]:
    """Each candidate against the recipe, over the seeds that both have.

    Runs are paired by seed and by item: a cell of the table is the difference of
    0.7 outcome + 0.3 stability. With K candidates each interval has confidence 1 - 0.05 / K, so
    that all hold together with 95 % probability: the best of K is picked by these very figures.

    Args:
        arms: runs by seed, of each trial's number and of None, the recipe. Candidates with fewer
            than two pairs are left out, and all of them where every run crashed.

    Raises:
        StudyError: two runs were not asked the same items.
    """
    own = arms[None]
    numbers = [number for number in arms if number is not None]
    items = _items([run for runs in arms.values() for run in runs.values()])
    found = []
    for number in numbers:
        seeds = sorted(own.keys() & arms[number].keys())
        if len(seeds) < _FEWEST_SEEDS or not items:
            continue
        pairs = [(own[seed], arms[number][seed]) for seed in seeds]
        outcomes = np.array([_difference(*pair, items=items) for pair in pairs])
        steadiness = np.array([b.score.stability - a.score.stability for a, b in pairs])
        table = ACCURACY_WEIGHT * outcomes + STABILITY_WEIGHT * steadiness[:, None]
        confidence = 1 - (1 - _CONFIDENCE) / len(numbers)
        found.append(
            Judgement(
                number=number,
                seeds=len(seeds),
                objective=float(table.mean()),
                objective_interval=crossed_interval(table, confidence=confidence),
                accuracy=float(outcomes.mean()),
                accuracy_interval=crossed_interval(outcomes, confidence=confidence),
            )
        )
    return found


def verdict(report: TuningReport) -> str:
    """Whether a trial beat the recipe, in one or two sentences."""
    plan, winner = report.plan, report.winner
    where = (
        f"on {plan.test_items} held-out items that no trial asked, {len(plan.seeds)} fresh seeds"
    )
    if not report.judgements:
        if report.arms:
            return f"Nothing can be said {where}: no candidate has two seeds beside the recipe's."
        return "No trial can be held against the recipe: none but the recipe itself was scored."
    best = max(report.judgements, key=lambda found: found.objective)
    low, high = best.objective_interval
    figures = f"{best.objective:+.4f} ({low:+.4f} to {high:+.4f})"
    if winner is None:
        return (
            f"No trial beat the recipe {where}: the best of {len(report.judgements)}, trial "
            f"{best.number}, differs in the objective by {figures}. Keep the recipe."
        )
    low, high = best.accuracy_interval
    side = "higher" if low > 0 else "lower" if high < 0 else "no difference seen"
    return (
        f"Trial {winner.number} beat the recipe {where}: the objective differs by {figures}. Its "
        f"accuracy differs by {best.accuracy:+.4f} ({low:+.4f} to {high:+.4f}): {side}."
    )


def winning_recipe(report: TuningReport) -> str:
    """The winner's recipe as TOML, or the recipe as it was with a note that nothing beat it."""
    winner = report.winner
    values = {} if winner is None else winner.values
    notes = [f"# {verdict(report)}"]
    notes += [f"# {key} = {value}" for key, value in values.items()]
    return "\n".join([*notes, "", dump_recipe(recipe_with(report.plan.recipe, values))])


def write_report(report: TuningReport) -> Path:
    """Write `report.json` and `winner.toml` into the study folder; the path of the latter.

    Raises:
        RunFolderError: they cannot be written.
    """
    folder = RunFolder(report.folder)
    folder.write_text("report.json", json.dumps(report.as_dict(), indent=1) + "\n")
    folder.write_text("winner.toml", winning_recipe(report))
    return report.folder / "winner.toml"


def _run(folder: Path, cell: Cell, plan: TuningPlan, *, crashed: bool) -> JudgedRun:
    if crashed:
        return JudgedRun(score=FAILED, outcomes={}, crashed=True)
    return JudgedRun(
        score=final_score(folder, cell.recipe, kind=plan.stability),
        outcomes=held_out_outcomes(folder),
        crashed=False,
    )


def _difference(own: JudgedRun, candidate: JudgedRun, *, items: Sequence[str]) -> list[float]:
    """Of each item's outcome; a crashed run answers nothing right."""
    return [candidate.outcomes.get(name, 0.0) - own.outcomes.get(name, 0.0) for name in items]


def _items(runs: Sequence[JudgedRun]) -> list[str]:
    """Names of the items that runs were asked: all of them the same; none if every run crashed."""
    asked = [run.outcomes for run in runs if not run.crashed]
    if any(outcomes.keys() != asked[0].keys() for outcomes in asked):
        raise StudyError(
            "runs of the last comparison were asked different items; remove the folder `judged` in "
            "the study and give the same command again"
        )
    return list(asked[0]) if asked else []


def _arm(number: int | None, runs: Mapping[int, JudgedRun]) -> JudgedArm:
    scores = [run.score for run in runs.values()]
    return JudgedArm(
        number=number,
        runs=len(runs),
        crashes=sum(run.crashed for run in runs.values()),
        accuracy=statistics.fmean(score.accuracy for score in scores),
        stability=statistics.fmean(score.stability for score in scores),
        objective=statistics.fmean(score.objective for score in scores),
        interval=_own_interval(list(runs.values())),
    )


def _own_interval(runs: Sequence[JudgedRun]) -> tuple[float, float] | None:
    names = _items(runs)
    if len(runs) < _FEWEST_SEEDS or not names:
        return None
    table = np.array(
        [
            [
                ACCURACY_WEIGHT * run.outcomes.get(name, 0.0)
                + STABILITY_WEIGHT * run.score.stability
                for name in names
            ]
            for run in runs
        ]
    )
    return crossed_interval(table, confidence=_CONFIDENCE)


def _trial(trial: TrialRecord) -> dict[str, Any]:
    score = trial.score
    return {
        "number": trial.number,
        "outcome": trial.outcome,
        "values": dict(trial.values),
        "objective": trial.objective,
        "accuracy": None if score is None else score.accuracy,
        "stability": None if score is None else score.stability,
        "during": {str(number): value for number, value in trial.during.items()},
    }
