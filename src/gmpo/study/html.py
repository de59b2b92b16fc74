"""A study's report as one HTML file that needs nothing else: no network, pictures inside."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from gmpo.run_process import MOST_TRIES
from gmpo.stability import FIGURES
from gmpo.study.comparison import IMPROVEMENTS
from gmpo.study.report import StudyReport, limits, sentence
from gmpo.study.tables import comparison_rows, headline, improvement_rows, stability_rows

__all__ = ["study_html"]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #1b1b1b; background: #fff; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; margin: .8rem 0; font-size: .9rem; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
th { border-bottom: 2px solid #888; } .scroll { overflow-x: auto; }
.answer { background: #eef4fa; border-left: 4px solid #0072B2; padding: .6rem 1rem; }
.limits { background: #faf4ea; border-left: 4px solid #E69F00; padding: .6rem 1rem .6rem 2rem; }
.fault { background: #fbeaea; border-left: 4px solid #b00; padding: .6rem 1rem; }
img { max-width: 100%; } code { background: #f3f3f3; padding: 0 .2rem; }
"""


def study_html(report: StudyReport, plots: Sequence[Path]) -> str:
    """The whole page.

    Args:
        report: of the study.
        plots: PNG files to put into it.
    """
    plan = report.plan
    title = f"{' and '.join(arm.label for arm in plan.arms)} on {plan.source}"
    body = [
        f"<h1>{escape(title)}</h1>",
        '<div class="answer">'
        + "".join(f"<p>{escape(text)}</p>" for text in headline(report))
        + "</div>",
        _faults(report),
        "<h2>What this cannot show</h2>",
        _list(limits(report), css="limits"),
        "<h2>What was compared</h2>",
        _list(_what(report)),
        "<h2>Stability</h2><p>Mean ± sample standard deviation over the seeds, of runs that did "
        "not crash.</p>",
        _table(stability_rows(report)),
        "<h2>The article's improvement figures</h2><p>1 - candidate / baseline: above 0 the "
        "candidate is the steadier one. Paired by seed, as the geometric mean of the ratios; the "
        "range is compared on the log scale.</p>",
        _table(improvement_rows(report)),
        *(
            f'<p><img alt="{escape(path.stem)}" src="{_embedded(path)}"></p>'
            for path in reversed(plots)
        ),
    ]
    for arm in report.arms[1:]:
        found = [c for c in report.comparisons if c.candidate == arm.label]
        body += [
            f"<h2>{escape(arm.label)} against {escape(plan.baseline)}, every figure</h2>",
            _table(comparison_rows(report, arm.label)),
            _list([sentence(comparison) for comparison in found]),
        ]
    body += [
        "<h2>Runs</h2>",
        _table(_run_rows(report)),
        "<h2>How the figures are made</h2>",
        _list(_definitions()),
        "<h2>Again</h2><p>The same command in the same folder runs nothing that is done: "
        f"<code>gmpo compare --study {escape(str(report.folder))}</code></p>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body></html>\n"
    )


def _faults(report: StudyReport) -> str:
    """What makes the comparison less than it should be; empty if nothing does."""
    found = []
    if report.missing:
        found.append(f"Not run to an end: {'; '.join(report.missing)}. They are in no figure.")
    if report.same_prompts is False:
        found.append("Runs of one seed asked different prompts, so they are not pairs.")
    if report.same_start is False:
        found.append(
            "Runs of one seed drew different completions in the first round, although weights and "
            "streams are the same: sampling does not repeat itself here, and pairs are looser."
        )
    if None in (report.same_prompts, report.same_start):
        found.append(
            "Whether runs of one seed asked the same prompts and began alike was not checked: "
            "some have no other run of their seed that has ended, or kept no rollouts (tracking."
            f"groups_per_round is {report.plan.recipe.tracking.groups_per_round}; 1 is enough)."
        )
    if len(report.made_with) > 1:
        found.append(
            "Runs were made with more than one build of gmpo (below), and what changed between "
            "them may be what differs here."
        )
    return "".join(f'<p class="fault">{escape(text)}</p>' for text in found)


def _what(report: StudyReport) -> list[str]:
    plan, recipe = report.plan, report.plan.recipe
    arms = "; ".join(f"{arm.label}: {arm.objective}, {arm.clip}" for arm in report.arms)
    rollouts = recipe.sampling.prompts_per_round * recipe.sampling.group_size
    return [
        f"Arms (clips are in each objective's own unit): {arms}",
        f"Seeds: {', '.join(map(str, plan.seeds))}; each decides the order of prompts and every "
        "drawn token, alike in all arms",
        f"Each run: {recipe.model.name} ({recipe.model.device}, {recipe.model.dtype}), "
        f"{recipe.task.kind}, {recipe.training.rounds} rounds of {rollouts} rollouts "
        f"({recipe.sampling.prompts_per_round} prompts, {recipe.sampling.group_size} completions "
        f"each), {recipe.training.steps_per_round} optimizer steps a round, step size "
        f"{recipe.training.learning_rate:g}",
        "Same prompts in the same order, and the same completions in the first round, in the runs "
        f"of each seed: {_pairs_checked(report)}",
        f"Made with: {'; '.join(map(_build, report.made_with)) or 'not known'}",
    ]


def _pairs_checked(report: StudyReport) -> str:
    found = (report.same_prompts, report.same_start)
    if False in found:
        return "checked, no, see above"
    return "not checked, see above" if None in found else "checked on the groups kept, yes"


def _build(made_with: Mapping[str, str | None]) -> str:
    commit = made_with["commit"]
    where = "not from a repository" if commit is None else f"commit {commit}"
    return f"gmpo {made_with['gmpo']}, {where}"


def _definitions() -> list[str]:
    article = {figure: name.replace("_", " ") for name, figure in IMPROVEMENTS.items()}
    figures = [
        f"{figure.title}: {figure.formula}"
        + (f"; compared by ratio, and the article's {article[name]}" if name in article else "")
        for name, figure in FIGURES.items()
    ]
    return [
        *figures,
        "later steps: those after a round's first, on which every ratio is 1",
        "crash: training ended because a value that counts was not finite, or because the guard of "
        "a recipe that has one gave up (diverged), or the mean reward of the last ten rounds lies "
        "below the best ten in a row by more than half of that and by more than three standard "
        "errors (collapsed)",
        "interval: 95 %, Student's t on the differences paired by seed (of logarithms, where the "
        "figure is compared by ratio); p: exact two-sided sign-flip test of the same differences",
        "pairs: seeds of which both runs have the figure; behind them how many seeds were left out",
        "no difference seen: the interval contains no change (of crashes, and of pairs that all "
        "differ by the same: p above 0.05)",
        "would be seen: the true difference that a paired t-test of so many pairs with the spread "
        "found here detects with 80 % probability",
        f"a process that dies is started again from its newest checkpoint, until {MOST_TRIES} have "
        "died on one run",
    ]


def _run_rows(report: StudyReport) -> list[list[str]]:
    rows = [["arm", "seed", "outcome", "rounds", "reward at the end", "ratio", "processes", "s"]]
    for run in report.runs:
        figures = run.figures
        if figures is None:
            rows.append([run.arm, str(run.seed), "missing", "-", "-", "-", str(run.processes), "-"])
            continue
        reward = figures.values["reward_end"]
        spread = (
            "-"
            if figures.ratio_min is None or figures.ratio_max is None
            else f"{figures.ratio_min:.4g} to {figures.ratio_max:.4g}"
        )
        rows.append(
            [
                run.arm,
                str(run.seed),
                figures.crash or run.outcome,
                str(figures.rounds_done),
                "-" if reward is None else f"{reward:.3f}",
                spread,
                str(run.processes),
                f"{run.seconds:.0f}",
            ]
        )
    return rows


def _table(rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows[1:]
    )
    return f'<div class="scroll"><table><tr>{head}</tr>\n{body}</table></div>'


def _list(items: Sequence[str], *, css: str = "") -> str:
    listed = "".join(f"<li>{escape(item)}</li>\n" for item in items)
    return f'<ul class="{css}">{listed}</ul>' if css else f"<ul>{listed}</ul>"


def _embedded(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
