"""A tuning study for a terminal: what it will do, and what it found."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gmpo.text_tables import open_table
from gmpo.tuning.plan import TuningPlan
from gmpo.tuning.report import JudgedArm, TuningReport, verdict
from gmpo.tuning.search import TrialRecord
from gmpo.tuning.space import own_values

__all__ = ["plan_sentences", "render_plan", "render_tuning"]

_SHOWN_TRIALS = 10


def plan_sentences(plan: TuningPlan, trials: int) -> list[str]:
    """What a study does, in a few sentences."""
    recipe = plan.recipe
    searched = (
        "accuracy and stability, two objectives"
        if plan.is_pareto
        else "0.7 accuracy + 0.3 stability"
    )
    pruned = (
        f", those behind at an evaluation every {plan.rounds_between} rounds end there"
        if plan.prunes
        else ", none ends early"
    )
    return [
        f"{trials} trials of {recipe.training.rounds} rounds search {len(plan.space)} parameters "
        f"for {searched} ({plan.stability} stability){pruned}",
        f"scored on {plan.validation_items} held-out items; then the {plan.top} best and the "
        f"recipe itself train with seeds {', '.join(map(str, plan.seeds))} and are measured on the "
        f"{plan.test_items} others: {(plan.top + 1) * len(plan.seeds)} runs",
    ]


def render_plan(plan: TuningPlan, trials: int) -> RenderableType:
    """The space, with the recipe's own values, for `--dry-run`."""
    table = open_table(["parameter", "recipe", "searched"], title="space", left=3)
    own = own_values(plan.recipe, plan.space)
    for key, parameter in plan.space.items():
        table.add_row(key, _value(own[key]), str(parameter))
    return Group(*(Text(s) for s in plan_sentences(plan, trials)), Text(), table)


def render_tuning(report: TuningReport) -> RenderableType:
    """The report for a terminal."""
    parts: list[RenderableType] = [Text(verdict(report)), Text(), _trials(report)]
    if report.importances is not None:
        parts += [Text(), _importances(report)]
    if report.arms:
        parts += [Text(), _judged(report)]
    return Group(*parts)


def _trials(report: TuningReport) -> Table:
    counts = ", ".join(
        f"{count} {outcome}"
        for outcome in ("scored", "pruned", "diverged", "refused", "unfinished")
        if (count := report.count(outcome))
    )
    best = sorted(
        (t for t in report.trials if t.outcome == "scored"),
        key=lambda trial: (-(trial.objective or 0.0), trial.number),
    )
    shown = best[:_SHOWN_TRIALS]
    own = next((t for t in best if t.number == report.own), None)
    if own is not None and own not in shown:
        shown.append(own)
    title = f"trials: {counts}; the best, on {report.plan.validation_items} items that chose them"
    heads = ["trial", "objective", "accuracy", "stability", "values"]
    table = open_table(heads, title=title, left=0)
    table.columns[-1].justify = "left"
    for trial in shown:
        table.add_row(*_trial_row(report, trial))
    return table


def _trial_row(report: TuningReport, trial: TrialRecord) -> list[str]:
    assert trial.score is not None
    values = "; ".join(f"{k.rpartition('.')[2]} {_value(v)}" for k, v in trial.values.items())
    is_own = trial.number == report.own
    return [
        str(trial.number),
        f"{trial.score.objective:.4f}",
        f"{trial.score.accuracy:.3f}",
        f"{trial.score.stability:.3f}",
        "the recipe itself" if is_own else values,
    ]


def _importances(report: TuningReport) -> Table:
    assert report.importances is not None
    title = f"importance (PED-ANOVA, {report.count('scored') + report.count('diverged')} trials)"
    table = open_table(["parameter", "share"], title=title)
    for key, share in report.importances.items():
        table.add_row(key, f"{100 * share:.0f} %")
    return table


def _judged(report: TuningReport) -> Table:
    plan = report.plan
    title = (
        f"on {plan.test_items} items that no trial asked, seeds "
        f"{', '.join(map(str, plan.seeds))}; differences paired by seed and item"
    )
    heads = ["", "runs", "accuracy", "stability", "objective", "95 %", "against the recipe", ""]
    table = open_table(heads, title=title)
    found = {judgement.number: judgement for judgement in report.judgements}
    for arm in report.arms:
        judgement = found.get(arm.number) if arm.number is not None else None
        against, says = "", ""
        if judgement is not None:
            low, high = judgement.objective_interval
            against = f"{judgement.objective:+.4f} ({low:+.4f} to {high:+.4f})"
            says = "better" if judgement.beats_recipe else "worse" if high < 0 else "none seen"
        table.add_row(*_arm_row(arm), against, says)
    return table


def _arm_row(arm: JudgedArm) -> list[str]:
    crashes = f" ({arm.crashes} crashed)" if arm.crashes else ""
    interval = "-" if arm.interval is None else f"{arm.interval[0]:.4f} to {arm.interval[1]:.4f}"
    return [
        "recipe" if arm.number is None else f"trial {arm.number}",
        f"{arm.runs}{crashes}",
        f"{arm.accuracy:.4f}",
        f"{arm.stability:.4f}",
        f"{arm.objective:.4f}",
        interval,
    ]


def _value(value: object) -> str:
    if value is None:
        return "not set"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
