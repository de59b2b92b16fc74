"""Rows of a data set turned into prompts: which columns they need, which rows count."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, NoReturn, cast

from gmpo.errors import DataError
from gmpo.grading.answers import marked_answer
from gmpo.records import Message, Prompt, control_token_marker

__all__ = ["FILTERED", "UNUSABLE", "ReadRows", "Row", "RowForm", "absent_column", "read_rows"]

FILTERED = "rows that `where` does not want"
UNUSABLE = "rows without a usable problem or answer"


class Row(NamedTuple):
    """One row as it was read: its place for messages, the id it has without one, its columns."""

    place: str
    default_id: str
    columns: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class RowForm:
    """What a row's columns mean, and which rows count.

    Attributes:
        prompt_column: holds the problem, a text or a chat (a list of `{"role", "content"}` that
            ends in a user turn); None is "prompt", or else "problem", which is a text.
        answer_column: holds the reference: a text, a number, or a list of accepted forms. None is
            "answer" (a text or a number), "answers" (a list), or both.
        id_column: holds the id, a text or whole number; None is "id" where a row has it.
        keep_columns: which other columns go to the prompt's columns; None is all of them.
        answer_is_marked: the answer is the one that a worked solution marks: in `\\boxed{}` or
            `<answer>`, after `####` or "answer is".
        needs_answer: whether a row without an answer is unusable; if not, its columns stay as they
            are.
        where: a row counts only if each of these columns has one of the values named for it.
        unusable: what is done with a row that has no usable problem or answer.
        is_of_recipe: whether messages may name a recipe's keys as the remedy.
    """

    prompt_column: str | None = None
    answer_column: str | None = None
    id_column: str | None = None
    keep_columns: tuple[str, ...] | None = None
    answer_is_marked: bool = False
    needs_answer: bool = True
    where: Mapping[str, Sequence[str | int | float | bool]] = field(default_factory=dict)
    unusable: Literal["refuse", "drop"] = "refuse"
    is_of_recipe: bool = True

    def needed_columns(self, there: Sequence[str]) -> list[str]:
        """Which of a data set's columns have to be read.

        Raises:
            DataError: a column that was named is not there, or none holds the problem or answer.
        """
        named = [self.prompt_column, self.answer_column, self.id_column]
        wanted = [name for name in named if name] + [*self.where, *(self.keep_columns or ())]
        for name in wanted:
            if name not in there:
                raise DataError(absent_column(name, there))
        _problem_column(self, there)
        if self.answer_column is None and not {"answer", "answers"} & set(there):
            raise DataError(
                f"neither 'answer' nor 'answers' is a column; there are {sorted(there)}; say with "
                "answer_column which one holds the reference answer"
            )
        if self.keep_columns is None:
            return list(there)
        usual = {"id", "prompt", "problem", "answer", "answers"}
        return [name for name in there if name in wanted or name in usual]


@dataclass(frozen=True, kw_only=True)
class ReadRows:
    """The prompts of a data set, and how many rows were left out, by reason."""

    prompts: list[Prompt]
    left_out: Mapping[str, int]


class _UnusableRow(DataError):
    """The row has no usable problem or answer; all else about it may be right."""


def read_rows(rows: Iterable[Row], form: RowForm, *, source: str, id_prefix: str = "") -> ReadRows:
    """The prompts that rows hold, one row in memory at a time beside them.

    A prompt's columns are the row's columns but those of problem and id, with `answer`, a text,
    and `answers`, a tuple of them where several forms are accepted. Numbers become texts, and
    142.0 is "142".

    Args:
        rows: consumed once.
        form: what the columns mean.
        source: the data set's name in messages.
        id_prefix: put before every id.

    Raises:
        DataError: a row is not usable, an id is repeated, some prompts are chats and others texts,
            or no row is left.
    """
    prompts: list[Prompt] = []
    left_out: Counter[str] = Counter()
    place_of_id: dict[str, str] = {}
    first: tuple[str, str] | None = None
    reasons: list[str] = []
    others: dict[str, set[str]] = {name: set() for name in form.where}
    for row in rows:
        if not _is_wanted(row, form, others):
            left_out[FILTERED] += 1
            continue
        try:
            prompt, kind = _prompt(row, form, id_prefix)
        except _UnusableRow as error:
            if form.unusable == "refuse":
                drop = ", counted, with unusable_rows = 'drop'"
                leave = f"such rows out{drop}" if form.is_of_recipe else "it out"
                raise DataError(f"{error}; complete the row, or leave {leave}") from None
            left_out[UNUSABLE] += 1
            reasons.append(str(error))
            continue
        first = first or (kind, row.place)
        if kind != first[0]:
            _refuse(
                row.place,
                f"the prompt is {kind}, but at {first[1]} it is {first[0]}; make all prompts of a "
                "data set texts, or all chats",
            )
        if prompt.id in place_of_id:
            earlier = place_of_id[prompt.id]
            _refuse(row.place, f"id {prompt.id!r} was used by {earlier}; make the ids differ")
        place_of_id[prompt.id] = row.place
        prompts.append(prompt)
    if not prompts:
        raise DataError(_nothing_left(source, left_out, reasons, others))
    return ReadRows(prompts=prompts, left_out=left_out)


def absent_column(name: str, there: Collection[str]) -> str:
    """The message about a column that is not there, with the nearest name that is."""
    near = difflib.get_close_matches(name, there, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return f"there is no column {name!r}{hint} there are {sorted(there)}"


def _nothing_left(
    source: str, left_out: Mapping[str, int], reasons: list[str], others: dict[str, set[str]]
) -> str:
    if not left_out:
        return f"{source} holds no row; it needs at least one"
    counts = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
    hints = [f"the first: {reasons[0]}"] if reasons else []
    hints += [f"{name!r} has {', '.join(sorted(seen))}" for name, seen in others.items() if seen]
    return f"{source} has no row left ({counts}); {'; '.join(hints)}"


def _is_wanted(row: Row, form: RowForm, others: dict[str, set[str]]) -> bool:
    """Whether `where` wants the row; notes a few values that it does not want."""
    for name, wanted in form.where.items():
        if name not in row.columns:
            _refuse(row.place, f"{absent_column(name, row.columns)}; `where` asks for it")
        value = row.columns[name]
        if value not in wanted:
            if len(others[name]) < 10:
                others[name].add(_shown(value))
            return False
    return True


def _prompt(row: Row, form: RowForm, id_prefix: str) -> tuple[Prompt, str]:
    columns = dict(row.columns)
    id_column = form.id_column or "id"
    if form.id_column and form.id_column not in columns:
        _refuse(row.place, absent_column(form.id_column, columns))
    identity = columns.pop(id_column, row.default_id)
    if not isinstance(identity, str | int) or isinstance(identity, bool) or identity == "":
        _refuse(row.place, f"id is {_shown(identity)}; it must be a text or a whole number")
    try:
        problem_column = _problem_column(form, columns)
    except DataError as error:
        _refuse(row.place, str(error))
    problem = columns.pop(problem_column)
    messages = _messages(problem, row.place, problem_column)
    answers = _answers(columns, form, row.place) if form.needs_answer else {}
    if form.keep_columns is not None:
        columns = {name: value for name, value in columns.items() if name in form.keep_columns}
    _refuse_second_answer(columns, form, row.place)
    prompt = Prompt(id=f"{id_prefix}{identity}", messages=messages, columns={**columns, **answers})
    return prompt, "a text" if isinstance(problem, str) else "a chat"


def _problem_column(form: RowForm, there: Collection[str]) -> str:
    if form.prompt_column:
        if form.prompt_column not in there:
            raise DataError(absent_column(form.prompt_column, there))
        return form.prompt_column
    for name in ("prompt", "problem"):
        if name in there:
            return name
    remedy = (
        "say with prompt_column which one holds the problem"
        if form.is_of_recipe
        else "rename the column that holds the problem"
    )
    raise DataError(f"neither 'prompt' nor 'problem' is there, only {sorted(there)}; {remedy}")


def _messages(value: object, place: str, column: str) -> tuple[Message, ...]:
    turns = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(turns, list) or not turns or (column == "problem" and turns is value):
        allowed = "a text" if column == "problem" else "a text or a list of chat turns"
        _unusable(place, f"{column} is {_shown(value)}; it must be {allowed}")
    messages = tuple(_message(turn, place) for turn in turns)
    if messages[-1].role != "user":
        _unusable(
            place, f"the chat ends in the turn of {messages[-1].role!r}; it must end in 'user'"
        )
    return messages


def _message(turn: object, place: str) -> Message:
    fields = cast(dict[str, object], turn) if isinstance(turn, dict) else {}
    role, content = fields.get("role"), fields.get("content")
    if not isinstance(content, str) or not content.strip():
        _unusable(
            place, f"a turn or problem is {_shown(content)}; it must be a text with characters"
        )
    extra = [n for n, value in fields.items() if n not in ("role", "content") and value is not None]
    if extra:
        _unusable(place, f"a turn has {extra} beside role and content, which a chat cannot show")
    if control_token_marker(content):
        _unusable(
            place, "U+F0000 or U+F0001 is in a turn or problem, which rendering a chat would drop"
        )
    if role == "system" or role == "user" or role == "assistant":
        return Message(role=role, content=content)
    _unusable(place, f"a turn has role {role!r}; it must be 'system', 'user' or 'assistant'")


def _answers(columns: Mapping[str, Any], form: RowForm, place: str) -> dict[str, Any]:
    """`answer`, and `answers` where several forms are accepted."""
    if form.answer_column:
        given = columns.get(form.answer_column)
        accepted = given if isinstance(given, list) else None
        single = None if isinstance(given, list) else given
    else:
        accepted, single = columns.get("answers"), columns.get("answer")
    forms: list[str] = []
    if accepted is not None:
        if not isinstance(accepted, list) or not accepted:
            _unusable(place, f"answers is {_shown(accepted)}; it must be a list of one or more")
        forms = [_answer_text(value, form, place) for value in accepted]
    has_single = not forms or (form.answer_column is None and "answer" in columns)
    answer = _answer_text(single, form, place) if has_single else forms[0]
    return {"answer": answer, **({"answers": tuple(forms)} if forms else {})}


def _answer_text(value: object, form: RowForm, place: str) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        state = "missing" if value is None else _shown(value)
        _unusable(place, f"answer is {state}; it must be a text or a number")
    if not form.answer_is_marked:
        return value
    marked = marked_answer(value)
    if not marked:
        _unusable(
            place,
            f"the answer {_shown(value)} marks none as final; with answer_marked it must have "
            r"\boxed{}, <answer>, #### or 'answer is'",
        )
    return marked


def _refuse_second_answer(columns: Mapping[str, Any], form: RowForm, place: str) -> None:
    """A column that grading would take for the reference, beside the one that is."""
    if form.answer_column:
        for name in {"answer", "answers"} - {form.answer_column}:
            if name in columns:
                _refuse(
                    place,
                    f"there is a column {name!r} beside answer_column = {form.answer_column!r}, "
                    "and grading reads both; leave it out with keep_columns",
                )


def _refuse(place: str, problem: str) -> NoReturn:
    raise DataError(f"{place}: {problem}")


def _unusable(place: str, problem: str) -> NoReturn:
    raise _UnusableRow(f"{place}: {problem}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
