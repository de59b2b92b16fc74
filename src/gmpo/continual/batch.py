"""The new rows of a cycle, checked with the champion's own samples beside earlier data."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gmpo.contamination import TrainingText, items_in_rows
from gmpo.continual.plan import LearnPlan, suite_prompts
from gmpo.continual.records import StepReport
from gmpo.data_checks.quality import BatchReport, EarlierData, row_texts, validate_batch
from gmpo.data_checks.samples import Sampler
from gmpo.errors import DataError
from gmpo.records import Prompt
from gmpo.suites import SuiteItems
from gmpo.tasks.rows import Row, RowForm, read_rows

__all__ = ["CheckedBatch", "apart_from_suites", "champion_sampler", "checked_batch"]


_KNOWN, _NEW = "known tasks", "new tasks"

_OF_THE_WHOLE = ("no_row_left", "too_many_rejected")
"""Refusals that a few rows of the one kind of task must not bring upon many of the other."""


@dataclass(frozen=True, kw_only=True)
class CheckedBatch:
    """Reports of a batch's rows of tasks that earlier rows have, and of the others.

    Attributes:
        reports: of both.
        most_rejected: share of all rows rejected above which the batch is refused.
    """

    reports: Mapping[str, BatchReport]
    most_rejected: float

    @property
    def accepted(self) -> list[Mapping[str, Any]]:
        """Rows to train on."""
        return [row for report in self.reports.values() for row in report.accepted]

    @property
    def rejected(self) -> list[dict[str, Any]]:
        """The others, each with its reasons."""
        return [one.as_dict() for report in self.reports.values() for one in report.rejected]

    def step(self, *, min_rows: int) -> StepReport:
        """Whether the accepted rows are trained on; the reason names what refused the batch."""
        refused = {
            name: why
            for report in self.reports.values()
            for name, why in report.refusals.items()
            if name not in _OF_THE_WHOLE
        }
        refusals = list(refused)
        sentence = "; ".join(
            [*(f"{name}: {one.found}" for name, one in self.reports.items()), *refused.values()]
        )
        accepted, rejected = len(self.accepted), len(self.rejected)
        if not accepted:
            refusals.append("no_row_left")
            sentence += "; no row is left"
        elif rejected > self.most_rejected * (accepted + rejected):
            refusals.append("too_many_rejected")
            sentence += f"; more than {self.most_rejected:.0%} of the rows are rejected"
        if not refusals and accepted < min_rows:
            refusals.append("too_few_rows")
            sentence += f"; at least {min_rows} accepted rows are needed"
        return StepReport(
            passed=not refusals,
            sentence=sentence,
            details={name: report.as_dict() for name, report in self.reports.items()},
            reason=f"Data validation failed: {', '.join(refusals)}" if refusals else None,
        )


def checked_batch(
    plan: LearnPlan,
    rows: Sequence[Mapping[str, Any]],
    earlier: Sequence[Mapping[str, Any]],
    *,
    sampler: Sampler | None,
    seed: int,
) -> CheckedBatch:
    """What may be trained on, and why the rest may not.

    The champion's samples judge only rows of tasks (by the category column) that earlier rows
    have: of a new task it may be wrong, and agree with itself, more often than not. It is asked
    some of the earlier rows too, so that it is compared with itself.

    Args:
        plan: with checks and suites.
        rows: new ones.
        earlier: trained on before.
        sampler: of the champion; None asks it nothing.
        seed: of the earlier rows that are asked.

    Raises:
        DataError: there is no row, or a suite's or an earlier row is not usable.
    """
    column = plan.checks.category_column
    tasks = {row.get(column) for row in earlier}
    parts = {
        _KNOWN: [row for row in rows if row.get(column) in tasks],
        _NEW: [row for row in rows if row.get(column) not in tasks],
    }
    profile = None
    if parts[_KNOWN]:
        drawn = random.Random(f"earlier {seed}").sample(
            list(earlier), min(plan.check_earlier_rows, len(earlier))
        )
        profile = validate_batch(_unnamed(drawn), checks=plan.checks, sampler=sampler).profile
    known = EarlierData(prompts=_prompts(earlier), profile=profile)
    new = EarlierData(prompts=_prompts([*earlier, *parts[_KNOWN]]))
    suites = _judges(plan)
    return CheckedBatch(
        most_rejected=plan.checks.most_rejected,
        reports={
            name: validate_batch(
                part,
                checks=plan.checks,
                earlier=known if name == _KNOWN else new,
                suites=suites,
                sampler=sampler if name == _KNOWN else None,
            )
            for name, part in parts.items()
            if part or (not rows and name == _NEW)
        },
    )


def apart_from_suites(
    rows: Sequence[Mapping[str, Any]], plan: LearnPlan
) -> tuple[list[Mapping[str, Any]], int]:
    """Rows that hold no item by which a candidate is judged, and how many others there are.

    New rows are checked when they come; earlier ones may be older than a suite.

    Args:
        rows: to train on again.
        plan: with suites, live requests and checks.
    """
    held = items_in_rows(
        [(suite.name, suite.title, suite.prompts) for suite in _judges(plan)],
        (
            TrainingText(id=str(place), text="\n".join(row_texts(row)))
            for place, row in enumerate(rows)
        ),
    )
    limit = plan.checks.contamination
    kept = [
        row
        for place, row in enumerate(rows)
        if (item := held.get(str(place))) is None or item.coverage <= limit
    ]
    return kept, len(rows) - len(kept)


def _judges(plan: LearnPlan) -> list[SuiteItems]:
    """What candidates are judged by: the suites, and requests of a file of their own."""
    files = dict(plan.suites)
    if plan.traffic is not None:
        files["live requests"] = plan.traffic
    return [
        SuiteItems(name=name, title=name, prompts=suite_prompts(path), max_tokens=1)
        for name, path in files.items()
    ]


def champion_sampler(
    plan: LearnPlan, champion: Path, *, warn: Callable[[str], None]
) -> Sampler | None:
    """Completions of a champion as it would be trained; None if the plan asks for none.

    Args:
        plan: how it is asked, and how often.
        champion: folder of the model, which is loaded at each call of the sampler.
        warn: told in one sentence what is not as expected.
    """
    if not plan.check_samples:
        return None
    from gmpo.data_checks.model import model_sampler

    recipe = plan.recipe
    named = recipe.model.model_copy(update={"name": str(champion)})
    return model_sampler(
        recipe.model_copy(update={"model": named}),
        num_samples=plan.check_samples,
        max_tokens=recipe.sampling.max_new_tokens,
        warn=warn,
    )


def _prompts(rows: Sequence[Mapping[str, Any]]) -> tuple[Prompt, ...]:
    """Rows as prompts; those that cannot be read repeat nothing, and are rejected elsewhere."""
    prompts: list[Prompt] = []
    for place, row in enumerate(_unnamed(rows), start=1):
        named = Row(f"earlier row {place}", f"earlier-{place}", row)
        try:
            read = read_rows([named], RowForm(is_of_recipe=False), source="earlier rows")
        except DataError:
            continue
        prompts += read.prompts
    return tuple(prompts)


def _unnamed(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows without their ids, which files of several cycles may share."""
    return [{name: value for name, value in row.items() if name != "id"} for row in rows]
