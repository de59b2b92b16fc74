"""The data sets that come with the package: SVAMP and GSM8K."""

from __future__ import annotations

import gzip
import re
from importlib.resources import files

from gmpo.errors import DataError
from gmpo.records import Prompt
from gmpo.tasks.jsonl import prompts_from_jsonl
from gmpo.tasks.splits import Sides, normalized_text, split_by_text
from gmpo.tasks.task import Task, task_of_sides

__all__ = ["bundled_task"]

_SVAMP_HELD_OUT_ITEMS = 300

_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
_SENTENCE_END = re.compile(r"(?<=[.?!])\s+")


def bundled_task(
    *,
    name: str,
    held_out_items: int | None = None,
    split_seed: int = 0,
    instruction: str = "Answer with just the number.",
) -> Task:
    """The word problems of a bundled data set; sources and licences are in `data/README.md`.

    * "svamp": 1,000 problems, of which `held_out_items` (300) are held out. SVAMP varies one
      story: other numbers, another question at its end. Problems whose story, the text before its
      last sentence, is the same but for the numbers are on one side; this makes 652 groups of
      1 to 8. Variations that rename things are not recognised.
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
        train, held_out = split_by_text(
            _bundled_prompts("svamp"),
            held_out_items=wanted,
            split_seed=split_seed,
            text_of=_story,
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


def _story(prompt: Prompt) -> str:
    """The problem without its last sentence, numbers masked; a one-sentence problem keeps it."""
    assert prompt.messages
    sentences = _SENTENCE_END.split(prompt.messages[-1].content.strip())
    return _NUMBER.sub("#", normalized_text(" ".join(sentences[:-1] or sentences)))
