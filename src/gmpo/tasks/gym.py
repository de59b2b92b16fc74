"""Tasks of reasoning-gym by name: procedural items that their own scorer judges."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from gmpo.errors import DataError
from gmpo.grading.gym import GymItem, GymProcess, GymSpec
from gmpo.records import Message, Prompt
from gmpo.tasks.splits import Sides, normalized_text, split_by_text
from gmpo.tasks.task import Task, task_of_sides

__all__ = ["gym_task"]

_DRAWS_PER_ITEM = 10
_UNREACHABLE = "items whose scorer does not give its own answer 1.0"


def gym_task(
    *,
    name: str,
    options: Mapping[str, Any] | None = None,
    train_items: int = 2000,
    held_out_items: int = 500,
    split_seed: int = 0,
    instruction: str = "",
) -> Task:
    """Items of one of reasoning-gym's tasks, no question on both sides.

    An answer is right if the task's own scorer gives exactly 1.0 to what was extracted from the
    completion. Columns: `answer`, and `grading` = "gym" with `gym` and `gym_entry`, by which the
    scorer finds the item again.

    Items are drawn until there are enough different questions, case and white space ignored. A
    repeated question is skipped. An item whose own answer does not get 1.0 is left out and
    counted. A task is refused if it has no reference answers, or if its scorer gives 1.0 to a
    meaningless one.

    Args:
        name: as in `reasoning_gym.create_dataset`.
        options: its other arguments, but seed and size, which are ours.
        train_items: training prompts, at least 1.
        held_out_items: held-out prompts, 0 or more.
        split_seed: decides which items are drawn, and which of them are held out.
        instruction: put on a line of its own after each question; may be empty.

    Raises:
        DataError: the library is not installed, there is no such task or option, too few different
            questions were found, or the task cannot be graded.
    """
    if find_spec("reasoning_gym") is None:
        raise DataError("task.kind = 'gym' needs reasoning-gym; pip install 'gmpo[gym]'")
    if held_out_items < 0 or train_items < 1:
        raise DataError(
            f"held_out_items is {held_out_items} and train_items {train_items}; "
            "they must be at least 0 and 1"
        )
    wanted = held_out_items + train_items
    spec = GymSpec(
        name=name, options=dict(options or {}), seed=split_seed, size=_DRAWS_PER_ITEM * wanted
    )
    prompts, left_out = _draw(spec, wanted)
    train, held_out = split_by_text(
        prompts, held_out_items=held_out_items, split_seed=split_seed, may_take_all=False
    )
    sides = Sides(train=train, held_out=held_out, left_out=left_out)
    return task_of_sides(name, sides, instruction=instruction)


def _draw(spec: GymSpec, wanted: int) -> tuple[list[Prompt], Counter[str]]:
    """Prompts of different questions, and how many items were left out."""
    found: dict[str, Prompt] = {}
    left_out: Counter[str] = Counter()
    where = vars(spec)  # one mapping for all prompts
    with GymProcess() as gym:
        for index in range(spec.size):
            if len(found) == wanted:
                break
            item = gym.item(spec, index)
            question = normalized_text(item.question)
            if question in found:
                continue
            _refuse_ungradable(spec.name, index, item)
            if item.reference_score != 1.0:
                left_out[_UNREACHABLE] += 1
                continue
            found[question] = _prompt(item, where)
    if len(found) < wanted:
        raise DataError(
            f"{spec.size} draws of {spec.name!r} gave {len(found)} usable different questions, but "
            f"held_out_items and train_items need {wanted}; lower them, or widen task.options"
        )
    return list(found.values()), left_out


def _refuse_ungradable(name: str, index: int, item: GymItem) -> None:
    if item.answer is None:
        raise DataError(
            f"item {index} of {name!r} has no reference answer, so neither its scorer can be "
            "checked nor an example shown; choose another task"
        )
    if item.nonsense_score == 1.0:
        raise DataError(
            f"the scorer of {name!r} gives a meaningless answer to item {index} 1.0, so any text "
            "would be rewarded; choose another task"
        )


def _prompt(item: GymItem, where: Mapping[str, Any]) -> Prompt:
    # Named by its question: what a run has saved of an item can only be used with the same one.
    name = hashlib.sha256(item.question.encode()).hexdigest()[:12]
    return Prompt(
        id=f"{where['name']}-{name}",
        messages=(Message(role="user", content=item.question),),
        columns={
            "answer": item.answer,
            "grading": "gym",
            "gym": where,
            "gym_entry": item.entry,
        },
    )
