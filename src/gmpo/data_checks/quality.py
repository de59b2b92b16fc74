"""A batch of new rows checked before anything is trained on it; what is rejected is kept apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from pydantic import Field

from gmpo.contamination import TrainingText, items_in_rows
from gmpo.data_checks.duplicates import TextIndex
from gmpo.data_checks.pii import PII_KINDS, PiiKind, find_pii
from gmpo.data_checks.profile import (
    DataProfile,
    DisputeTest,
    ShiftFigure,
    dispute_test,
    main_script,
    measure_shift,
)
from gmpo.data_checks.rows import CheckedRow, Reason, Unreadable, answers_of, check_form, problem
from gmpo.data_checks.samples import Sampler, Samples, Scorer, gold_completion, sample_rows
from gmpo.errors import DataError
from gmpo.grading import Grader
from gmpo.recipe import settings_of
from gmpo.records import Prompt
from gmpo.suites import SuiteItems
from gmpo.task_config import Table

__all__ = [
    "BatchReport",
    "DataChecks",
    "EarlierData",
    "RejectedRow",
    "checks_of",
    "profile_of",
    "row_texts",
    "validate_batch",
]


class DataChecks(Table):
    """What a batch is held against."""

    longest_problem: int = Field(default=20_000, ge=1)
    """Characters of a problem, all turns together."""
    longest_answer: int = Field(default=20, ge=1)
    """Words of an answer; a longer one is prose, which is right only word for word."""
    near_overlap: float | None = Field(default=0.6, gt=0.15, le=1)
    """Runs of three words that two rows with the same numbers and the same answer share, over
    those of either (Jaccard), from which on the later repeats the earlier; None looks for equal
    texts only."""
    contamination: float = Field(default=0.0, ge=0, lt=1)
    """Share of a suite item's runs of words above which a row that has them is rejected; 0 rejects
    a single run of 13 words (8, or all, of short items)."""
    pii: tuple[PiiKind, ...] = PII_KINDS
    """Kinds of personal data and secrets that reject a row."""
    reject_never_solved: bool = True
    """Whether rows that no sample solves are rejected: all their advantages are 0."""
    reject_always_solved: bool = True
    """Whether rows that all samples solve are rejected: all their advantages are 0."""
    consensus: float = Field(default=0.6, gt=0.5, le=1)
    """Share of a row's samples that must give one answer to count as agreed."""
    reject_disputed: bool = True
    """Whether rows are rejected whose samples agree on another answer than the one given."""
    alpha: float = Field(default=0.01, gt=0, lt=1)
    """Chance that a batch like the earlier data alarms: of the test of disputed answers, and of
    all figures of shift together."""
    least_shift: float = Field(default=0.1, ge=0)
    """Smallest population stability index that is called a shift."""
    refuse_shift: bool = False
    """Whether a shift refuses the batch; else it is reported. New tasks are a shift."""
    most_rejected: float = Field(default=1.0, gt=0, le=1)
    """Share of rows rejected above which the whole batch is refused."""
    category_column: str = "category"
    """Column whose shares are compared with earlier data, where rows have it."""


def checks_of(settings: Mapping[str, Any]) -> DataChecks:
    """The checks that settings by name are.

    Raises:
        ConfigError: an unknown setting (the nearest name is offered), or a value not allowed.
    """
    return settings_of(DataChecks, settings, of="data checks")


@dataclass(frozen=True, kw_only=True)
class EarlierData:
    """What was trained on or accepted before.

    Attributes:
        prompts: rows that a new one may repeat.
        profile: figures that a new batch may differ from; None compares nothing.
    """

    prompts: tuple[Prompt, ...] = ()
    profile: DataProfile | None = None


@dataclass(frozen=True, kw_only=True)
class RejectedRow:
    """A row that is not to be trained on, as it was given, with every reason against it."""

    place: int
    row: Mapping[str, Any] | Unreadable
    reasons: tuple[Reason, ...]

    def as_dict(self) -> dict[str, Any]:
        """As JSON, the row itself included."""
        row = {"text": self.row.text} if isinstance(self.row, Unreadable) else dict(self.row)
        return {"place": self.place, "reasons": [asdict(one) for one in self.reasons], "row": row}


@dataclass(frozen=True, kw_only=True)
class BatchReport:
    """What became of a batch.

    Attributes:
        accepted: rows to train on, as they were given and in their order.
        rejected: the others.
        counts: rows, accepted, rejected, and rejected rows by check; a row counts at each check
            that found something.
        refusals: why nothing of the batch should be trained on, "poisoned" or "shift" among them;
            empty if it may be.
        shift: figures against earlier data.
        disputes: the test of answers that the model's samples dispute.
        profile: figures of the rows that came through the checks before the model was asked.
        not_checked: checks that were not made, with the reason.
    """

    accepted: tuple[Mapping[str, Any], ...]
    rejected: tuple[RejectedRow, ...]
    counts: Mapping[str, int]
    refusals: Mapping[str, str]
    shift: tuple[ShiftFigure, ...]
    disputes: DisputeTest | None
    profile: DataProfile
    not_checked: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether the accepted rows may be trained on."""
        return not self.refusals

    @property
    def sentence(self) -> str:
        """The whole in one sentence."""
        verdict = "may be trained on" if self.passed else "is refused"
        rows = "1 row" if self.counts["rows"] == 1 else f"{self.counts['rows']} rows"
        return "; ".join([f"the batch of {rows} {verdict}: {self.found}", *self.refusals.values()])

    @property
    def found(self) -> str:
        """How many rows were accepted and rejected, and why; how they differ from earlier data."""
        reasons = ", ".join(
            f"{count} {name}"
            for name, count in self.counts.items()
            if name not in ("rows", "accepted", "rejected")
        )
        rejected = f"{self.counts['rejected']} rejected" + (f" ({reasons})" if reasons else "")
        said = f"{self.counts['accepted']} accepted, {rejected}"
        moved = [figure.sentence for figure in self.shift if figure.is_alarm]
        if moved and "shift" not in self.refusals:
            said += f"; it differs from earlier data ({'; '.join(moved)})"
        return said

    def as_dict(self) -> dict[str, Any]:
        """As JSON, without the rows; reasons quote a few of their words."""
        return {
            "passed": self.passed,
            "sentence": self.sentence,
            "counts": dict(self.counts),
            "refusals": dict(self.refusals),
            "shift": [asdict(figure) for figure in self.shift],
            "disputes": None if self.disputes is None else asdict(self.disputes),
            "agreed": self.profile.num_agreed,
            "disputed": self.profile.num_disputed,
            "not_checked": list(self.not_checked),
            "rejected": [
                {"place": one.place, "reasons": [asdict(reason) for reason in one.reasons]}
                for one in self.rejected
            ],
        }


@dataclass
class _Batch:
    """The rows under way, and what is found of all of them."""

    rows: list[CheckedRow]
    checks: DataChecks
    samples: Samples | None = None
    not_checked: list[str] = field(default_factory=list)

    def sound(self) -> Iterator[tuple[CheckedRow, Prompt]]:
        """Rows against which nothing was found so far."""
        return ((one, one.prompt) for one in self.rows if one.prompt is not None and one.is_sound)

    def readable(self) -> Iterator[tuple[CheckedRow, Prompt]]:
        """Rows with a prompt, whatever else was found."""
        return ((one, one.prompt) for one in self.rows if one.prompt is not None)


def validate_batch(
    rows: Sequence[Mapping[str, Any] | Unreadable],
    *,
    checks: DataChecks | None = None,
    earlier: EarlierData | None = None,
    suites: Sequence[SuiteItems] = (),
    sampler: Sampler | None = None,
    scorer: Scorer | None = None,
) -> BatchReport:
    """Check a batch row by row and as a whole, against earlier data, suites and a model's samples.

    A row has the form that training reads. It is rejected with every reason that is found; the
    model is asked only about rows that nothing else speaks against. The whole batch is refused
    where no row is left, where more rows are rejected than allowed, where the samples dispute more
    answers than they did of earlier data (poisoned), or for a shift, if asked for.

    Args:
        rows: of the batch.
        checks: limits and rates; None is the defaults.
        earlier: what was accepted before; None finds no repetition of it and no shift.
        suites: evaluation items that must not be trained on.
        sampler: completions of the current model; None checks neither difficulty nor disputes.
        scorer: of completions, in place of the grader that the row's columns ask for.

    Raises:
        DataError: the batch holds no row, or the sampler's completions do not fit.
    """
    if not rows:
        raise DataError("the batch holds no row; give at least one row to check")
    checks = checks or DataChecks()
    earlier = earlier or EarlierData()
    batch = _Batch(check_form(rows, longest_problem=checks.longest_problem), checks)
    _check_repetitions(batch, earlier.prompts)
    _check_suites(batch, suites)
    _check_pii(batch)
    _check_answers(batch, scorer)
    asked = [prompt for _, prompt in batch.sound()]
    if sampler is None:
        batch.not_checked.append("difficulty and disputed answers: no model was asked")
    elif asked:
        batch.samples = sample_rows(
            asked, sampler=sampler, scorer=scorer, consensus=checks.consensus
        )
    profile = _profile(asked, batch.samples, checks.category_column)
    _check_samples(batch)
    return _report(batch, profile, earlier.profile)


def profile_of(
    prompts: Sequence[Prompt],
    *,
    checks: DataChecks | None = None,
    sampler: Sampler | None = None,
    scorer: Scorer | None = None,
    most_sampled: int = 200,
) -> DataProfile:
    """Figures of trusted rows, for batches to be compared with.

    Args:
        prompts: rows that are trusted.
        checks: for the consensus and the category's column.
        sampler: completions of the model that is asked about batches too.
        scorer: of completions.
        most_sampled: rows that the model is asked about, drawn without meaning; at least 1.
    """
    checks = checks or DataChecks()
    profile = _profile(prompts, None, checks.category_column)
    if sampler is None or not prompts:
        return profile
    order = np.random.default_rng(0).permutation(len(prompts))[:most_sampled]
    asked = [prompts[place] for place in sorted(order.tolist())]
    samples = sample_rows(asked, sampler=sampler, scorer=scorer, consensus=checks.consensus)
    return replace(
        profile,
        pass_rates=tuple(row.pass_rate for row in samples.rows),
        num_agreed=samples.num_agreed,
        num_disputed=samples.num_disputed,
    )


def _check_repetitions(batch: _Batch, earlier: Sequence[Prompt]) -> None:
    """Reject later rows that repeat one, and all rows of a text with several answers."""
    index = TextIndex(least_overlap=batch.checks.near_overlap)
    of_key: dict[str, CheckedRow] = {}
    for place, prompt in enumerate(earlier):
        index.add(f"earlier {place}", problem(prompt), answers_of(prompt))
    if not earlier:
        batch.not_checked.append("repetition of earlier rows: no earlier data are given")
    for one, prompt in batch.sound():
        key = f"row {one.place}"
        found = index.add(key, problem(prompt), answers_of(prompt))
        if found is None:
            of_key[key] = one
            continue
        first = of_key.get(found.key)
        where = found.key if first is not None else "an earlier row"
        if found.kind == "contradiction":
            one.reject("contradiction", f"the problem of {where} with another answer")
            # Which of the two is right cannot be told, so neither is trained on.
            if first is not None and first.is_sound:
                first.reject("contradiction", f"the problem of {key} with another answer")
        elif found.kind == "exact":
            one.reject("duplicate", f"repeats {where}")
        else:
            one.reject("near_duplicate", f"{100 * found.overlap:.0f} % of {where}")


def _check_suites(batch: _Batch, suites: Sequence[SuiteItems]) -> None:
    if not suites:
        batch.not_checked.append("contamination: no suite is given")
        return
    of_place = {str(one.place): one for one, _ in batch.readable()}
    held = items_in_rows(
        [(suite.name, suite.title, suite.prompts) for suite in suites],
        (
            TrainingText(id=place, text="\n".join(row_texts(one.row)))
            for place, one in of_place.items()
        ),
    )
    for place, item in held.items():
        if item.coverage > batch.checks.contamination:
            of_place[place].reject(
                "contamination",
                f"{100 * item.coverage:.0f} % of item {item.item_id} of {item.suite}: "
                f'"{item.excerpt}"',
            )


def _check_pii(batch: _Batch) -> None:
    for one in batch.rows:
        found = [find for text in row_texts(one.row) for find in find_pii(text, batch.checks.pii)]
        for find in dict.fromkeys(found):
            one.reject("pii", f"{find.kind} {find.excerpt}")


def _check_answers(batch: _Batch, scorer: Scorer | None) -> None:
    """Reject rows of which a completion with the reference answer does not earn the reward."""
    limit = batch.checks.longest_answer
    with Grader() as grader:
        for one, prompt in batch.readable():
            longest = max(len(answer.split()) for answer in answers_of(prompt))
            if longest > limit and prompt.columns.get("grading") is None:
                one.reject("unverifiable", f"an answer has {longest} words, over {limit}")
                continue
            gold = gold_completion(prompt)
            try:
                is_right = (
                    grader.grade_item(gold, prompt.columns).is_correct
                    if scorer is None
                    else scorer(gold, prompt)
                )
            except DataError as error:
                one.reject("unverifiable", str(error))
                continue
            if not is_right:
                one.reject("unverifiable", "a completion that gives the answer itself is not right")


def _check_samples(batch: _Batch) -> None:
    if batch.samples is None:
        return
    checks = batch.checks
    asked = [one for one, _ in batch.sound()]
    for one, sampled in zip(asked, batch.samples.rows, strict=True):
        share = f"{sampled.num_right} of {sampled.num_samples} samples are right"
        if sampled.is_disputed and checks.reject_disputed:
            one.reject("disputed", f"{share}, and most agree on {sampled.agreed!r}")
        if sampled.num_right == 0 and checks.reject_never_solved:
            one.reject("never_solved", share)
        if sampled.num_right == sampled.num_samples and checks.reject_always_solved:
            one.reject("always_solved", share)


def _profile(asked: Sequence[Prompt], samples: Samples | None, category_column: str) -> DataProfile:
    categories = [prompt.columns.get(category_column) for prompt in asked]
    return DataProfile(
        lengths=tuple(len(problem(prompt).split()) for prompt in asked),
        scripts=tuple(main_script(problem(prompt)) for prompt in asked),
        categories=tuple(None if value is None else str(value) for value in categories),
        pass_rates=() if samples is None else tuple(row.pass_rate for row in samples.rows),
        num_agreed=0 if samples is None else samples.num_agreed,
        num_disputed=0 if samples is None else samples.num_disputed,
    )


def _report(batch: _Batch, profile: DataProfile, earlier: DataProfile | None) -> BatchReport:
    checks = batch.checks
    shift: tuple[ShiftFigure, ...] = ()
    disputes: DisputeTest | None = None
    if earlier is None:
        batch.not_checked.append("shift: no profile of earlier data is given")
    else:
        shift = measure_shift(profile, earlier, alpha=checks.alpha, least_psi=checks.least_shift)
        disputes = dispute_test(profile, earlier, alpha=checks.alpha)
    if disputes is None and batch.samples is not None:
        batch.not_checked.append(
            "poisoning of the whole batch: the samples agree on no row of it or of earlier data"
        )
    rejected = [one for one in batch.rows if one.reasons]
    by_check = Counter(name for one in rejected for name in {r.check for r in one.reasons})
    counts: dict[str, int] = {
        "rows": len(batch.rows),
        "accepted": len(batch.rows) - len(rejected),
        "rejected": len(rejected),
        **{name: by_check[name] for name in sorted(by_check)},
    }
    return BatchReport(
        accepted=tuple(
            one.row for one in batch.rows if not one.reasons and isinstance(one.row, Mapping)
        ),
        rejected=tuple(
            RejectedRow(place=one.place, row=one.row, reasons=tuple(one.reasons))
            for one in rejected
        ),
        counts=counts,
        refusals=_refusals(counts, checks, shift, disputes),
        shift=shift,
        disputes=disputes,
        profile=profile,
        not_checked=tuple(batch.not_checked),
    )


def _refusals(
    counts: Mapping[str, int],
    checks: DataChecks,
    shift: Sequence[ShiftFigure],
    disputes: DisputeTest | None,
) -> dict[str, str]:
    refusals: dict[str, str] = {}
    if not counts["accepted"]:
        refusals["no_row_left"] = "no row is left; look at the reasons of the rejected ones"
    elif counts["rejected"] > checks.most_rejected * counts["rows"]:
        refusals["too_many_rejected"] = (
            f"more than {100 * checks.most_rejected:g} % of the rows are rejected"
        )
    if disputes is not None and disputes.is_alarm:
        refusals["poisoned"] = (
            f"the answers look poisoned: samples that agree dispute {disputes.num_disputed} of "
            f"{disputes.num_agreed} answers, of earlier data {disputes.earlier_disputed} of "
            f"{disputes.earlier_agreed} (p = {disputes.p_value:.2g})"
        )
    moved = [figure.sentence for figure in shift if figure.is_alarm]
    if moved and checks.refuse_shift:
        refusals["shift"] = f"it differs from earlier data: {'; '.join(moved)}"
    return refusals


def row_texts(value: object) -> Iterator[str]:
    """Every text in a row, chats and lists included; a line that is no row is one text."""
    if isinstance(value, Unreadable):
        yield value.text
    elif isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from row_texts(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from row_texts(part)
