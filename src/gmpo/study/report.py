"""What a study found: every run's figures, the arms compared over seeds, and what that allows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gmpo.config import RunConfig
from gmpo.errors import StudyError
from gmpo.run_process import attempts
from gmpo.stability import FIGURES, RunFigures, common_target, run_figures, window_rounds
from gmpo.study.cells import cell_folder, ended_cells
from gmpo.study.comparison import IMPROVEMENTS, Comparison, compare_arms, smallest_p_value
from gmpo.study.plan import Cell, StudyPlan
from gmpo.tracking import builds_of, read_lines

__all__ = [
    "ArmSummary",
    "RunReport",
    "StudyReport",
    "build_report",
    "limits",
    "sentence",
]


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """One cell's run.

    Attributes:
        arm: label.
        seed: of it.
        outcome: "finished" or "diverged"; "missing" if it did not come to an end.
        figures: None if it is missing.
        processes: that it took; each but the last died or was stopped.
        seconds: that they ran.
        rounds: the figures of each round, as logged.
    """

    arm: str
    seed: int
    outcome: str
    figures: RunFigures | None
    processes: int
    seconds: float
    rounds: tuple[Mapping[str, Any], ...]

    def as_dict(self) -> dict[str, Any]:
        """Figures for JSON, without what differs from one machine to the next."""
        figures = None if self.figures is None else asdict(self.figures)
        return {"arm": self.arm, "seed": self.seed, "outcome": self.outcome, "figures": figures}


@dataclass(frozen=True, kw_only=True)
class ArmSummary:
    """An arm over its seeds; means are over the runs that did not crash.

    Attributes:
        label: of the arm.
        objective: its name.
        clip: the clip in words.
        runs: that came to an end.
        crashes: of these, how many diverged or collapsed.
        means: of each figure, over the runs that have it.
        deviations: sample standard deviations over the same.
        reached: runs that reached the target reward.
        ratio_range: smallest and largest importance ratio of any token of any run.
    """

    label: str
    objective: str
    clip: str
    runs: int
    crashes: int
    means: Mapping[str, float | None]
    deviations: Mapping[str, float | None]
    reached: int
    ratio_range: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class StudyReport:
    """All that a study says.

    Attributes:
        folder: of the study.
        plan: what was run.
        target: reward that "rounds to target" waited for; None if rewards did not rise.
        arms: in the plan's order.
        comparisons: each other arm with the first.
        runs: every cell.
        same_prompts: whether the runs of each seed asked the same prompts in the same order, in
            the groups that they kept; None where runs kept none, so that nobody can tell.
        same_start: whether their first rounds have the same completions, as the same weights give;
            None likewise.
        made_with: builds of gmpo that the runs were begun with, as `builds_of` tells them.
    """

    folder: Path
    plan: StudyPlan
    target: float | None
    arms: tuple[ArmSummary, ...]
    comparisons: tuple[Comparison, ...]
    runs: tuple[RunReport, ...]
    same_prompts: bool | None
    same_start: bool | None
    made_with: tuple[Mapping[str, str | None], ...]

    @property
    def missing(self) -> list[str]:
        """Cells without a result."""
        return [f"{run.arm}, seed {run.seed}" for run in self.runs if run.figures is None]

    def improvements(self) -> Iterator[tuple[str, Comparison]]:
        """The article's four figures of each candidate."""
        for name, figure in IMPROVEMENTS.items():
            yield from ((name, found) for found in self.comparisons if found.figure == figure)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: two studies of one plan, on one machine, give the same."""
        return {
            "made_with": [dict(build) for build in self.made_with],
            "plan": self.plan.as_dict(),
            "target_reward": self.target,
            "same_prompts": self.same_prompts,
            "same_start": self.same_start,
            "missing": self.missing,
            "arms": [asdict(arm) for arm in self.arms],
            "improvements": [
                {
                    "name": name,
                    "baseline": found.baseline,
                    "candidate": found.candidate,
                    "improvement": found.improvement,
                    "interval": _finite_pair(found.improvement_interval),
                    "pairs": found.pairs,
                    "left_out": found.left_out,
                    "verdict": found.verdict,
                }
                for name, found in self.improvements()
            ],
            "comparisons": [comparison.as_dict() for comparison in self.comparisons],
            "runs": [run.as_dict() for run in self.runs],
        }


def build_report(study: Path, plan: StudyPlan) -> StudyReport:
    """What a study's runs say, of those that have ended.

    Raises:
        StudyError: none has.
        DataError: a line of a run's files is damaged.
    """
    ended = ended_cells(study)
    cells = [cell for cell in plan.cells() if cell.name in ended]
    if not cells:
        raise StudyError(f"no run of study {study} has ended, so there is nothing to report")
    lines = {c.name: list(read_lines(cell_folder(study, c), "metrics.jsonl")) for c in cells}
    rounds = {
        name: tuple(line for line in logged if line["kind"] == "round")
        for name, logged in lines.items()
    }
    total_rounds = plan.recipe.training.rounds
    target = plan.target_reward
    if target is None:
        rewards = [
            [line["rollout/reward"] for line in logged if line["rollout/reward"] is not None]
            for logged in rounds.values()
        ]
        target = common_target(rewards, rounds=total_rounds)
    figures = {
        cell.name: run_figures(
            lines[cell.name],
            start=_start(cell_folder(study, cell), cell.recipe),
            held_out_end=_held_out(cell_folder(study, cell)),
            target=target,
            rounds=total_rounds,
            steps_per_round=plan.recipe.training.steps_per_round,
            diverged=ended[cell.name].outcome == "diverged",
        )
        for cell in cells
    }
    same_prompts, same_start = _pairing(study, cells)
    by_arm = {
        arm.label: {cell.seed: figures[cell.name] for cell in cells if cell.arm == arm.label}
        for arm in plan.arms
    }
    return StudyReport(
        folder=study,
        plan=plan,
        target=target,
        arms=tuple(_summary(plan, label, runs) for label, runs in by_arm.items()),
        comparisons=tuple(
            comparison
            for arm in plan.arms[1:]
            for comparison in compare_arms(
                by_arm[plan.baseline], by_arm[arm.label], names=(plan.baseline, arm.label)
            )
        ),
        runs=_runs(study, plan, figures, rounds),
        same_prompts=same_prompts,
        same_start=same_start,
        made_with=builds_of(cell_folder(study, cell) for cell in cells),
    )


def sentence(found: Comparison) -> str:
    """What may be said of one figure of two arms."""
    title = "crashes" if found.figure == "crashes" else FIGURES[found.figure].title
    if found.effect is None:
        left = f", {found.left_out} left out" if found.left_out else ""
        return f"{title}: not measured in two pairs ({found.pairs} have it{left})"
    by = " / " if found.compared == "ratio" else " - "
    said = {
        "lower": f"lower with {found.candidate}",
        "higher": f"higher with {found.candidate}",
    }.get(found.verdict, found.verdict)
    text = f"{title}: {said}; {found.candidate}{by}{found.baseline} = {found.effect:.4g}"
    if found.interval is not None:
        text += f" (95 % {found.interval[0]:.4g} to {found.interval[1]:.4g})"
    text += f", p {found.p_value:.2g} in {found.pairs} pairs"
    if found.detectable is not None and found.verdict == "no difference seen":
        factor = "a factor of " if found.compared == "ratio" else "a difference of "
        text += f"; {factor}{found.detectable:.3g} would have been seen with 80 % probability"
    return text


def limits(report: StudyReport) -> list[str]:
    """What the study cannot show, whatever it found."""
    plan = report.plan
    pairs = len(plan.seeds)
    smallest = smallest_p_value(pairs)
    assert smallest is not None, "a plan has at least two seeds"
    found = []
    if plan.is_quick:
        found.append(
            f"This is a quick study: {plan.recipe.training.rounds} rounds of "
            f"{plan.recipe.sampling.prompts_per_round} prompts. It shows that everything works and "
            "what a report looks like. It cannot show that an objective is steadier: collapses "
            "come after hundreds of rounds, and only differences as large as the column "
            '"would be seen" says can be found.'
        )
    found += _added_seeds(plan)
    at_best = f"With {pairs} pairs the exact sign-flip test cannot give a p below {smallest:.2g}"
    if smallest > 0.05:
        found.append(
            f"{at_best}, so it can call nothing different at 5 %; at least 6 pairs could. The "
            "intervals are Student's: they suppose that differences between seeds are about "
            "normal, which so few cannot show. A difference called here is a reason to run more "
            "seeds, not a result."
        )
    else:
        found.append(f"{at_best}. The intervals suppose differences that are about normal.")
    count = len(report.comparisons)
    found.append(
        f"{count} figures are compared, each at 95 %: if nothing differed, about "
        f"{0.05 * count:.1f} of them would be called different all the same."
    )
    window = window_rounds(plan.recipe.training.rounds)
    if report.target is None:
        found.append("The rewards did not rise over the runs, so there is no target to reach.")
    elif plan.target_reward is None:
        found.append(
            f"The target reward {report.target:.3f} lies half-way from the first {_rounds(window)} "
            "to the last, over all runs of all arms alike; --target-reward sets another."
        )
    found += _never_reached(report)
    found += _not_measured(report)
    crashed = sum(arm.crashes for arm in report.arms)
    if crashed:
        found.append(
            f"{crashed} runs crashed. Their seeds count in the crashes alone: a run that ended "
            "early, or whose policy is gone, looks steady. What is left is a choice of the lucky "
            "seeds, and says less."
        )
    scales = {arm.recipe.objective.scale() for arm in plan.arms}
    if len(scales) > 1:
        found.append(
            "Arms scale advantages differently (by standard deviation, or not), so their losses "
            "and gradient norms have different units and are not to be compared."
        )
    return found


def _added_seeds(plan: StudyPlan) -> Iterator[str]:
    """That the number of seeds may have been chosen by what was seen, where it may."""
    if plan.num_seeds_before:
        first, *later = plan.num_seeds_before
        then = "".join(f", then {count}" for count in later)
        yield (
            f"Seeds were added after runs had begun: {first} at first{then}, now "
            f"{len(plan.seeds)}. Whoever adds seeds until a difference shows finds one that is not "
            "there more often than once in 20: intervals and p suppose a number of seeds that "
            "nobody chose by the results. A study of other seeds would tell."
        )


def _never_reached(report: StudyReport) -> Iterator[str]:
    """Which pairs the rounds to the target are of, where one or both runs never reached it."""
    own = _whole(report, report.plan.baseline)
    for arm in report.arms[1:]:
        other = _whole(report, arm.label)
        seeds = own.keys() & other.keys()
        late = [
            {seed for seed in seeds if figures[seed].values["rounds_to_target"] is None}
            for figures in (own, other)
        ]
        reached = len(seeds - late[0] - late[1])
        if report.target is not None and reached < len(seeds):
            yield (
                f"Convergence speed of {arm.label} over {report.plan.baseline} is of {reached} of "
                f"{len(seeds)} pairs without a crash: of the others a run never reached the target "
                f"({report.plan.baseline}: {len(late[0])}, {arm.label}: {len(late[1])}). Such a "
                "run is slower than any that did, so the figure flatters the arm that has more of "
                "them."
            )


def _whole(report: StudyReport, label: str) -> dict[int, RunFigures]:
    """Figures of an arm's runs that ended and did not crash, by seed."""
    return {
        run.seed: run.figures
        for run in report.runs
        if run.arm == label and run.figures is not None and run.figures.crash is None
    }


def _not_measured(report: StudyReport) -> Iterator[str]:
    """Figures that the table has no values of, and why."""
    if not any(run.figures.could_collapse for run in report.runs if run.figures):
        yield (
            "No run was long enough for a collapse to be told: 20 rounds, or 10 where the "
            "untrained policy's sampled reward is known."
        )
    without = [arm.label for arm in report.plan.arms if not arm.recipe.needs_reference()]
    if without:
        every = report.plan.recipe.training.kl_ref_every
        yield (
            f"KL to the start was not measured in {' and '.join(without)}: training.kl_ref_every "
            f"is {every} and a run has {_rounds(report.plan.recipe.training.rounds)}; a study of "
            "a recipe that does not name it measures it on the last round."
        )


def _rounds(count: int) -> str:
    return "round" if count == 1 else f"{count} rounds"


def _start(run: Path, recipe: RunConfig) -> float | None:
    """A reward that the untrained policy earns at least: the lower end of its sampled evaluation.

    None where that was not measured, or measured something else than the round's reward.
    """
    reward, sampling, evaluation = recipe.reward, recipe.sampling, recipe.evaluation
    is_accuracy = (reward.weights, reward.truncated) == ({"correct": 1.0}, "score")
    is_alike = (
        sampling.temperature == 1
        and evaluation.max_new_tokens in (None, sampling.max_new_tokens)
        and (evaluation.measure == "reward" or (is_accuracy and reward.combine == "sum"))
    )
    for record in read_lines(run, "evaluations.jsonl"):
        for result in record["results"]:
            if is_alike and record["stage"] == "before" and result["name"] == "sampled":
                lower_end: float | None = result["interval_95"][0]
                return lower_end
    return None


def _held_out(run: Path) -> float | None:
    """Greedy accuracy or reward after training."""
    for record in read_lines(run, "evaluations.jsonl"):
        for result in record["results"]:
            if record["stage"] == "after" and result["name"] == "greedy":
                value: float | None = result.get("accuracy", result.get("reward"))
                return value
    return None


def _summary(plan: StudyPlan, label: str, runs: Mapping[int, RunFigures]) -> ArmSummary:
    objective = next(arm.recipe.objective for arm in plan.arms if arm.label == label)
    whole = [run for run in runs.values() if run.crash is None]
    values = {
        name: [value for run in whole if (value := run.values[name]) is not None]
        for name in FIGURES
    }
    lows = [run.ratio_min for run in runs.values() if run.ratio_min is not None]
    highs = [run.ratio_max for run in runs.values() if run.ratio_max is not None]
    return ArmSummary(
        label=label,
        objective=objective.name,
        clip=objective.clip_description(),
        runs=len(runs),
        crashes=len(runs) - len(whole),
        means={n: statistics.fmean(found) if found else None for n, found in values.items()},
        deviations={
            n: statistics.stdev(found) if len(found) > 1 else None for n, found in values.items()
        },
        reached=len(values["rounds_to_target"]),
        ratio_range=(min(lows), max(highs)) if lows and highs else None,
    )


def _runs(
    study: Path,
    plan: StudyPlan,
    figures: Mapping[str, RunFigures],
    rounds: Mapping[str, tuple[Mapping[str, Any], ...]],
) -> tuple[RunReport, ...]:
    tries, ended = attempts(study), ended_cells(study)
    found = []
    for cell in plan.cells():
        own = [attempt for attempt in tries if attempt.cell == cell.name]
        found.append(
            RunReport(
                arm=cell.arm,
                seed=cell.seed,
                outcome=ended[cell.name].outcome if cell.name in ended else "missing",
                figures=figures.get(cell.name),
                processes=len(own),
                seconds=sum(attempt.seconds for attempt in own),
                rounds=rounds.get(cell.name, ()),
            )
        )
    return tuple(found)


def _pairing(study: Path, cells: Sequence[Cell]) -> tuple[bool | None, bool | None]:
    """Whether runs of one seed asked the same prompts, and began with the same completions."""
    asked: list[bool | None] = []
    began: list[bool | None] = []
    first: dict[int, list[dict[str, Any]]] = {}
    for cell in cells:
        groups = list(read_lines(cell_folder(study, cell), "rollouts.jsonl"))
        if cell.seed not in first:
            first[cell.seed] = groups
            continue
        both = list(zip(groups, first[cell.seed], strict=False))  # one that diverged has fewer
        asked.append(_all_of(_asked(mine) == _asked(theirs) for mine, theirs in both))
        began.append(
            _all_of(_texts(mine) == _texts(theirs) for mine, theirs in both if mine["round"] == 1)
        )
    return _all_known(asked), _all_known(began)


def _all_of(found: Iterable[bool]) -> bool | None:
    """Whether all are true; None of nothing, which is no proof."""
    known = list(found)
    return all(known) if known else None


def _all_known(found: Sequence[bool | None]) -> bool | None:
    """False if one is, None if one is not known, or none is there to be known."""
    if False in found:
        return False
    return None if None in found or not found else True


def _asked(group: Mapping[str, Any]) -> tuple[int, int, str]:
    return group["round"], group["group"], group["prompt_id"]


def _texts(group: Mapping[str, Any]) -> list[str]:
    return [rollout["text"] for rollout in group["rollouts"]]


def _finite_pair(pair: tuple[float, float] | None) -> list[float | None] | None:
    """JSON has no infinity."""
    return None if pair is None else [end if math.isfinite(end) else None for end in pair]
