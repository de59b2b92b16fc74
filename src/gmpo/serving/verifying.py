"""Whether an answer is right: graded by what its request brings, or by a task's own scorer.

A request says in its `metadata` what its answer is graded by: a `reference`, an `item` of the task,
or `numbers` and `target` of a countdown. Nothing else of it is looked at: the record by which a
scorer of reasoning-gym finds its item is a pickle, so it comes from the task and never from a
client.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from gmpo.errors import ConfigError, GmpoError
from gmpo.grading import Grader
from gmpo.recipe import load_recipe
from gmpo.serving.backend import GenerationRequest
from gmpo.serving.quality import FinishedChoice
from gmpo.task_config import GivenTask
from gmpo.task_table import build_task

__all__ = ["AnswerVerifier", "GradedTask", "graded_task"]

_FIELDS = ("reference", "item", "numbers", "target")
"""Of a request's metadata; without a task the first one alone."""
_MOST_DIGITS = 18


@dataclass(frozen=True, kw_only=True)
class GradedTask:
    """A task whose own scorer says of a single answer whether it is right.

    Attributes:
        kind: as in a recipe's `[task]` table.
        items: what each item is graded by, by the item's id.
        time_limit_seconds: for one answer.
    """

    kind: str
    items: Mapping[str, Mapping[str, Any]]
    time_limit_seconds: float


def graded_task(source: str) -> GradedTask:
    """The task of a recipe, for grading.

    Args:
        source: a run folder, or a recipe by file or bundled name.

    Raises:
        ConfigError: there is no such recipe, or no single answer to its task can be graded.
        DataError: the task's items cannot be made or read.
    """
    own = Path(source) / "recipe.toml"
    recipe = load_recipe(own if own.is_file() else source)
    if isinstance(recipe.task, GivenTask) or recipe.evaluation.measure == "reward":
        why = (
            "its items were handed over in Python and are not in the recipe"
            if isinstance(recipe.task, GivenTask)
            else "it measures by its reward functions (evaluation.measure = 'reward')"
        )
        raise ConfigError(
            f"task of {source}: {why}, so no scorer grades a single answer; name another recipe, "
            "or leave the task out and grade by metadata.reference with quality.verify = true"
        )
    task = build_task(recipe.task)
    return GradedTask(
        kind=recipe.task.kind,
        items={prompt.id: prompt.columns for prompt in (*task.train, *task.held_out)},
        time_limit_seconds=recipe.reward.timeout_seconds,
    )


class AnswerVerifier:
    """Grades answers on a thread of its own; holds the grader's processes.

    Args:
        task: whose scorer grades; None compares with references alone.
        counts: gets completions that were `verified`, and what was `not_verified`: completions
            whose grading failed, and requests that bring nothing by which they could be graded
            although they name some of it.
    """

    def __init__(self, task: GradedTask | None, counts: Counter[str]) -> None:
        self._task = task
        self._counts = counts
        self._grader = (
            Grader() if task is None else Grader(time_limit_seconds=task.time_limit_seconds)
        )
        # One comparison at a time; a long one must not hold up the event loop.
        self._grading = ThreadPoolExecutor(max_workers=1, thread_name_prefix="gmpo-grading")

    async def verified(
        self, request: GenerationRequest, choices: Sequence[FinishedChoice]
    ) -> list[FinishedChoice]:
        """The completions with their verdicts, as far as there are any."""
        metadata: Mapping[str, Any] = request.body.get("metadata") or {}
        fields = _FIELDS[:1] if self._task is None else _FIELDS
        if all(metadata.get(name) is None for name in fields):
            return list(choices)
        columns = _columns(metadata, self._task)
        if columns is None:
            self._counts["not_verified"] += 1
            return list(choices)
        return [await self._graded(choice, columns) for choice in choices]

    def close(self) -> None:
        """End what grades."""
        self._grading.shutdown()
        self._grader.close()

    async def _graded(self, choice: FinishedChoice, columns: Mapping[str, Any]) -> FinishedChoice:
        grade = partial(self._grader.grade_item, choice.text, columns)
        try:
            verdict = await asyncio.get_running_loop().run_in_executor(self._grading, grade)
        except GmpoError:
            self._counts["not_verified"] += 1
            return choice
        if verdict.status == "timeout":
            self._counts["not_verified"] += 1
            return choice
        self._counts["verified"] += 1
        return replace(choice, verified=verdict.is_correct)


def _columns(metadata: Mapping[str, Any], task: GradedTask | None) -> Mapping[str, Any] | None:
    """What an answer is graded by, as a task's prompts have it; None where that is not there."""
    item = metadata.get("item")
    if task is not None and item is not None:
        return task.items.get(item) if isinstance(item, str) else None
    if task is not None and task.kind == "countdown":
        numbers, target = _whole_numbers(metadata.get("numbers")), _whole(metadata.get("target"))
        if not numbers or target is None:
            return None
        return {"grading": "countdown", "numbers": numbers, "target": target}
    if task is not None and task.kind == "gym":
        return None  # its scorers know items only
    reference = metadata.get("reference")  # a text that is not blank, or the request was refused
    return None if reference is None else {"answer": reference}


def _whole_numbers(told: object) -> list[int] | None:
    """Of a list, or of a text such as "3, 5, 7": OpenAI's metadata holds texts."""
    parts = told.replace(",", " ").split() if isinstance(told, str) else told
    if not isinstance(parts, list):
        return None
    numbers = [_whole(part) for part in parts]
    known = [number for number in numbers if number is not None]
    return known if len(known) == len(numbers) else None


def _whole(told: object) -> int | None:
    """A whole number from 0 on, of few digits, whether it is told as a number or as a text."""
    if isinstance(told, bool) or not isinstance(told, int | str):
        return None
    # A number that is too long even to be printed is not made a text to count its digits.
    if isinstance(told, int):
        return told if 0 <= told < 10**_MOST_DIGITS else None
    is_whole = told.isascii() and told.isdigit() and len(told) <= _MOST_DIGITS
    return int(told) if is_whole else None
