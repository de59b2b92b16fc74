"""Rows that a Python caller hands over, as the task of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from gmpo.errors import DataError
from gmpo.tasks import Task
from gmpo.tasks.rows import ReadRows, Row, RowForm, read_rows
from gmpo.tasks.splits import Sides, sides_of_rows

__all__ = ["Rows", "prompts_of_rows", "task_of_rows", "task_record"]

Rows = Iterable[Mapping[str, Any]]
"""A `datasets.Dataset`, a list of dicts, or anything that yields dicts and ends."""


def task_of_rows(
    train_rows: Rows, eval_rows: Rows | None, *, needs_answer: bool, needs_eval_answer: bool
) -> Task:
    """The rows as a task; problems that are held out are left out of training, counted."""
    train_side = prompts_of_rows(train_rows, "train_dataset", needs_answer=needs_answer)
    if eval_rows is None:
        sides = Sides(train=train_side.prompts, held_out=[], left_out=train_side.left_out)
    else:
        sides = sides_of_rows(
            train_side,
            prompts_of_rows(eval_rows, "eval_dataset", needs_answer=needs_eval_answer),
            held_out_items=0,
            split_seed=0,
            names=("train_dataset", "eval_dataset"),
            drops_shared=True,
        )
    return Task(
        name="given",
        train=tuple(sides.train),
        held_out=tuple(sides.held_out),
        instruction="",
        left_out=sides.left_out,
    )


def prompts_of_rows(rows: Rows, source: str, *, needs_answer: bool) -> ReadRows:
    """The rows' prompts; a `prompt` that is a text goes to the model as it is."""
    if isinstance(rows, str | Mapping) or not isinstance(rows, Iterable):
        raise DataError(
            f"{source} is a {type(rows).__name__}; it must yield rows: a list of dicts, or a "
            "datasets.Dataset (of a DatasetDict, one split of it)"
        )
    texts: list[str | None] = []

    def placed() -> Iterator[Row]:
        for number, row in enumerate(rows):
            place = f"{source}[{number}]"
            if not isinstance(row, Mapping):
                raise DataError(f"{place} is {type(row).__name__}; a row must be a mapping")
            prompt = row.get("prompt")
            texts.append(prompt if isinstance(prompt, str) else None)
            yield Row(place=place, default_id=f"{source}-{number}", columns=row)

    form = RowForm(needs_answer=needs_answer, is_of_recipe=False)
    read = read_rows(placed(), form, source=source)
    prompts = [
        prompt if text is None else replace(prompt, messages=None, text=text)
        for prompt, text in zip(read.prompts, texts, strict=True)
    ]
    return replace(read, prompts=prompts)


def task_record(task: Task) -> dict[str, Any]:
    """What the recipe records of items that are not in it."""
    items = [[(p.id, p.messages, p.text) for p in side] for side in (task.train, task.held_out)]
    return {
        "kind": "given",
        "train_items": len(task.train),
        "held_out_items": len(task.held_out),
        "digest": hashlib.blake2b(repr(items).encode(), digest_size=8).hexdigest(),
    }
