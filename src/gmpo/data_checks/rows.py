"""Rows of a batch held against the form that training reads, each by itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gmpo.errors import DataError
from gmpo.records import Prompt
from gmpo.tasks import RowForm
from gmpo.tasks.rows import Row, read_rows

__all__ = [
    "CheckedRow",
    "Reason",
    "ReasonCheck",
    "Unreadable",
    "answers_of",
    "check_form",
    "problem",
]

ReasonCheck = Literal[
    "schema",
    "duplicate",
    "near_duplicate",
    "contradiction",
    "contamination",
    "pii",
    "unverifiable",
    "never_solved",
    "always_solved",
    "disputed",
]
"""Checks by which a row is rejected."""


@dataclass(frozen=True, kw_only=True)
class Reason:
    """Why a row is rejected: the check, and what it found."""

    check: ReasonCheck
    detail: str


@dataclass(frozen=True, kw_only=True)
class Unreadable:
    """A line that is no row; `problem` says why."""

    text: str
    problem: str


@dataclass(kw_only=True)
class CheckedRow:
    """A row on its way through the checks.

    Attributes:
        place: which of the batch, from 1.
        row: as it was given.
        prompt: as training would read it; None where it cannot.
        reasons: against it, so far.
    """

    place: int
    row: Mapping[str, Any] | Unreadable
    prompt: Prompt | None
    reasons: list[Reason]

    @property
    def is_sound(self) -> bool:
        """Whether nothing speaks against it yet."""
        return not self.reasons

    def reject(self, check: ReasonCheck, detail: str) -> None:
        """Add a reason."""
        self.reasons.append(Reason(check=check, detail=detail))


class _Columns(BaseModel):
    """Types of the columns that this package reads beside problem and answer."""

    model_config = ConfigDict(extra="allow", strict=True)

    grading: Literal["countdown", "gym"] | None = None
    numbers: list[int] | None = Field(default=None, min_length=1)
    target: int | None = None
    gym: dict[str, Any] | None = None
    gym_entry: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _has_what_its_grading_reads(self) -> Self:
        needed = {"countdown": ("numbers", "target"), "gym": ("gym", "gym_entry")}
        missing = [
            name for name in needed.get(self.grading or "", ()) if self.__dict__[name] is None
        ]
        if missing:
            raise ValueError(f"grading is {self.grading!r}, which needs {' and '.join(missing)}")
        return self


def check_form(
    rows: Sequence[Mapping[str, Any] | Unreadable], *, longest_problem: int
) -> list[CheckedRow]:
    """Each row as training would read it, or why it cannot be read.

    A row needs a problem (`prompt`, a text or a chat that ends in a user turn, or `problem`, a
    text) and an answer (`answer` or `answers`). Ids must differ, and all problems be texts or all
    chats; where they are not, those of the rarer kind are rejected. No problem may have a
    character that rendering a chat drops.

    Args:
        rows: as they came.
        longest_problem: characters of all turns together.
    """
    checked = [_checked(place, row) for place, row in enumerate(rows, start=1)]
    kinds = Counter(_kind(one) for one in checked if one.prompt is not None)
    usual = kinds.most_common(1)[0][0] if kinds else None
    place_of_id: dict[str, int] = {}
    for one in checked:
        if one.prompt is None:
            continue
        if _kind(one) != usual:
            one.reject("schema", f"the problem is {_kind(one)}, and most of the batch is {usual}")
        earlier = place_of_id.setdefault(one.prompt.id, one.place)
        if earlier != one.place:
            one.reject("schema", f"id {one.prompt.id!r} is that of row {earlier} too")
        length = len(problem(one.prompt))
        if length > longest_problem:
            one.reject("schema", f"the problem has {length} characters, over {longest_problem}")
    return checked


def problem(prompt: Prompt) -> str:
    """The text of all turns."""
    return "\n".join(message.content for message in prompt.messages or ()) or prompt.text or ""


def answers_of(prompt: Prompt) -> tuple[str, ...]:
    """All accepted answers; the first is `answer` where there is one."""
    columns = prompt.columns
    return tuple(dict.fromkeys((columns["answer"], *(columns.get("answers") or ()))))


def _checked(place: int, row: Mapping[str, Any] | Unreadable) -> CheckedRow:
    one = CheckedRow(place=place, row=row, prompt=None, reasons=[])
    if isinstance(row, Unreadable):
        one.reject("schema", row.problem)
        return one
    try:
        _Columns.model_validate(dict(row))
        read = read_rows(
            [Row(f"row {place}", f"row-{place}", row)],
            RowForm(is_of_recipe=False),
            source="the batch",
        )
    except ValidationError as error:
        for fault in error.errors():
            name = ".".join(map(str, fault["loc"]))
            said = fault["msg"].removeprefix("Value error, ")
            one.reject("schema", f"{name}: {said}" if name else said)
    except DataError as error:
        one.reject("schema", str(error).removeprefix(f"row {place}: "))
    else:
        one.prompt = read.prompts[0]
    return one


def _kind(one: CheckedRow) -> str:
    assert isinstance(one.row, Mapping)
    # `prompt` is read before `problem`, which is always a text.
    return "a chat" if isinstance(one.row.get("prompt"), list) else "a text"
