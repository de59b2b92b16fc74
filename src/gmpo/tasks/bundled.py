"""The data sets that come with the package: SVAMP and GSM8K."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from importlib.resources import files

from gmpo.errors import DataError
from gmpo.records import Prompt
from gmpo.tasks.jsonl import prompts_from_jsonl
from gmpo.tasks.near_duplicates import near_duplicate_groups
from gmpo.tasks.splits import Sides, question_text, split_by_text
from gmpo.tasks.task import Task, task_of_sides

__all__ = ["bundled_task"]

_SVAMP_HELD_OUT_ITEMS = 300


def bundled_task(
    *,
    name: str,
    held_out_items: int | None = None,
    split_seed: int = 0,
    instruction: str = "Answer with just the number.",
) -> Task:
    """The word problems of a bundled data set; sources and licences are in `data/README.md`.

    * "svamp": 1,000 problems, of which `held_out_items` (300) are held out. SVAMP varies one
      story: other numbers, names, another question at its end. Problems that share four fifths of
      their words, numbers aside, are on one side, also where others link them; this makes 111
      groups of 1 to 32.
    * "gsm8k": its own training file (7,473) and its own test file (1,319) as the held-out side,
      of which `held_out_items` can take a part.

    Args:
        name: "svamp" or "gsm8k".
        held_out_items: held-out prompts; None is 300 for SVAMP and all for GSM8K.
        split_seed: decides which problems are held out.
        instruction: put on a line of its own after each problem; may be empty.

    Raises:
        DataError: there is no data set of that name, or `held_out_items` is out of range.
    """
    if name == "svamp":
        wanted = _SVAMP_HELD_OUT_ITEMS if held_out_items is None else held_out_items
        prompts = _bundled_prompts("svamp")
        story = _stories(prompts)
        train, held_out = split_by_text(
            prompts,
            held_out_items=wanted,
            split_seed=split_seed,
            text_of=lambda prompt: story[prompt.id],
        )
    elif name == "gsm8k":
        train = _bundled_prompts("gsm8k_train")
        held_out = _bundled_prompts("gsm8k_test")
        if held_out_items is not None:
            _, held_out = split_by_text(
                held_out, held_out_items=held_out_items, split_seed=split_seed, may_take_all=True
            )
    else:
        raise DataError(f"there is no bundled data set {name!r}; choose 'svamp' or 'gsm8k'")
    return task_of_sides(name, Sides(train=train, held_out=held_out), instruction=instruction)


def _bundled_prompts(stem: str) -> list[Prompt]:
    file_name = f"{stem}.jsonl.gz"
    with files("gmpo").joinpath("data", file_name).open("rb") as packed, gzip.open(packed) as lines:
        return prompts_from_jsonl(lines, source=file_name)


def _stories(prompts: Sequence[Prompt]) -> dict[str, str]:
    """By a prompt's id the first problem that tells its story."""
    texts = [question_text(prompt) for prompt in prompts]
    groups = near_duplicate_groups(texts)
    return {prompt.id: texts[group] for prompt, group in zip(prompts, groups, strict=True)}
