"""From a recipe's `[task]` table to the task."""

from __future__ import annotations

from typing import Any

from gmpo.errors import DataError
from gmpo.task_config import (
    ArithmeticTask,
    BundledTask,
    CountdownTask,
    DatasetTask,
    GivenTask,
    GymTask,
    JsonlTask,
    TaskConfig,
)
from gmpo.tasks import (
    RowForm,
    Task,
    arithmetic_task,
    bundled_task,
    countdown_task,
    dataset_task,
    gym_task,
    jsonl_task,
)

__all__ = ["build_task"]


def build_task(config: TaskConfig) -> Task:
    """The task of a recipe's `[task]` table.

    Raises:
        DataError: it is empty or its rows are not usable.
    """
    if isinstance(config, GivenTask):
        raise DataError(
            f"this recipe's {config.train_items} training items were handed over in Python and are "
            "not in it; run the script that made it, with resume=True to go on with its run"
        )
    arguments = config.model_dump(exclude={"kind"})
    if isinstance(config, ArithmeticTask):
        task = arithmetic_task(**arguments)
    elif isinstance(config, CountdownTask):
        task = countdown_task(**arguments)
    elif isinstance(config, GymTask):
        task = gym_task(**arguments)
    elif isinstance(config, JsonlTask):
        task = jsonl_task(
            path=config.path,
            held_out_path=config.held_out_path,
            **_row_arguments(config, has_held_out_side=config.held_out_path is not None),
        )
    elif isinstance(config, DatasetTask):
        task = dataset_task(
            name=config.name,
            config_name=config.config_name,
            revision=config.revision,
            split=config.split,
            held_out_split=config.held_out_split,
            **_row_arguments(config, has_held_out_side=config.held_out_split is not None),
        )
    else:
        assert isinstance(config, BundledTask)
        task = bundled_task(name=config.kind, **arguments)
    if not task.train or not task.held_out:
        raise DataError(
            f"task {task.name!r} has {len(task.train)} training and {len(task.held_out)} held-out "
            "items; both sides need at least one"
        )
    return task


def _row_arguments(config: JsonlTask | DatasetTask, *, has_held_out_side: bool) -> dict[str, Any]:
    """What tasks made of rows have in common."""
    held_out_items = config.held_out_items
    if held_out_items is None:
        held_out_items = 0 if has_held_out_side else 500
    form = RowForm(
        prompt_column=config.prompt_column,
        answer_column=config.answer_column,
        id_column=config.id_column,
        keep_columns=config.keep_columns,
        answer_is_marked=config.answer_marked,
        where=config.where,
        unusable=config.unusable_rows,
    )
    return {
        "held_out_items": held_out_items,
        "split_seed": config.split_seed,
        "instruction": config.instruction,
        "form": form,
        "held_out_where": config.held_out_where,
    }
